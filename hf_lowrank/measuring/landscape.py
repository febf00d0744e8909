"""Metrics 1–6 and extras: the loss at, around and between checkpoints, and its derivatives."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.errors import UserError
from hf_lowrank.geometry import (
    Curve,
    Gaussian,
    Layout,
    RankOne,
    TokenLoss,
    bezier_losses,
    critical_sharpness,
    expected_sharpness,
    gradient,
    hessian_top_eigenvalue,
    hessian_trace,
    imib,
    interpolation_curve,
    loss_barrier,
    match_weights,
    noise_scale,
    path_grid,
    pca_curve,
    permute,
    plane,
    random_curve,
    random_sharpness,
    random_variance,
    refined_path,
    sharpness_per_direction,
    symmetric_grid,
    train_bezier,
    trajectory_pca_directions,
    weight_pca_directions,
    weight_scale,
)
from hf_lowrank.measuring.context import Row, RunContext, StepContext, UndefinedError, first_checkpoint_rows
from hf_lowrank.metrics import DIRECTIONS, METRICS
from hf_lowrank.processes.placement import parameters_of
from hf_lowrank.runs.measurements import LOSSES, REACH, UNDEFINED


def loss_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Validation loss and perplexity."""
    values = {"loss": at.center, "perplexity": math.exp(min(at.center, 700.0))}
    return [Row(metric=metric, value=values[metric], settings=at.run.evaluated_on) for metric in sorted(wanted)]


def random_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 1 and 2, the curve behind them (mean over draws, 95 % band) and each draw, from one sweep."""
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
    return rows + _direction_rows("random_curve", curve, settings)


def _direction_rows(metric: str, curve: Curve, settings: Mapping[str, Any]) -> list[Row]:
    """A row for each direction of a sweep: its sharpness, and the losses at even offsets from −`reach` to `reach`."""
    common = {**settings, REACH: float(curve.offsets[-1])}
    columns = (sharpness_per_direction(curve.losses).tolist(), curve.losses.tolist())
    return [
        Row(metric=DIRECTIONS[metric], value=value, settings={**common, "direction": index, LOSSES: losses})
        for index, (value, losses) in enumerate(zip(*columns, strict=True))
    ]


def pca_settings(run: RunContext, metric: str) -> dict[str, Any]:
    """The settings of `pca1_sharpness` or `pcak_sharpness`; the number of directions defines only the latter."""
    settings = run.settings_of("pca")
    if metric == "pca1_sharpness":
        del settings["count"]
    return settings


def pca_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 3 and 4, their curves and the directions, from one sweep."""
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
    return rows + _direction_rows("pcak_curve", curve, pca_settings(at.run, "pca1_sharpness"))


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
    return _path_rows(at, "step", (at.model, at.previous_weights), ends, settings, backwards=True)


def method_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The barrier to the baseline's checkpoint of the same step, between dense weights."""
    base = at.baseline_for_comparison()
    settings, end = at.run.settings_of("path", "dense"), parameters_of(at.dense_baseline_model)
    path, ends = (at.dense_model, end), (at.center, at.baseline_center)
    return _path_rows(at, "method", path, ends, settings, base.run.name)


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
    return _path_rows(at, "aligned_method", path, ends, settings, base.run.name)


def _path_rows(
    at: StepContext,
    kind: str,
    path: tuple[Any, Mapping[str, Tensor]],
    ends: tuple[float, float],
    settings: dict[str, Any],
    baseline: str | None = None,
    *,
    backwards: bool = False,
) -> list[Row]:
    """Rows of a straight path and its barriers.

    Args:
        path, ends: the model and the parameters that it leads to, and the loss of each.
        backwards: whether rows count positions from the other end.
    """

    def losses_at(positions: Sequence[float]) -> Tensor:
        walked = [1 - t for t in positions] if backwards else positions
        return interpolation_curve(*path, at.run.loss, positions=walked, ends=ends, **at.run.sweep)

    chosen = at.settings.path
    return _barrier_rows(kind, losses_at, path_grid(chosen.points, chosen.low, chosen.high), settings, baseline)


def _barrier_rows(
    kind: str,
    losses_at: Callable[[Sequence[float]], Tensor],
    grid: Tensor,
    settings: dict[str, Any],
    baseline: str | None,
) -> list[Row]:
    """Rows of a path, its barrier, and where there is such a metric, the IMIB of the even grid."""
    positions, losses = refined_path(losses_at, grid)
    values = {f"{kind}_barrier": loss_barrier(losses, positions)}
    if f"{kind}_imib" in METRICS:
        even = torch.isin(positions, grid)
        values[f"{kind}_imib"] = imib(losses[even], positions[even])
    rows = [
        Row(metric=f"{kind}_path", value=loss, settings={**settings, "t": t}, baseline=baseline)
        for t, loss in zip(positions.tolist(), losses.tolist(), strict=True)
    ]
    finite = all(map(math.isfinite, values.values()))
    reason = None if finite else "the loss on the path is not finite"
    return rows + [
        Row(metric=metric, value=value if finite else math.nan, settings=settings, baseline=baseline, reason=reason)
        for metric, value in values.items()
    ]


def curve_settings(run: RunContext, metric: str) -> dict[str, Any]:
    """The settings of `curved_method_barrier`, with the sequences that the curve is trained on."""
    return {**run.settings_of("curve", "dense"), "trained_on": run.other_sequences.fingerprint[:16]}


def curved_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The barrier to the baseline along a trained curve (arXiv 1802.10026), and that of the straight line."""
    base = at.baseline_for_comparison()
    at.check_dense()
    at.run.placement.require_whole_models("training a curve")
    settings, chosen, others = (
        curve_settings(at.run, "curved_method_barrier"),
        at.settings.curve,
        at.run.other_sequences,
    )
    if len(others) < chosen.batch:
        raise UserError(
            f"a curve is trained on batches of {chosen.batch} sequences that are not measured, there are "
            f"{len(others)}; lower the settings sequences or curve.batch"
        )

    def batch_loss(model: Any, step: int) -> Tensor:
        rows = torch.arange(step * chosen.batch, (step + 1) * chosen.batch) % len(others)
        loss = TokenLoss(others.input_ids[rows], others.attention_mask[rows], batch_tokens=at.settings.batch_tokens)
        at.run.tick()
        return sum(loss.terms(model), torch.zeros(()))

    straight = method_rows(at, {"method_barrier"})
    model, end = at.dense_model, parameters_of(at.dense_baseline_model)
    curve = train_bezier(model, end, batch_loss, steps=chosen.steps, lr=chosen.lr, seed=chosen.seed)

    def losses_at(positions: Sequence[float]) -> Tensor:
        return bezier_losses(model, curve, at.run.loss, positions, **at.run.sweep)

    return straight + _barrier_rows("curved_method", losses_at, path_grid(chosen.points), settings, base.run.name)


def noise_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The gradient noise scale, from gradients of equal batches of the sequences."""
    at.run.placement.require_whole_models("the gradient")
    sequences, batches, settings = at.run.sequences, at.settings.noise.batches, at.run.settings_of("noise")
    size = len(sequences) // batches
    if size < 1:
        raise UserError(f"noise.batches must be at most the number of sequences, {len(sequences)}, got {batches}")
    model = at.model.requires_grad_(True)

    def gradients() -> Iterator[list[Tensor]]:
        for start in range(0, batches * size, size):
            rows = slice(start, start + size)
            ids, mask = sequences.input_ids[rows], sequences.attention_mask[rows]
            loss = TokenLoss(ids, mask, batch_tokens=at.settings.batch_tokens)
            yield list(gradient(model, loss.terms).values())
            at.run.tick()

    estimate = noise_scale(gradients, size)
    reason = None
    if not math.isfinite(estimate.value):
        reason = UNDEFINED + f"{batches} batches of {size} sequences do not tell the gradient from its noise"
    elif not estimate.has_interval:
        reason = f"no interval from {batches} batches: without one of them the gradient is not told from its noise"
    return [Row.of("gradient_noise_scale", estimate, settings=settings, reason=reason)]


def hessian_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Top eigenvalue, with the residual of Lanczos as a remark, and trace, over all parameters."""
    at.run.placement.require_whole_models("the Hessian")
    chosen = at.settings.hessian
    settings = at.run.settings_of("hessian")
    model = at.model.requires_grad_(True)
    rows = []
    options: dict[str, Any] = {"seed": chosen.seed, "progress": at.run.tick}
    if "hessian_top" in wanted:
        top, residual = hessian_top_eigenvalue(model, at.run.loss.terms, iterations=chosen.iterations, **options)
        remark = f"residual of Lanczos: {residual:.2g}; an eigenvalue lies within it, not necessarily the largest"
        rows.append(Row(metric="hessian_top", value=top, settings=settings, reason=remark))
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
