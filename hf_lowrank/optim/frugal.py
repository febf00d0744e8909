"""FRUGAL (arXiv 2411.07837): Adam inside the subspace, a rule without state outside."""

from __future__ import annotations

from typing import Any

from hf_lowrank.optim.base import Bound, Params
from hf_lowrank.optim.batch import Batch, lift_matrix
from hf_lowrank.optim.core import ProjectedAdamW

STATE_FREE_RULES = ("sign", "sgd")


class FrugalAdamW(ProjectedAdamW):
    """FRUGAL: `W ← W − η_t · scale · lift(N) − η · state_free_lr_ratio · rule(G − lift(project(G)))`.

    Args:
        state_free_rule: `sign` (signSGD) or `sgd`, for the part of the gradient outside the subspace.
        state_free_lr_ratio: its learning rate over Adam's.

    The other arguments are `ProjectedAdamW`'s; the subspace is made of random columns and the moments start anew
    at each refresh unless said otherwise.
    """

    # What is left out is computed as for an orthonormal basis.
    subspaces = ("svd", "randomized", "random", "columns")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        subspace: str = "columns",
        moments: str = "reset",
        state_free_rule: str = "sign",
        state_free_lr_ratio: float = 1.0,
        **options: Any,
    ) -> None:
        own = {"state_free_rule": state_free_rule, "state_free_lr_ratio": state_free_lr_ratio}
        super().__init__(params, lr, subspace=subspace, moments=moments, own=own, **options)

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return super()._choices() | {"state_free_rule": STATE_FREE_RULES}

    def _bounds(self) -> dict[str, Bound]:
        return super()._bounds() | {"state_free_lr_ratio": (lambda x: x >= 0, "at least 0")}

    def _update_batch(self, batch: Batch) -> None:
        group = batch.group
        keep, step = batch.factors
        lows = batch.project()
        batch.apply_lifted_(batch.moves(), keep=keep, alpha=step * group["scale"])
        for number, (weight, grad, basis) in enumerate(zip(batch.weights, batch.grads, batch.bases, strict=True)):
            left = batch.left_bases[number] if batch.left_bases is not None else None
            low = lows[number].to(grad.dtype)
            if basis.is_floating_point():
                residual = grad - lift_matrix(low, basis, grad.shape[-1], left)
            else:
                residual = grad.index_fill(-1, basis, 0)
            if group["state_free_rule"] == "sign":
                residual.sign_()
            weight.add_(residual, alpha=-step * group["state_free_lr_ratio"])
