"""What Fira and APOLLO share: the scales that Adam gives to channels, and the norm-growth limiter."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_scales(lows: Tensor, moves: Tensor, gain: float) -> Tensor:
    """`φ_i = ‖N_i‖ / (‖R_i‖ + 1e-8)` of stacked (k, rows, rank) by row: (k, rows), in at least float32.

    `moves` are bias-corrected; dividing by `gain` undoes that.
    """
    wide = torch.promote_types(lows.dtype, torch.float32)
    outcome = torch.linalg.vector_norm(moves, dim=-1, dtype=wide) / gain
    return outcome / (torch.linalg.vector_norm(lows, dim=-1, dtype=wide) + 1e-8)


def limit_growth_(norms: Tensor, kept: list[Tensor], limit: float) -> Tensor:
    """The norm-growth limiter: divisors (k,) that keep each of `norms` (k,) within `limit` times its last value.

    `kept` holds the last limited norms, infinite before the first, and is updated in place.
    """
    before = torch.stack(kept).to(norms.dtype)
    divisors = torch.clamp(norms / (before + 1e-8), min=limit) / limit
    after = norms / divisors
    for last, new in zip(kept, after.unbind(), strict=True):
        last.copy_(new)
    return divisors
