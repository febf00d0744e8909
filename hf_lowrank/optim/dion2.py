"""Dion2 (arXiv 2512.16928): Muon of the largest rows or columns of the momentum, with feedback of the others."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_lowrank.optim.methods import Dion2Settings
from hf_lowrank.optim.muon import MatrixBatch, OrthogonalAdamW


class Dion2AdamW(OrthogonalAdamW):
    """Dion2: `M ← M + G`; of its slices along the shorter side the `⌈fraction · n⌉` with the largest L1 norms move.

    `U = orthogonalise(M_sel)`, `M_sel ← μ M_sel`, `W_sel ← W_sel − η_adjusted · U`; the other slices of M keep what
    they have gathered. Weight decay acts on the whole W. The slices of a square matrix are its rows.

    Sharded matrices are chosen from whole, so that any number of processes takes the same steps (the official
    implementation chooses within each shard), and only the chosen slices are sent.

    Args:
        fraction: share of the slices that move in a step.
        momentum: μ.

    The other arguments are those of `MuonAdamW`.
    """

    settings = Dion2Settings

    def orientation(self, param: Tensor) -> str:
        return "left" if param.shape[0] <= param.shape[1] else "right"

    def update(self, batch: MatrixBatch) -> None:
        group, layout, partition = batch.group, batch.entries[0].layout, batch.partition
        last = batch.momenta()  # oriented: the last dimension counts slices
        momenta = last + batch.gradients()

        first, count, sharding = 0, momenta.shape[-1], layout.sharding
        sizes = momenta.abs().sum(-2, dtype=torch.promote_types(momenta.dtype, torch.float32))
        if sharding is not None and layout.transposed:
            first, _ = sharding.bounds(layout.columns)
            sizes = sharding.gather(sizes, layout.columns)
        else:
            sizes = partition.sum(sizes)
        chosen = sizes.topk(math.ceil(group["fraction"] * layout.columns), dim=-1).indices - first
        # Slices of other processes are read from, and written to, one that is added at the end.
        chosen = torch.where((chosen >= 0) & (chosen < count), chosen, count).unsqueeze(1)
        index = chosen.expand(-1, momenta.shape[1], -1)

        selected = partition.projected(pad(momenta, (0, 1)).gather(-1, index))
        directions = partition.for_lifting(batch.orthogonalised(selected))
        moves = momenta.new_zeros(*momenta.shape[:-1], count + 1).scatter_(-1, index, directions)
        batch.move_(moves.narrow(-1, 0, count), batch.adjusted)
        damping = momenta.new_ones(len(momenta), 1, count + 1).scatter_(-1, chosen, group["momentum"])
        batch.write_momenta(momenta * damping.narrow(-1, 0, count), last)
