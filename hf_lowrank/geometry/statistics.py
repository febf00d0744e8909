"""Intervals for quantities estimated from few independent draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_lowrank.statistics import Estimate, student_t_quantile, t_interval


def interval_of_draws(draws: Sequence[float] | Tensor) -> Estimate:
    """Mean of independent draws, summed by torch, with its interval of Student's t; one draw has no interval."""
    x = torch.as_tensor(draws, dtype=torch.float64).flatten()
    if x.numel() == 0:
        raise ValueError("draws must hold at least one value")
    mean = float(x.mean())
    if x.numel() == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    return t_interval(mean, float(x.std()) / math.sqrt(x.numel()), x.numel())


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
    factor = math.exp(min(student_t_quantile((1 + confidence) / 2, count - 1) * error, 700.0))
    return Estimate(value, value / factor, value * factor, count)
