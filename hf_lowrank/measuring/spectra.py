"""Metrics 7–13: spectra of weights and of updates, each target matrix from disk by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hf_lowrank.geometry import (
    effective_rank,
    product_singular_values,
    relative_norm,
    singular_value_fraction,
    singular_values,
    spectral_gap,
    stable_rank,
    subspace_overlap,
    tail_exponent,
)
from hf_lowrank.geometry.spectra import difference_factors, for_threads, singular_vectors
from hf_lowrank.measuring.context import Row, StepContext
from hf_lowrank.runs.measurements import UNDEFINED
from hf_lowrank.runs.trajectory import Trajectory

WEIGHT: dict[str, Callable[[Tensor], float]] = {
    "weight_effective_rank": lambda sigma: effective_rank(sigma) / sigma.numel(),
    "weight_stable_rank": stable_rank,
    "weight_spectral_gap": spectral_gap,
    "weight_sv_fraction": singular_value_fraction,
    "weight_tail_exponent": tail_exponent,
}
UPDATE: dict[str, Callable[[Tensor, Tensor], float]] = {
    "update_norm": relative_norm,
    "update_effective_rank": lambda delta, _: effective_rank(delta) / delta.numel(),
    "update_stable_rank": lambda delta, _: stable_rank(delta),
}


# (work, items) -> what the work gives for each: over threads, or over processes too.
ForAll = Callable[[Callable[[str], Any], Sequence[str]], list[Any]]


def singular_values_of_targets(trajectory: Trajectory, step: int, for_all: ForAll = for_threads) -> dict[str, Tensor]:
    """Singular values (K,) float64 of every target's dense weight, from the factors where it is their product."""

    def one(module: str) -> Tensor:
        factors = trajectory.low_rank_factors(step, module)
        if factors is not None:
            return product_singular_values(*factors)
        return singular_values(trajectory.dense_weight(step, module))

    return dict(zip(trajectory.targets, for_all(one, trajectory.targets), strict=True))


def vectors_of_targets(
    trajectory: Trajectory, step: int, count: int, for_all: ForAll = for_threads
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(all σ (K,), u (M, count), v (N, count)) of every target's dense weight, from one decomposition."""

    def one(module: str) -> tuple[Tensor, Tensor, Tensor]:
        return singular_vectors(trajectory.dense_weight(step, module), count)

    return dict(zip(trajectory.targets, for_all(one, trajectory.targets), strict=True))


def singular_values_of_updates(
    trajectory: Trajectory, start: int, end: int, for_all: ForAll = for_threads
) -> dict[str, Tensor]:
    """Singular values (K,) float64 of every target's change from one step to another."""

    def one(module: str) -> Tensor:
        new, old = trajectory.low_rank_factors(end, module), trajectory.low_rank_factors(start, module)
        if new is not None and old is not None:
            return product_singular_values(*difference_factors(new, old))
        return singular_values(trajectory.dense_weight(end, module) - trajectory.dense_weight(start, module))

    return dict(zip(trajectory.targets, for_all(one, trajectory.targets), strict=True))


def weight_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 7–10."""
    return per_target(
        {name: {m: WEIGHT[m](sigma) for m in wanted} for name, sigma in at.target_values.items()},
        wanted,
        reason=surrogate(at.trajectory),
    )


def update_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 11–13, against the checkpoint before."""
    if at.previous_step is None:
        return first_checkpoint(wanted)
    deltas = singular_values_of_updates(at.trajectory, at.previous_step, at.step, at.run.placement.for_all)
    values = {
        name: {m: measure(delta, at.target_values[name]) for m, measure in UPDATE.items()}
        for name, delta in deltas.items()
    }
    return per_target(values, wanted, settings={"from_step": at.previous_step}, reason=surrogate(at.trajectory))


def total_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """As metrics 11–13, against the run's first checkpoint."""
    first = at.trajectory.steps[0]
    if first == at.step:
        return first_checkpoint(wanted)
    deltas = singular_values_of_updates(at.trajectory, first, at.step, at.run.placement.for_all)
    values = {
        name: {f"total_{m}": measure(delta, at.target_values[name]) for m, measure in UPDATE.items()}
        for name, delta in deltas.items()
    }
    return per_target(values, wanted, settings={"from_step": first}, reason=surrogate(at.trajectory))


def overlap_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Overlap of the top-k singular subspaces of W and of ΔW with the baseline's, mean of left and right."""
    base = at.baseline_for_comparison()
    count = at.settings.overlap.count

    def overlap(ours: Tensor, theirs: Tensor) -> float:
        if not bool(ours.any()) or not bool(theirs.any()):
            return math.nan
        (_, u, v), (_, other_u, other_v) = singular_vectors(ours, count), singular_vectors(theirs, count)
        return (subspace_overlap(u, other_u) + subspace_overlap(v, other_v)) / 2

    def one(name: str) -> dict[str, float]:
        values = {}
        ours, theirs = (run.dense_weight(at.step, name) for run in (at.trajectory, base))
        if "weight_overlap" in wanted:
            values["weight_overlap"] = overlap(ours, theirs)
        if "update_overlap" in wanted and at.previous_step in base.steps:
            ours = ours - at.trajectory.dense_weight(at.previous_step, name)
            values["update_overlap"] = overlap(ours, theirs - base.dense_weight(at.previous_step, name))
        return values

    targets = at.trajectory.targets
    values = dict(zip(targets, at.run.placement.for_all(one, targets), strict=True))
    settings = at.settings.overlap.request()
    rows = []
    if "update_overlap" in wanted and at.previous_step not in base.steps:
        reason = UNDEFINED + "the first checkpoint has none before it"
        if at.previous_step is not None:
            reason = f"baseline {base.run.name} has no checkpoint of step {at.previous_step}"
        rows.append(Row(metric="update_overlap", settings=settings, baseline=base.run.name, reason=reason))
        wanted = wanted - {"update_overlap"}
    remark = surrogate(at.trajectory)
    return rows + per_target(values, wanted, settings=settings, reason=remark, baseline=base.run.name)


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
