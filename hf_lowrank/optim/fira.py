"""Fira (arXiv 2410.01623): GaLore, plus the gradient outside the subspace, scaled by Adam's effect inside."""

from typing import Any

import torch

from hf_lowrank.optim.base import Declared
from hf_lowrank.optim.batch import ProjectedBatch
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.layout import Layout
from hf_lowrank.optim.limiter import RESIDUAL_NORM, channel_scales, limit_growth_
from hf_lowrank.optim.methods import FiraSettings


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

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        return {**super().declare_state(group, layout), **RESIDUAL_NORM}

    def update(self, batch: ProjectedBatch) -> None:
        group = batch.group
        low = batch.project(keep_stack=True)
        direction = batch.adam(low)
        scales = channel_scales(low, direction, batch.bias_gain)

        # ‖S‖ without S: the basis is orthonormal, so ‖g − s·Q Qᵀg‖² = ‖g‖² − (2s − s²) ‖Qᵀg‖² for every row g.
        share = group["scale"] if group["residual"] == "official" else 1.0
        low_squares = torch.linalg.vector_norm(low, dim=-1, dtype=scales.dtype).square()
        grad_squares = batch.grad_norms(scales.dtype).square()
        outside = torch.clamp(grad_squares - (2 * share - share**2) * low_squares, min=0)
        norms = batch.partition.sum((scales.square() * outside).sum(-1)).sqrt()
        scales /= limit_growth_(norms, batch.state("residual_norm"), group["norm_growth_limit"])[:, None]

        # scale · lift(N) + S = lift(scale · N − share · φ R) + φ G: one product and one pass over G.
        inside = scales[..., None].to(low.dtype) * low
        direction.mul_(group["scale"]).sub_(inside, alpha=share * batch.bias_gain)
        batch.lift_and_add_(direction, -batch.lr)
        batch.add_scaled_gradients_(scales, -batch.lr * batch.bias_gain)
