"""What Fira and APOLLO share: the scales that Adam gives to channels, and the norm-growth limiter."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowrank.compat import foreach_copy_
from hf_lowrank.optim.state import StateTensor

# The last norm of each matrix; infinite before the first step, which is not limited.
RESIDUAL_NORM = {"residual_norm": StateTensor(shape=(), dtype=torch.float32, initial=torch.inf)}


def row_norm(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Euclidean norms over the last dimension."""
    return torch.linalg.vector_norm(values, dim=-1, dtype=dtype)


def channel_scales(
    low: Tensor, direction: Tensor, bias_gain: float, norm: Callable[[Tensor, torch.dtype], Tensor] = row_norm
) -> Tensor:
    """`φ_i = ‖N_i‖ / (‖R_i‖ + 1e-8)` per row of stacked (k, rows, rank) tensors: (k, rows), in at least float32.

    `direction` is bias-corrected; dividing by `bias_gain` undoes that. `norm` is that of a row.
    """
    wide = torch.promote_types(low.dtype, torch.float32)
    return norm(direction, wide) / bias_gain / (norm(low, wide) + 1e-8)


def limit_growth_(norms: Tensor, last: list[Tensor], limit: float) -> Tensor:
    """The norm-growth limiter: divisors (k,) that keep each of `norms` (k,) within `limit` times its last value.

    `last` holds the last limited norms and is updated in place. A last norm of zero limits nothing: the published rule
    would let it grow from 1e-8 by one percent per step, two thousand steps up to 1.
    """
    before = torch.stack(last).to(norms.dtype)
    before = torch.where(before == 0, torch.inf, before)
    divisors = torch.clamp(norms / (before + 1e-8), min=limit) / limit
    after = norms / divisors
    foreach_copy_(last, after.unbind())
    return divisors
