"""Fira (arXiv 2410.01623): GaLore, and outside the subspace the gradient scaled by what Adam did inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lowrank.errors import UserError
from hf_lowrank.optim.batch import Batch
from hf_lowrank.optim.core import Params, ProjectedAdamW

RESIDUALS = ("official", "paper")


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

    def _check_options(self, options: dict[str, Any], where: str) -> None:
        super()._check_options(options, where)
        if options["residual"] not in RESIDUALS:
            allowed = ", ".join(RESIDUALS)
            raise UserError(f"residual of {where} must be one of {allowed}, got {options['residual']!r}")
        if not options["norm_growth_limit"] >= 1:
            limit = options["norm_growth_limit"]
            raise UserError(f"norm_growth_limit of {where} must be at least 1, got {limit!r}")

    def _update_batch(self, batch: Batch) -> None:
        group = batch.group
        share = group["scale"] if group["residual"] == "official" else 1.0
        lows = batch.project()
        moves = batch.moves()
        scales = channel_scales(lows, moves, batch.bias_gain)

        # ‖S‖ without S: the basis is orthonormal, so ‖g − s·Q Qᵀg‖² = ‖g‖² − (2s − s²) ‖Qᵀg‖² for every row g.
        wide = scales.dtype
        grad_squares = torch.stack(
            [torch.linalg.vector_norm(grad, dim=-1, dtype=wide) for grad in batch.grads]
        ).square()
        low_squares = torch.linalg.vector_norm(lows, dim=-1, dtype=wide).square()
        outside = torch.clamp(grad_squares - (2 * share - share**2) * low_squares, min=0)
        norms = (scales.square() * outside).sum(-1).sqrt()
        divisors = limit_growth_(norms, batch.limits, group["norm_growth_limit"])

        # scale · lift(N) − S = lift(scale · N + share · φ R) − φ G: one product and one pass over G.
        scales = (scales / divisors[:, None] * batch.bias_gain).to(lows.dtype)
        keep, step = batch.factors
        batch.apply_lifted_(
            moves.mul_(group["scale"]).addcmul_(scales[..., None], lows, value=share), keep=keep, alpha=step
        )
        for weight, grad, scale in zip(batch.weights, batch.grads, scales.unbind(), strict=True):
            weight.addcmul_(grad, scale[:, None].to(grad.dtype), value=-step)
