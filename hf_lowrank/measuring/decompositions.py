"""Singular values and vectors of a run's target matrices, each read from disk and decomposed by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hf_lowrank.geometry import product_singular_values, singular_values
from hf_lowrank.geometry.spectra import difference_factors, singular_vectors
from hf_lowrank.runs.trajectory import Trajectory

# (work, modules) -> the results of the work, computed by threads or processes.
Map = Callable[[Callable[[str], Any], Sequence[str]], list[Any]]


def singular_values_of_targets(trajectory: Trajectory, step: int, map_modules: Map) -> dict[str, Tensor]:
    """Singular values (K,) float64 of every target's dense weight; of its factors where it is their product."""

    def decompose(module: str) -> Tensor:
        factors = trajectory.low_rank_factors(step, module)
        if factors is not None:
            return product_singular_values(*factors)
        return singular_values(trajectory.dense_weight(step, module))

    return dict(zip(trajectory.targets, map_modules(decompose, trajectory.targets), strict=True))


def singular_vectors_of_targets(
    trajectory: Trajectory, step: int, count: int, map_modules: Map
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(all σ (K,), u (M, count), v (N, count)) of every target's dense weight, from one decomposition."""

    def decompose(module: str) -> tuple[Tensor, Tensor, Tensor]:
        return singular_vectors(trajectory.dense_weight(step, module), count)

    return dict(zip(trajectory.targets, map_modules(decompose, trajectory.targets), strict=True))


def singular_values_of_updates(trajectory: Trajectory, start: int, end: int, map_modules: Map) -> dict[str, Tensor]:
    """Singular values (K,) float64 of every target's change between two steps."""

    def decompose(module: str) -> Tensor:
        new, old = trajectory.low_rank_factors(end, module), trajectory.low_rank_factors(start, module)
        if new is not None and old is not None:
            return product_singular_values(*difference_factors(new, old))
        return singular_values(trajectory.dense_weight(end, module) - trajectory.dense_weight(start, module))

    return dict(zip(trajectory.targets, map_modules(decompose, trajectory.targets), strict=True))
