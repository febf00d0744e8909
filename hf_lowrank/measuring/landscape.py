"""Loss, perplexity and the loss along random and principal directions of one checkpoint."""

from __future__ import annotations

import math

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
from hf_lowrank.measuring.context import Row, StepContext
from hf_lowrank.processes.faults import UndefinedError


def loss_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Validation loss and perplexity."""
    loss = at.center
    values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    settings = at.run.evaluated_on
    return [Row(metric=metric, value=values[metric], settings=settings) for metric in sorted(wanted)]


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
        memory=at.settings.memory,
        center=at.center,
        progress=at.run.tick,
        replicas=at.run.placement.replicas,
    )
    settings = {**chosen.request(), **at.run.evaluated_on}
    rows = curve_rows("random_curve", curve, settings)
    for metric, measure in (("random_sharpness", random_sharpness), ("random_variance", random_variance)):
        if metric in wanted:
            rows.append(Row.of(metric, measure(curve), settings=settings))
    return rows


def pca_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 3 and 4 and their curves, from one sweep over the directions."""
    chosen = at.settings.pca
    count = chosen.count if "pcak_sharpness" in wanted else 1
    directions = _pca_directions(at, count)
    curve = pca_curve(
        at.model,
        at.run.loss,
        offsets=symmetric_grid(chosen.radius, chosen.steps),
        count=count,
        directions=directions,
        memory=at.settings.memory,
        center=at.center,
        progress=at.run.tick,
        replicas=at.run.placement.replicas,
    )
    rows = []
    for metric, lines in (("pca1", curve.losses[:1]), ("pcak", curve.losses)):
        if f"{metric}_sharpness" in wanted:
            settings = {**chosen.request(), **at.run.evaluated_on}
            if metric == "pca1":
                settings.pop("count")
            rows += [
                Row(metric=f"{metric}_curve", value=value, settings={**settings, "t": t})
                for t, value in zip(curve.offsets.tolist(), lines.mean(0).tolist(), strict=True)
            ]
            rows.append(Row(metric=f"{metric}_sharpness", value=expected_sharpness(lines), settings=settings))
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
    """The loss on the plane of two Gaussian directions, filter-normalised, a row for each point."""
    chosen = at.settings.plane
    grid = symmetric_grid(chosen.radius, chosen.steps)
    first, second = (Gaussian(chosen.seed, draw, "filter") for draw in range(2))
    losses = plane(
        at.model,
        at.run.loss,
        first,
        second,
        x_offsets=grid,
        y_offsets=grid,
        memory=at.settings.memory,
        progress=at.run.tick,
        replicas=at.run.placement.replicas,
    )
    settings = {**chosen.request(), **at.run.evaluated_on}
    return [
        Row(metric="random_plane", value=float(losses[i, j]), settings={**settings, "x": x, "y": y})
        for i, y in enumerate(grid.tolist())
        for j, x in enumerate(grid.tolist())
    ]


def curve_rows(metric: str, curve: Curve, settings: dict) -> list[Row]:
    """A row for each offset: the mean over directions and the 95 % band of that mean."""
    low, high = curve.band()
    return [
        Row(
            metric=metric,
            value=value,
            ci_low=below,
            ci_high=above,
            n=curve.losses.shape[0],
            settings={**settings, "t": t},
        )
        for t, value, below, above in zip(
            curve.offsets.tolist(), curve.mean().tolist(), low.tolist(), high.tolist(), strict=True
        )
    ]
