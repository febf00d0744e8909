"""Intervals for quantities estimated from few independent draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A value with the ends of its confidence interval (NaN where it has none) and the number of draws."""

    value: float
    low: float
    high: float
    draws: int


def student_cdf(t: float, degrees: int) -> float:
    """P(T ≤ t) of Student's t with an integer number of degrees of freedom, from its finite closed form."""
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees}")
    theta = math.atan(abs(t) / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    term, total = 1.0, 1.0
    if degrees % 2:
        for k in range(1, (degrees - 1) // 2):
            term *= cosine * cosine * (2 * k) / (2 * k + 1)
            total += term
        inside = 2 / math.pi * (theta + (sine * cosine * total if degrees > 1 else 0.0))
    else:
        for k in range(1, degrees // 2):
            term *= cosine * cosine * (2 * k - 1) / (2 * k)
            total += term
        inside = sine * total
    return 0.5 + math.copysign(inside / 2, t)


def student_quantile(probability: float, degrees: int) -> float:
    """The t with P(T ≤ t) = `probability`, by bisection."""
    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def mean_interval(draws: Sequence[float] | Tensor, confidence: float = 0.95) -> Estimate:
    """Mean of independent draws with its Student-t interval; a single draw has no interval."""
    x = torch.as_tensor(draws, dtype=torch.float64).flatten()
    if x.numel() == 0:
        raise ValueError("draws must hold at least one value")
    mean = float(x.mean())
    if x.numel() == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = student_quantile((1 + confidence) / 2, x.numel() - 1) * float(x.std()) / math.sqrt(x.numel())
    return Estimate(mean, mean - half, mean + half, x.numel())


def jackknife_interval(statistic: Callable[[Tensor], float], draws_D: Tensor, confidence: float = 0.95) -> Estimate:
    """A positive statistic of D draws (first dimension) with a delete-one jackknife interval on its logarithm.

    The logarithm keeps the interval of a variance positive and near its nominal coverage. Fewer than three draws,
    or a statistic that is not positive, give no interval.
    """
    count = draws_D.shape[0]
    value = statistic(draws_D)
    if count < 3 or not value > 0 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, count)
    keep = ~torch.eye(count, dtype=torch.bool)
    left_out = torch.tensor([statistic(draws_D[rows]) for rows in keep], dtype=torch.float64)
    if not bool((left_out > 0).all()):
        return Estimate(value, math.nan, math.nan, count)
    logs = left_out.log()
    error = math.sqrt((count - 1) / count * float((logs - logs.mean()).square().sum()))
    factor = math.exp(min(student_quantile((1 + confidence) / 2, count - 1) * error, 700.0))
    return Estimate(value, value / factor, value * factor, count)
