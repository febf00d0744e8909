"""What Fira and APOLLO share: the scales that Adam gives to channels, and the norm-growth limiter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def row_norm(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Euclidean norms over the last dimension."""
    return torch.linalg.vector_norm(values, dim=-1, dtype=dtype)


def channel_scales(
    lows: Tensor, moves: Tensor, gain: float, norm: Callable[[Tensor, torch.dtype], Tensor] = row_norm
) -> Tensor:
    """`φ_i = ‖N_i‖ / (‖R_i‖ + 1e-8)` of stacked (k, rows, rank) by row: (k, rows), in at least float32.

    `moves` are bias-corrected; dividing by `gain` undoes that. `norm` is of a row.
    """
    wide = torch.promote_types(lows.dtype, torch.float32)
    return norm(moves, wide) / gain / (norm(lows, wide) + 1e-8)


def limit_growth_(norms: Tensor, kept: list[Tensor], limit: float) -> Tensor:
    """The norm-growth limiter: divisors (k,) that keep each of `norms` (k,) within `limit` times its last value.

    `kept` holds the last limited norms, infinite before the first, and is updated in place. A last norm of zero limits
    nothing: the published rule would let it grow from 1e-8 by a hundredth a step, two thousand steps up to 1.
    """
    before = torch.stack(kept).to(norms.dtype)
    before = torch.where(before == 0, torch.inf, before)
    divisors = torch.clamp(norms / (before + 1e-8), min=limit) / limit
    after = norms / divisors
    torch._foreach_copy_(kept, after.unbind())
    return divisors
