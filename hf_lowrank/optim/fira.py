"""Fira (arXiv 2410.01623): GaLore, plus the gradient outside the subspace, scaled by Adam's effect inside."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.compat import foreach_copy_
from hf_lowrank.optim.base import Declared
from hf_lowrank.optim.batch import ProjectedBatch
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.layout import REPLICATED, Layout
from hf_lowrank.optim.methods import FiraSettings
from hf_lowrank.optim.state import StateTensor

# The last norm of each matrix; infinite before the first step, which is not limited.
RESIDUAL_NORM = {"residual_norm": StateTensor(shape=(), dtype=torch.float32, initial=torch.inf)}


class FiraAdamW(ProjectedAdamW):
    """Fira: `W ← W − η_t (scale · lift(N) + S)` with the limited residual `S = (G − G_sub) · φ`.

    Args:
        residual: `official`: `G_sub` is `scale · lift(project(G))`, as in the published package and its results, so
            that with a scale below 1 a share of the gradient inside the subspace stays in the residual; `paper`:
            `G_sub` is `lift(project(G))`.
        norm_growth_limit: largest factor by which the residual's norm may grow in one step.

    The other arguments are those of `ProjectedAdamW`, with a default `scale` of 0.25; `proj_type="full"` has no
    channels to scale and is refused.
    """

    settings = FiraSettings
    heeds_flags = True

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        return {**super().declare_state(group, layout), **RESIDUAL_NORM}

    def update(self, batch: ProjectedBatch) -> None:
        group = batch.group
        low = batch.project(keep_stack=True)
        direction = batch.adam(low)
        scales = channel_scales(low, direction, batch.bias_gain)

        # ‖S‖ without S: ‖g − s·Q Qᵀg‖² = ‖g‖² − 2s ‖Qᵀg‖² + s² ‖Q Qᵀg‖² for every row g.
        share = group["scale"] if group["residual"] == "official" else 1.0
        low_squares = torch.linalg.vector_norm(low, dim=-1, dtype=scales.dtype).square()
        grad_squares = batch.grad_norms(scales.dtype).square()
        lifted_squares = batch.lifted_squares(low, low_squares)
        outside = torch.clamp(grad_squares - 2 * share * low_squares + share**2 * lifted_squares, min=0)
        norms = batch.partition.sum((scales.square() * outside).sum(-1)).sqrt()
        scales /= limit_growth_(norms, batch, group["norm_growth_limit"]).unsqueeze(-1)

        # scale · lift(N) + S = lift(scale · N − share · φ R) + φ G: one product and one pass over G.
        # The scales may be above float16's range.
        inside = (scales.unsqueeze(-1).to(torch.promote_types(low.dtype, torch.bfloat16)) * low).to(low.dtype)
        direction.mul_(group["scale"]).sub_(inside, alpha=share * batch.bias_gain)
        batch.lift_and_add_(direction, -batch.lr)
        batch.add_scaled_gradients_(scales, -batch.lr * batch.bias_gain)


def channel_scales(
    low: Tensor, direction: Tensor, bias_gain: float, norm: Callable[[Tensor, torch.dtype], Tensor] = REPLICATED.norms
) -> Tensor:
    """`φ_i = ‖N_i‖ / (‖R_i‖ + 1e-8)` per row of stacked (k, rows, rank) tensors: (k, rows), in at least float32.

    `direction` is bias-corrected; dividing by `bias_gain` undoes that. `norm` is that of a row.
    """
    wide = torch.promote_types(low.dtype, torch.float32)
    return norm(direction, wide) / bias_gain / (norm(low, wide) + 1e-8)


def limit_growth_(norms: Tensor, batch: ProjectedBatch, limit: float) -> Tensor:
    """The norm-growth limiter: divisors (k,) that keep each of `norms` (k,) within `limit` times its last value.

    The last limited norms, in the state, are updated in place. A last norm of zero limits nothing: the published rule
    would let it grow from 1e-8 by one percent per step, two thousand steps up to 1.
    """
    last = batch.state("residual_norm")
    held = torch.stack(last).to(norms.dtype)
    before = torch.where(held == 0, torch.inf, held)
    divisors = torch.clamp(norms / (before + 1e-8), min=limit) / limit
    after = batch.where_finite(norms / divisors, held)
    foreach_copy_(last, after.unbind())
    return divisors
