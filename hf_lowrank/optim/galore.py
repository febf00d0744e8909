"""GaLore (arXiv 2403.03507): Adam inside the gradient's leading subspace."""

from hf_lowrank.optim.batch import ProjectedBatch
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.methods import GaLoreSettings


class GaLoreAdamW(ProjectedAdamW):
    """GaLore: `W ← W − η_t · scale · lift(Adam(project(G)))`. Arguments: see `ProjectedAdamW`; `scale` is 0.25."""

    settings = GaLoreSettings
    needs_only_projections = True
    heeds_flags = True

    def update(self, batch: ProjectedBatch) -> None:
        low = batch.project()
        direction = batch.adam(low)
        batch.lift_and_add_(direction, -batch.lr * batch.group["scale"])
