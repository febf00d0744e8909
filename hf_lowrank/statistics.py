"""Estimates with intervals and tests over few draws or seeds, computed by scipy.

scipy is imported where it is used: whoever only needs `Estimate` does not load it.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Fewer seeds than this allow no verdict about methods.
SEEDS_FOR_A_VERDICT = 3


class Estimate(NamedTuple):
    """A value from `n` independent draws or seeds with the ends of its interval, NaN where it has none."""

    value: float
    low: float
    high: float
    n: int

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The ends of the interval; (None, None) without one."""
        return (self.low, self.high) if self.has_interval else (None, None)


@cache
def student_t_quantile(probability: float, degrees: float) -> float:
    """The `probability`-quantile of Student's t with `degrees` > 0 degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def student_t_p_value(t: float, degrees: float) -> float:
    """`P(|T| ≥ |t|)` of Student's t."""
    from scipy.special import stdtr

    return 2.0 * float(stdtr(degrees, -abs(t)))


def t_interval(value: float, standard_error: float, n: int, confidence: float = 0.95) -> Estimate:
    """`value`, the mean of `n` ≥ 2 draws, with its interval of Student's t."""
    half = student_t_quantile(0.5 + confidence / 2.0, n - 1) * standard_error
    return Estimate(value, value - half, value + half, n)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of at least one value with its interval of Student's t; a single value has no interval."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return t_interval(mean, math.sqrt(variance / n), n, confidence)


def mean_difference(
    ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float = 0.95
) -> Estimate | None:
    """Mean of `theirs − ours`, each by seed, with an interval; None if either has fewer than two seeds.

    Seeds that both have are compared in pairs, since a seed fixes the initial weights and the order of the data for
    every method; without two common seeds the interval is Welch's.
    """
    common = sorted(set(ours) & set(theirs))
    if len(common) >= 2:
        return mean_interval([theirs[seed] - ours[seed] for seed in common], confidence)
    if len(ours) < 2 or len(theirs) < 2:
        return None
    first, second = list(ours.values()), list(theirs.values())
    difference = math.fsum(second) / len(second) - math.fsum(first) / len(first)
    n = min(len(first), len(second))
    if len(set(first)) == len(set(second)) == 1:
        return Estimate(difference, difference, difference, n)
    from scipy.stats import ttest_ind

    low, high = ttest_ind(second, first, equal_var=False).confidence_interval(confidence)
    return Estimate(difference, float(low), float(high), n)


def kendall_tau(first: Array, second: Array) -> Array:
    """Kendall's τ-b along the last axis; NaN where all values of one side are equal."""
    from scipy.stats import kendalltau

    return np.asarray(kendalltau(first, second, axis=-1).statistic, dtype=np.float64)


def spearman(first: Array, second: Array) -> float:
    """Spearman's rank correlation; NaN where one side is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p-value for the numbers of items that only one of two models got right."""
    from scipy.stats import binomtest

    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0


def without_outliers(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest value within three interquartile ranges of the quartiles (Tukey's outer fences)."""
    first, third = np.quantile(values, (0.25, 0.75))
    reach = 3 * (third - first) if third > first else np.inf
    inside = [value for value in values if first - reach <= value <= third + reach]
    return min(inside), max(inside)
