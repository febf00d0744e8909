"""Intervals over seeds: Student's t, with no more than the standard library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds; `low` and `high` bound its 95 % interval and are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function (DLMF 8.17.22), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    fraction = d
    for m in range(1, 400):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + numerator / c
            c = c if abs(c) > tiny else tiny
            fraction *= d * c
        if abs(d * c - 1.0) < 1e-14:
            break
    return fraction


def incomplete_beta(a: float, b: float, x: float) -> float:
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, 1.0 - x) / b


@cache
def student_t_quantile(probability: float, degrees: float) -> float:
    """The `probability`-quantile (0.5 ≤ p < 1) of Student's t with `degrees` > 0 degrees of freedom."""
    tail = 1.0 - probability

    def upper_tail(t: float) -> float:
        return 0.5 * incomplete_beta(degrees / 2.0, 0.5, degrees / (degrees + t * t))

    low, high = 0.0, 1.0
    while upper_tail(high) > tail:
        high *= 2.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if upper_tail(middle) > tail else (low, middle)
    return 0.5 * (low + high)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of at least one value with its t interval."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = student_t_quantile(0.5 + confidence / 2.0, n - 1) * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, n)


def mean_difference(
    ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float = 0.95
) -> Estimate | None:
    """Mean of `theirs − ours`, each by seed, with an interval; None when fewer than two seeds speak.

    Seeds that both have are compared in pairs, since a seed fixes the initial weights and the order of the data for
    every method; without two common seeds, Welch's interval.
    """
    common = sorted(set(ours) & set(theirs))
    if len(common) >= 2:
        return mean_interval([theirs[seed] - ours[seed] for seed in common], confidence)
    if len(ours) < 2 or len(theirs) < 2:
        return None
    means, squares, sizes = [], [], []
    for sample in (list(ours.values()), list(theirs.values())):
        mean = math.fsum(sample) / len(sample)
        variance = math.fsum((value - mean) ** 2 for value in sample) / (len(sample) - 1)
        means.append(mean)
        squares.append(variance / len(sample))
        sizes.append(len(sample))
    error = math.sqrt(sum(squares))
    difference = means[1] - means[0]
    if error == 0.0:
        return Estimate(difference, difference, difference, min(sizes))
    degrees = sum(squares) ** 2 / sum(square**2 / (size - 1) for square, size in zip(squares, sizes, strict=True))
    half = student_t_quantile(0.5 + confidence / 2.0, degrees) * error
    return Estimate(difference, difference - half, difference + half, min(sizes))
