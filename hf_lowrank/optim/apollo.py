"""APOLLO and APOLLO-Mini (arXiv 2412.05270): the gradient itself, scaled by what Adam does to a projection of it."""

from __future__ import annotations

import math
from typing import Any

import torch

from hf_lowrank.optim.base import Bound, Params
from hf_lowrank.optim.batch import Batch
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.limiter import channel_scales, limit_growth_, row_norm

SCALE_TYPES = ("channel", "tensor")


class ApolloAdamW(ProjectedAdamW):
    """APOLLO: `W ← W − η_t · sqrt(scale) · φ G`, with the norm-growth limiter on the scaled gradient.

    The projection has N(0, 1/rank) entries, is drawn from the seed at every step, changes every `update_proj_gap`
    steps, and is never stored. APOLLO-Mini is `rank=1, scale_type="tensor", scale=128`.

    Args:
        scale_type: `channel`: `φ_i = ‖N_i‖ / ‖R_i‖` for each row that is not projected; `tensor`: one number.
        norm_growth_limit: how much the scaled gradient's norm may grow from one step to the next.

    The other arguments are `ProjectedAdamW`'s; `proj_type="full"` has no channels to scale and is refused.
    """

    limits_norm = True
    proj_types = ("std", "reverse_std", "right", "left")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        scale: float = 1.0,
        scale_type: str = "channel",
        norm_growth_limit: float = 1.01,
        subspace: str = "gaussian",
        **options: Any,
    ) -> None:
        own = {"scale_type": scale_type, "norm_growth_limit": norm_growth_limit}
        super().__init__(params, lr, scale=scale, subspace=subspace, own=own, **options)

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return super()._choices() | {"scale_type": SCALE_TYPES}

    def _bounds(self) -> dict[str, Bound]:
        return super()._bounds() | {"norm_growth_limit": (lambda x: x >= 1, "at least 1")}

    def _update_batch(self, batch: Batch) -> None:
        group = batch.group
        lows, moves = batch.project(), batch.moves()
        of_tensor = group["scale_type"] == "tensor"
        if of_tensor:
            lows, moves = lows.flatten(1)[:, None], moves.flatten(1)[:, None]
        norm = batch.place.norms if of_tensor else row_norm
        scales = channel_scales(lows, moves, batch.bias_gain, norm) * math.sqrt(group["scale"])

        norms = batch.place.norms(scales * batch.grad_norms(scales.dtype))
        scales /= limit_growth_(norms, batch.limits, group["norm_growth_limit"])[:, None]

        keep, step = batch.factors
        if keep != 1:
            torch._foreach_mul_(batch.weights, keep)
        apply_ = batch.add_scaled_gradients_ if of_tensor else batch.scale_rows_
        apply_(scales, alpha=-step * batch.bias_gain)
