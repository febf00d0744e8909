"""Tests on paired differences: one number for each seed, so the seeds are the sample. Pure arithmetic.

A seed fixes the initial weights and the order of the data for every method, so methods are compared within seeds.
With n seeds there are 2ⁿ ways of flipping the signs of the differences, and the smallest two-sided p-value of that
exact test is 2/2ⁿ: 0.0625 for five seeds, which no correction for several comparisons survives. Decisions
therefore rest on Student's t, which assumes differences about normal; the exact sign-flip p-value, which assumes only
that they are as likely above as below, is reported as well.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from hf_lowrank.statistics import Array, kendall_tau, mean_interval, student_t_p_value, student_t_quantile

Name = TypeVar("Name", bound=Hashable)

# Up to this many seeds all sign flips are enumerated; beyond, this many random ones.
EXACT_SEEDS = 14
FLIPS = 2**EXACT_SEEDS


@dataclass(frozen=True)
class Tested:
    """The mean of n differences, tested against a level.

    Attributes:
        effect: the mean itself, not its distance from the level.
        low, high: its t interval; None for a single seed, and where all seeds give the same number.
        p_above, p_below: twice the one-sided p-value that the mean lies above (below) the level, at most 1; the
            smaller of the two is the two-sided one. None for a single seed.
        p_sign_flip: the exact two-sided sign-flip p-value about the level; None for a single seed.
        n: seeds.
    """

    effect: float
    low: float | None
    high: float | None
    p_above: float | None
    p_below: float | None
    p_sign_flip: float | None
    n: int

    @property
    def p_value(self) -> float | None:
        """Two-sided."""
        return None if self.p_above is None or self.p_below is None else min(self.p_above, self.p_below)

    @property
    def estimate(self) -> dict[str, Any]:
        """The effect and its interval, as fields of a claim or a detail."""
        return {"effect": self.effect, "ci_low": self.low, "ci_high": self.high}


def paired_test(differences: Sequence[float], *, level: float = 0.0, confidence: float = 0.95) -> Tested:
    """Tests the mean of at least one difference against `level`.

    Differences that are all equal have no spread to judge by: they get the p-value of the sign flips and no interval.
    """
    estimate = mean_interval(differences, confidence)
    n = estimate.n
    if n == 1:
        return Tested(estimate.value, None, None, None, None, None, 1)
    flips = sign_flip_p_value([value - level for value in differences])
    deviation = math.sqrt(math.fsum((value - estimate.value) ** 2 for value in differences) / (n - 1))
    distance = estimate.value - level
    low, high = estimate.bounds
    if deviation <= 1e-12 * max(abs(value) for value in (*differences, level)):
        two_sided, low, high = flips, None, None
    else:
        two_sided = student_t_p_value(distance / (deviation / math.sqrt(n)), n - 1)
    above, below = (two_sided, 1.0) if distance > 0 else (1.0, two_sided)
    return Tested(estimate.value, low, high, above, below, flips, n)


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Share of sign flips, the observed signs among them, whose mean is as far from 0; exact up to 14 differences."""
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    exact = n <= EXACT_SEEDS
    if exact:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(FLIPS, n))
    as_far = np.abs(signs @ values) >= abs(values.sum()) - 1e-12 * np.abs(values).sum()
    return float(as_far.mean() if exact else (1 + as_far.sum()) / (1 + FLIPS))


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's adjusted p-values: comparing them with α bounds the chance of any false one among them by α."""
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for position, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of y over x; NaN where x does not vary."""
    centred = np.asarray(x, dtype=np.float64) - np.mean(x)
    weight = float(centred @ centred)
    return float(centred @ np.asarray(y, dtype=np.float64)) / weight if weight > 0 else math.nan


def tau_interval(
    first_MS: Array, second_MS: Array, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Interval of Kendall's τ between the means over seeds, by the bootstrap over seeds.

    Whole seeds are drawn, the same ones for every method and both sides. Means of so few resampled seeds vary too
    little, so their deviations are widened by `√(S/(S−1))` and by the ratio of Student's quantile to the normal one.
    """
    seeds = first_MS.shape[1]
    picked = np.random.default_rng(seed).integers(seeds, size=(resamples, seeds))
    # The order within a draw changes no mean, and few seeds allow few different draws.
    picked, which = np.unique(np.sort(picked, axis=1), axis=0, return_inverse=True)
    probability = 0.5 + confidence / 2
    wider = math.sqrt(seeds / (seeds - 1)) * (
        student_t_quantile(probability, seeds - 1) / student_t_quantile(probability, 1e6)
    )
    sides = []
    for values in (first_MS, second_MS):
        centre = values.mean(1)
        sides.append(centre + wider * (values[:, picked].mean(2).T - centre))
    taus = kendall_tau(sides[0], sides[1])[which]
    taus = taus[np.isfinite(taus)]
    if len(taus) < resamples // 2:
        return math.nan, math.nan
    low, high = np.quantile(taus, [1 - probability, probability])
    return float(low), float(high)
