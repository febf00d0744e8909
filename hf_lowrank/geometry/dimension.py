"""Intrinsic dimension of a set of points from the distances to their two nearest neighbours (TwoNN)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_lowrank.statistics import Estimate

# Distances are computed for this many points at a time.
ROWS = 1024


def intrinsic_dimension(x_ND: Tensor, *, discard: float = 0.1) -> Estimate:
    """The TwoNN estimate of the dimension of the manifold that N points lie near (arXiv 1803.06992).

    For uniform points the ratio μ of the distances to the second and to the first nearest neighbour has
    `P(μ > x) = x^(−d)`. The estimate is the slope, through the origin, of `−log(1 − F(μ))` over `log μ`, without the
    largest ratios, which reflect curvature and noise. Duplicates of a point are dropped. Points of a nested or curved
    manifold give a local, scale-dependent value: compare only estimates from equal numbers of points.

    Args:
        x_ND: (N, D) points in any real dtype.
        discard: share of the largest ratios that is left out, in [0, 1).

    Returns:
        The dimension in (0, ∞) with a 95 % interval from the likelihood of the same ratios, as if they were
        independent, and the number of ratios.

    Raises:
        ValueError: not a matrix, `discard` out of range, values that are NaN or Inf, or fewer than 20 distinct points.
    """
    if x_ND.ndim != 2:
        raise ValueError(f"points must be a matrix (N, D), got shape {tuple(x_ND.shape)}")
    if not 0 <= discard < 1:
        raise ValueError(f"discard must be in [0, 1), got {discard}")
    points = x_ND.detach().double()
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points must be finite, some contain NaN or Inf")
    points = torch.unique(points, dim=0)
    if len(points) < 20:
        raise ValueError(f"an intrinsic dimension needs at least 20 distinct points, got {len(points)}")
    logs = neighbour_ratios(points).log().sort().values
    count = len(logs)
    kept = max(2, math.floor(count * (1 - discard)))
    x = logs[:kept]
    empirical = torch.arange(1, kept + 1, dtype=torch.float64, device=x.device) / (count + 1)
    y = -torch.log1p(-empirical)
    value = float((x @ y) / (x @ x))
    # Censored exponential likelihood: kept ratios, and the others known to be larger than the last one kept.
    half = 1.96 / math.sqrt(kept)
    return Estimate(value, value * math.exp(-half), value * math.exp(half), kept)


def neighbour_ratios(x_ND: Tensor) -> Tensor:
    """(N,) distance to the second over the distance to the first nearest neighbour, for N ≥ 3 distinct points."""
    ratios = []
    for start in range(0, len(x_ND), ROWS):
        block = x_ND[start : start + ROWS]
        distances = torch.cdist(block, x_ND, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(block), device=x_ND.device)
        distances[own, own + start] = math.inf
        nearest = distances.topk(2, dim=1, largest=False).values
        ratios.append(nearest[:, 1] / nearest[:, 0])
    return torch.cat(ratios)
