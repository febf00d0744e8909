"""Fira (arXiv 2410.01623): GaLore, and outside the subspace the gradient scaled by what Adam did inside."""

from __future__ import annotations

from typing import Any

import torch

from hf_lowrank.optim.base import Bound, Params
from hf_lowrank.optim.batch import Batch
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.limiter import channel_scales, limit_growth_

RESIDUALS = ("official", "paper")


class FiraAdamW(ProjectedAdamW):
    """Fira: `W ← W − η_t (scale · lift(N) + S)` with the limited residual `S = (G − G_sub) · φ`.

    Args:
        residual: `official`: `G_sub` is `scale · lift(project(G))`, as in the published package and its numbers, so
            that with a scale below 1 a share of the gradient inside the subspace stays in the residual; `paper`:
            `G_sub` is `lift(project(G))`.
        norm_growth_limit: how much the residual's norm may grow from one step to the next.

    The other arguments are `ProjectedAdamW`'s; `proj_type="full"` has no channels to scale and is refused.
    """

    limits_norm = True
    # The residual's norm is computed as for an orthonormal basis.
    subspaces = ("svd", "randomized", "random", "columns")
    proj_types = ("std", "reverse_std", "right", "left")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        scale: float = 0.25,
        residual: str = "official",
        norm_growth_limit: float = 1.01,
        **options: Any,
    ) -> None:
        own = {"residual": residual, "norm_growth_limit": norm_growth_limit}
        super().__init__(params, lr, scale=scale, own=own, **options)

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return super()._choices() | {"residual": RESIDUALS}

    def _bounds(self) -> dict[str, Bound]:
        return super()._bounds() | {"norm_growth_limit": (lambda x: x >= 1, "at least 1")}

    def _update_batch(self, batch: Batch) -> None:
        group = batch.group
        share = group["scale"] if group["residual"] == "official" else 1.0
        lows = batch.project()
        moves = batch.moves()
        scales = channel_scales(lows, moves, batch.bias_gain)

        # ‖S‖ without S: the basis is orthonormal, so ‖g − s·Q Qᵀg‖² = ‖g‖² − (2s − s²) ‖Qᵀg‖² for every row g.
        wide = scales.dtype
        grad_squares = batch.grad_norms(wide).square()
        low_squares = torch.linalg.vector_norm(lows, dim=-1, dtype=wide).square()
        outside = torch.clamp(grad_squares - (2 * share - share**2) * low_squares, min=0)
        norms = batch.place.sum((scales.square() * outside).sum(-1)).sqrt()
        divisors = limit_growth_(norms, batch.limits, group["norm_growth_limit"])

        # scale · lift(N) − S = lift(scale · N + share · φ R) − φ G: one product and one pass over G.
        scales /= divisors[:, None]
        keep, step = batch.factors
        inside = scales[..., None].to(lows.dtype) * lows
        batch.apply_lifted_(
            moves.mul_(group["scale"]).add_(inside, alpha=share * batch.bias_gain), keep=keep, alpha=step
        )
        batch.scale_rows_(scales, alpha=-step * batch.bias_gain)
