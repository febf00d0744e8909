"""Metrics 1–6 and extras: the loss at, around and between checkpoints, and its derivatives."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_lowrank.geometry import (
    Gaussian,
    Layout,
    RankOne,
    critical_sharpness,
    expected_sharpness,
    gradient,
    hessian_top_eigenvalue,
    hessian_trace,
    interpolation_curve,
    loss_barrier,
    match_weights,
    path_grid,
    pca_curve,
    permute,
    plane,
    random_curve,
    random_sharpness,
    random_variance,
    symmetric_grid,
    trajectory_pca_directions,
    weight_pca_directions,
    weight_scale,
)
from hf_lowrank.measuring.context import Row, RunContext, StepContext, UndefinedError, first_checkpoint_rows
from hf_lowrank.processes.placement import parameters_of


def loss_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Validation loss and perplexity."""
    values = {"loss": at.center, "perplexity": math.exp(min(at.center, 700.0))}
    return [Row(metric=metric, value=values[metric], settings=at.run.evaluated_on) for metric in sorted(wanted)]


def random_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 1 and 2 and the curve behind them, its mean over draws with the 95 % band, from one sweep."""
    chosen = at.settings.random
    radius = chosen.radius * (weight_scale(at.model) if chosen.relative else 1.0)
    curve = random_curve(
        at.model,
        at.run.loss,
        offsets=symmetric_grid(radius, chosen.steps),
        draws=chosen.draws,
        seed=chosen.seed,
        normalize=chosen.normalize,
        center=at.center,
        **at.run.sweep,
    )
    settings = at.run.settings_of("random")
    low, high = curve.band()
    columns = (curve.offsets.tolist(), curve.mean().tolist(), low.tolist(), high.tolist())
    rows = [
        Row(metric="random_curve", value=v, ci_low=a, ci_high=b, n=chosen.draws, settings={**settings, "t": t})
        for t, v, a, b in zip(*columns, strict=True)
    ]
    for metric, estimate in (("random_sharpness", random_sharpness), ("random_variance", random_variance)):
        if metric in wanted:
            rows.append(Row.of(metric, estimate(curve), settings=settings))
    return rows


def pca_settings(run: RunContext, metric: str) -> dict[str, Any]:
    """The settings of `pca1_sharpness` or `pcak_sharpness`; the number of directions defines only the latter."""
    settings = run.settings_of("pca")
    if metric == "pca1_sharpness":
        del settings["count"]
    return settings


def pca_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 3 and 4 and their curves, from one sweep over the directions."""
    chosen = at.settings.pca
    count = chosen.count if "pcak_sharpness" in wanted else 1
    curve = pca_curve(
        at.model,
        at.run.loss,
        offsets=symmetric_grid(chosen.radius, chosen.steps),
        count=count,
        directions=_pca_directions(at, count),
        center=at.center,
        **at.run.sweep,
    )
    rows = []
    for name, losses in (("pca1", curve.losses[:1]), ("pcak", curve.losses)):
        metric = f"{name}_sharpness"
        if metric in wanted:
            settings = pca_settings(at.run, metric)
            rows += [
                Row(metric=f"{name}_curve", value=value, settings={**settings, "t": t})
                for t, value in zip(curve.offsets.tolist(), losses.mean(0).tolist(), strict=True)
            ]
            rows.append(Row(metric=metric, value=expected_sharpness(losses), settings=settings))
    return rows


def _pca_directions(at: StepContext, count: int) -> list[RankOne]:
    chosen = at.settings.pca
    if chosen.basis == "weights":
        known = at.target_vectors(count) if at.run.space == "dense" else None
        return weight_pca_directions(at.model, count, normalize=chosen.normalize, known=known)
    steps = at.trajectory.steps
    if len(steps) <= count:
        raise UndefinedError(
            f"{count} directions of a trajectory need {count + 1} checkpoints, there are {len(steps)}"
        )
    states = [at.weights_of(step) for step in steps]
    return trajectory_pca_directions(states, states[0], count, normalize=chosen.normalize)[0]


def plane_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The loss on the plane of two Gaussian directions with filter normalisation, a row for each point."""
    chosen = at.settings.plane
    grid = symmetric_grid(chosen.radius, chosen.steps)
    first, second = (Gaussian(chosen.seed, draw, "filter") for draw in range(2))
    losses = plane(at.model, at.run.loss, first, second, x_offsets=grid, y_offsets=grid, **at.run.sweep)
    settings = at.run.settings_of("plane")
    return [
        Row(metric="random_plane", value=float(losses[i, j]), settings={**settings, "x": x, "y": y})
        for i, y in enumerate(grid.tolist())
        for j, x in enumerate(grid.tolist())
    ]


def step_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The barrier from the previous checkpoint."""
    if at.previous_step is None:
        return first_checkpoint_rows(wanted)
    settings = {**at.run.settings_of("path"), "from_step": at.previous_step}
    # The loaded model is the end of the path, so the path is walked backwards.
    ends = (at.center, at.previous_center)
    return _path_rows(at, "step", (at.model, at.previous_weights), ends, wanted, settings, backwards=True)


def method_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The barrier to the baseline's checkpoint of the same step, between dense weights."""
    base = at.baseline_for_comparison()
    settings, end = at.run.settings_of("path", "dense"), parameters_of(at.dense_baseline_model)
    path, ends = (at.dense_model, end), (at.center, at.baseline_center)
    return _path_rows(at, "method", path, ends, wanted, settings, base.run.name)


def aligned_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The barrier to the baseline after its hidden units are permuted to match (arXiv 2209.04836)."""
    base = at.baseline_for_comparison()
    at.check_dense()
    at.run.placement.require_whole_models("matching hidden units")
    start, end = parameters_of(at.dense_model), parameters_of(at.dense_baseline_model)
    config = at.baseline_model.config.get_text_config()
    layout = Layout(config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads)
    end = permute(end, match_weights(start, end, layout), layout)
    path, ends, settings = (at.dense_model, end), (at.center, at.baseline_center), at.run.settings_of("path", "dense")
    return _path_rows(at, "aligned_method", path, ends, wanted, settings, base.run.name)


def _path_rows(
    at: StepContext,
    kind: str,
    path: tuple[Any, Mapping[str, Tensor]],
    ends: tuple[float, float],
    wanted: set[str],
    settings: dict[str, Any],
    baseline: str | None = None,
    *,
    backwards: bool = False,
) -> list[Row]:
    """Rows of a path and its barriers.

    Args:
        path, ends: the model and the parameters that it leads to, and the loss of each.
        backwards: whether rows count positions from the other end.
    """
    chosen = at.settings.path
    positions = path_grid(chosen.points, chosen.low, chosen.high)
    walked = 1 - positions if backwards else positions
    losses = interpolation_curve(*path, at.run.loss, positions=walked, ends=ends, **at.run.sweep)
    rows = [
        Row(metric=f"{kind}_path", value=loss, settings={**settings, "t": t}, baseline=baseline)
        for t, loss in zip(positions.tolist(), losses.tolist(), strict=True)
    ]
    for suffix, reference in (("", "mean"), ("_interpolated", "interpolated")):
        metric = f"{kind}_barrier{suffix}"
        if metric in wanted:
            value = loss_barrier(losses, positions, reference=reference)  # type: ignore[arg-type]
            value, reason = (value, None) if math.isfinite(value) else (math.nan, "the loss on the path is not finite")
            rows.append(Row(metric=metric, value=value, settings=settings, baseline=baseline, reason=reason))
    return rows


def hessian_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Top eigenvalue (the interval is the residual of Lanczos) and trace, over all parameters."""
    at.run.placement.require_whole_models("the Hessian")
    chosen = at.settings.hessian
    settings = at.run.settings_of("hessian")
    model = at.model.requires_grad_(True)
    rows = []
    options: dict[str, Any] = {"seed": chosen.seed, "progress": at.run.tick}
    if "hessian_top" in wanted:
        top, error = hessian_top_eigenvalue(model, at.run.loss.terms, iterations=chosen.iterations, **options)
        rows.append(Row(metric="hessian_top", value=top, ci_low=top - error, ci_high=top + error, settings=settings))
    if "hessian_trace" in wanted:
        options["replicas"] = at.run.placement.replicas
        trace = hessian_trace(model, at.run.loss.terms, probes=chosen.probes, **options)
        rows.append(Row.of("hessian_trace", trace, settings=settings))
    return rows


def critical_settings(run: RunContext, metric: str) -> dict[str, Any]:
    return {"space": run.space, **run.evaluated_on}


def critical_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Critical sharpness along the gradient on the held-out sequences."""
    at.run.placement.require_whole_models("the gradient")
    model = at.model.requires_grad_(True)
    direction = gradient(model, at.run.loss.terms)
    value = critical_sharpness(
        model, at.run.loss, direction, center=at.center, memory=at.settings.memory, progress=at.run.tick
    )
    settings = {"direction": "gradient", **critical_settings(at.run, "critical_sharpness")}
    return [Row(metric="critical_sharpness", value=value, settings=settings)]
