"""APOLLO and APOLLO-Mini (arXiv 2412.05270): the gradient, scaled by Adam's effect on a random projection of it."""

import math
from typing import Any

from hf_lowrank.optim.base import Declared
from hf_lowrank.optim.batch import ProjectedBatch
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.fira import RESIDUAL_NORM, channel_scales, limit_growth_
from hf_lowrank.optim.layout import Layout
from hf_lowrank.optim.methods import ApolloSettings


class ApolloAdamW(ProjectedAdamW):
    """APOLLO: `W ← W − η_t · sqrt(scale) · φ G`, with the norm-growth limiter on the scaled gradient.

    The projection has N(0, 1/rank) entries and changes every `update_proj_gap` steps. Between refreshes it is kept,
    which costs `rank · columns` numbers per matrix; `subspace="seeded"` stores nothing, as the paper has it, and draws
    it again at each step. APOLLO-Mini is `rank=1, scale_type="tensor", scale=128`.

    Args:
        scale_type: `channel`: `φ_i = ‖N_i‖ / ‖R_i‖` per row that is not projected; `tensor`: one factor per matrix.
        norm_growth_limit: largest factor by which the norm of the scaled gradient may grow in one step.

    The other arguments are those of `ProjectedAdamW`; `proj_type="full"` has no channels to scale and is refused.
    """

    settings = ApolloSettings
    heeds_flags = True

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        return {**super().declare_state(group, layout), **RESIDUAL_NORM}

    def update(self, batch: ProjectedBatch) -> None:
        group = batch.group
        low = batch.project(keep_stack=True)
        direction = batch.adam(low)
        if group["scale_type"] == "tensor":
            one_row = low.flatten(1).unsqueeze(1), direction.flatten(1).unsqueeze(1)
            scales = channel_scales(*one_row, batch.bias_gain, batch.partition.norms)
        else:
            scales = channel_scales(low, direction, batch.bias_gain)
        scales *= math.sqrt(group["scale"])

        norms = batch.partition.norms(scales * batch.grad_norms(scales.dtype))
        scales /= limit_growth_(norms, batch, group["norm_growth_limit"]).unsqueeze(-1)

        batch.decay_()
        scales = scales.squeeze(-1) if group["scale_type"] == "tensor" else scales
        batch.add_scaled_gradients_(scales, -batch.lr * batch.bias_gain)
