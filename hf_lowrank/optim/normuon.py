"""NorMuon (arXiv 2510.05491): Muon, with the rows of its update brought to one size by their own running means."""

from typing import Any

import torch
from torch import Tensor

from hf_lowrank.compat import foreach_copy_
from hf_lowrank.optim.base import Declared
from hf_lowrank.optim.layout import Layout
from hf_lowrank.optim.methods import NorMuonSettings
from hf_lowrank.optim.muon import MatrixBatch, MuonAdamW
from hf_lowrank.optim.state import StateTensor

EPSILON = 1e-8


class NorMuonAdamW(MuonAdamW):
    """NorMuon: `U = orthogonalise(M)`, `V ← β₂V + (1−β₂) rowmean(U²)`, `U' = U/(√V + 1e-8)` rescaled to `‖U‖_F`.

    `W ← (1 − η·wd) W − η_adjusted · U'`. A row is an output neuron. The momentum is Muon's running mean: the paper's
    sum `μM + G` differs by a factor, which the orthogonalisation removes.

    Args:
        muon_beta2: β₂.

    The other arguments are those of `MuonAdamW`. Sharded parameters shard V with their rows.
    """

    settings = NorMuonSettings

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        return {**super().declare_state(group, layout), "row_squares": StateTensor(shape=(layout.rows,))}

    def rescaled(self, batch: MatrixBatch, directions: Tensor) -> Tensor:
        held = batch.state("row_squares")
        squares = directions.to(torch.promote_types(directions.dtype, torch.float32)).square().mean(-1)
        last = torch.stack(held).to(squares.dtype)
        means = batch.where_finite(torch.lerp(last, squares, 1 - batch.group["muon_beta2"]), last)
        foreach_copy_(held, means.unbind())
        factors = 1 / (means.sqrt() + EPSILON)
        before, after = batch.partition.sum(torch.stack([squares, squares * factors.square()]).sum(-1)).unbind()
        factors = factors * (before / after.clamp(min=torch.finfo(after.dtype).tiny)).sqrt().unsqueeze(-1)
        return directions * factors.unsqueeze(-1)
