"""Loss, perplexity and the loss along random and principal directions of one checkpoint."""

from __future__ import annotations

import math

from hf_lowrank.geometry import (
    Curve,
    random_curve,
    random_sharpness,
    random_variance,
    symmetric_grid,
    weight_scale,
)
from hf_lowrank.measuring.context import Row, StepContext


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
    )
    settings = {**chosen.request(), **at.run.evaluated_on}
    rows = curve_rows("random_curve", curve, settings)
    for metric, measure in (("random_sharpness", random_sharpness), ("random_variance", random_variance)):
        if metric in wanted:
            rows.append(Row.of(metric, measure(curve), settings=settings))
    return rows


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
