"""Loss, perplexity, and the loss along random and principal directions of one checkpoint."""

from __future__ import annotations

import math
from typing import Any

from hf_lowrank.geometry import (
    Curve,
    Gaussian,
    RankOne,
    expected_sharpness,
    pca_curve,
    plane,
    random_curve,
    random_sharpness,
    random_variance,
    symmetric_grid,
    trajectory_pca_directions,
    weight_pca_directions,
    weight_scale,
)
from hf_lowrank.measuring.context import RunContext, StepContext
from hf_lowrank.measuring.rows import Row, UndefinedError


def loss_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Validation loss and perplexity."""
    values = {"loss": at.center, "perplexity": math.exp(min(at.center, 700.0))}
    return [Row(metric=metric, value=values[metric], settings=at.run.evaluated_on) for metric in sorted(wanted)]


def random_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 1 and 2 and the curve behind them, from one sweep."""
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
    rows = _curve_rows("random_curve", curve, settings)
    for metric, estimate in (("random_sharpness", random_sharpness), ("random_variance", random_variance)):
        if metric in wanted:
            rows.append(Row.of(metric, estimate(curve), settings=settings))
    return rows


def _curve_rows(metric: str, curve: Curve, settings: dict[str, Any]) -> list[Row]:
    """A row for each offset: the mean over directions and the 95 % band of that mean."""
    low, high = curve.band()
    columns = (curve.offsets.tolist(), curve.mean().tolist(), low.tolist(), high.tolist())
    return [
        Row(metric=metric, value=v, ci_low=a, ci_high=b, n=curve.losses.shape[0], settings={**settings, "t": t})
        for t, v, a, b in zip(*columns, strict=True)
    ]


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
        known = None if hasattr(at.model, "to_dense") else at.target_vectors(count)
        return weight_pca_directions(at.model, count, normalize=chosen.normalize, known=known)
    steps = at.trajectory.steps
    if len(steps) <= count:
        raise UndefinedError(
            f"{count} directions of a trajectory need {count + 1} checkpoints, there are {len(steps)}"
        )
    states = [at.run.placement.weights(at.trajectory, step) for step in steps]
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
