"""Metrics 7–13: spectra of weights and of updates, each target matrix from disk by itself."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from hf_lowrank.checkpoints import Trajectory
from hf_lowrank.geometry import (
    effective_rank,
    product_singular_values,
    relative_norm,
    singular_value_fraction,
    singular_values,
    spectral_gap,
    stable_rank,
)
from hf_lowrank.geometry.spectra import difference_factors, for_threads
from hf_lowrank.measuring.context import UNDEFINED, Row, StepContext

WEIGHT: dict[str, Callable[[Tensor], float]] = {
    "weight_effective_rank": lambda sigma: effective_rank(sigma) / sigma.numel(),
    "weight_stable_rank": stable_rank,
    "weight_spectral_gap": spectral_gap,
    "weight_sv_fraction": singular_value_fraction,
}
UPDATE: dict[str, Callable[[Tensor, Tensor], float]] = {
    "update_norm": relative_norm,
    "update_effective_rank": lambda delta, _: effective_rank(delta) / delta.numel(),
    "update_stable_rank": lambda delta, _: stable_rank(delta),
}


def singular_values_of_targets(trajectory: Trajectory, step: int) -> dict[str, Tensor]:
    """Singular values (K,) float64 of every target's dense weight, from the factors where it is their product."""

    def one(module: str) -> Tensor:
        factors = trajectory.low_rank_factors(step, module)
        if factors is not None:
            return product_singular_values(*factors)
        return singular_values(trajectory.dense_weight(step, module))

    return dict(zip(trajectory.targets, for_threads(one, trajectory.targets), strict=True))


def singular_values_of_updates(trajectory: Trajectory, start: int, end: int) -> dict[str, Tensor]:
    """Singular values (K,) float64 of every target's change from one step to another."""

    def one(module: str) -> Tensor:
        new, old = trajectory.low_rank_factors(end, module), trajectory.low_rank_factors(start, module)
        if new is not None and old is not None:
            return product_singular_values(*difference_factors(new, old))
        return singular_values(trajectory.dense_weight(end, module) - trajectory.dense_weight(start, module))

    return dict(zip(trajectory.targets, for_threads(one, trajectory.targets), strict=True))


def weight_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 7–10."""
    return per_target(
        {name: {m: measure(sigma) for m, measure in WEIGHT.items()} for name, sigma in at.target_values.items()},
        wanted,
        reason=surrogate(at.trajectory),
    )


def update_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 11–13, against the checkpoint before."""
    if at.previous_step is None:
        return first_checkpoint(wanted)
    deltas = singular_values_of_updates(at.trajectory, at.previous_step, at.step)
    values = {
        name: {m: measure(delta, at.target_values[name]) for m, measure in UPDATE.items()}
        for name, delta in deltas.items()
    }
    return per_target(values, wanted, settings={"from_step": at.previous_step}, reason=surrogate(at.trajectory))


def first_checkpoint(wanted: set[str]) -> list[Row]:
    """What pairs of consecutive checkpoints are at the first one."""
    reason = UNDEFINED + "the first checkpoint has none before it"
    return [Row(metric=metric, settings={"from_step": None}, reason=reason) for metric in sorted(wanted)]


def surrogate(trajectory: Trajectory) -> str | None:
    """The remark that goes with dense weights that only stand for what the layers compute."""
    if trajectory.dense_weight_kind == "exact":
        return None
    return "surrogate: the product of the factors, as the layer between them is not linear"


def per_target(
    values: dict[str, dict[str, float]],
    wanted: set[str],
    *,
    settings: dict | None = None,
    reason: str | None = None,
    baseline: str | None = None,
) -> list[Row]:
    """A row for each target and metric, and the model's: the mean over targets that have a value."""
    rows = []
    for metric in sorted(wanted):
        column = {name: row[metric] for name, row in values.items()}
        finite = [value for value in column.values() if math.isfinite(value)]
        for scope, value in [*column.items(), ("model", sum(finite) / len(finite) if finite else math.nan)]:
            missing = None
            if not math.isfinite(value):
                missing = UNDEFINED + "the matrix is zero" + (" in every target" if scope == "model" else "")
            elif scope == "model" and len(finite) < len(column):
                missing = f"mean over the {len(finite)} of {len(column)} targets that have a value"
            said = "; ".join(part for part in (missing, reason) if part) or None
            rows.append(
                Row(metric=metric, scope=scope, value=value, settings=settings or {}, reason=said, baseline=baseline)
            )
    return rows
