"""GaLore (arXiv 2403.03507): Adam inside the gradient's leading subspace."""

from __future__ import annotations

from typing import Any

from hf_lowrank.optim.base import Params
from hf_lowrank.optim.batch import Batch
from hf_lowrank.optim.core import ProjectedAdamW


class GaLoreAdamW(ProjectedAdamW):
    """GaLore: `W ← W − η_t · scale · lift(Adam(project(G)))`. All arguments are `ProjectedAdamW`'s."""

    stays_low = True

    def __init__(self, params: Params, lr: float = 1e-3, *, scale: float = 0.25, **options: Any) -> None:
        super().__init__(params, lr, scale=scale, **options)

    def _update_batch(self, batch: Batch) -> None:
        keep, step = batch.factors
        batch.apply_lifted_(batch.moves(), keep=keep, alpha=step * batch.group["scale"])
