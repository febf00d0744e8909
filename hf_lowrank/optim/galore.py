"""GaLore (arXiv 2403.03507): Adam inside the gradient's leading subspace."""

from __future__ import annotations

from typing import Any

from hf_lowrank.optim.base import Params
from hf_lowrank.optim.batch import ProjectedBatch
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.methods import GaLoreSettings


class GaLoreAdamW(ProjectedAdamW):
    """GaLore: `W ← W − η_t · scale · lift(Adam(project(G)))`. All arguments are those of `ProjectedAdamW`."""

    settings = GaLoreSettings
    needs_only_projections = True

    def __init__(self, params: Params, lr: float = 1e-3, *, scale: float = 0.25, **options: Any) -> None:
        super().__init__(params, lr, scale=scale, **options)

    def update(self, batch: ProjectedBatch) -> None:
        low = batch.project()
        direction = batch.adam(low)
        batch.lift_and_add_(direction, -batch.lr * batch.group["scale"])
