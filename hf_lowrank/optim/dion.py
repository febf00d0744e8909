"""Dion (arXiv 2504.05295): orthogonalised momentum of low rank, by one power iteration per step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.compat import foreach_copy_
from hf_lowrank.optim.base import Declared
from hf_lowrank.optim.entries import Entry
from hf_lowrank.optim.layout import Layout
from hf_lowrank.optim.methods import DionSettings
from hf_lowrank.optim.muon import MatrixBatch, OrthogonalAdamW
from hf_lowrank.optim.orthogonal import orthonormal_columns
from hf_lowrank.optim.state import StateTensor
from hf_lowrank.optim.subspaces import draw_generator


class DionAdamW(OrthogonalAdamW):
    """Dion: `M ← M + G`, `P = qr(M Q)`, `R = MᵀP`, `M ← M − (1−μ) P Rᵀ`, `Q = R / ‖columns‖`.

    `W ← (1 − η·wd) W − η_adjusted · P Qᵀ` with the new Q. A matrix with fewer rows than columns is stepped as its
    transpose. The first Q is Gaussian, drawn from the seed. A column of R that is zero to rounding moves nothing and
    keeps its last direction.

    Sharded matrices stay sharded: M with the weight, Q along its own rows, and only products of rank r are sent.

    Args:
        rank: r, at most the shorter side of each matrix.
        momentum: μ.

    The other arguments are those of `OrthogonalAdamW`.
    """

    settings = DionSettings
    settings_of_model = OrthogonalAdamW.settings_of_model - {"rank"}

    def orientation(self, param: Tensor) -> str:
        return "std"

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        basis = StateTensor(shape=(layout.columns, layout.rank), dtype="parameter", initial=None)
        return {**super().declare_state(group, layout), "basis": basis}

    def describe(self, group: Mapping[str, Any], layout: Layout) -> str:
        return f"Dion, rank {layout.rank}"

    def refresh(self, entries: Sequence[Entry]) -> None:
        """Draws the bases of the first step."""
        for entry in entries:
            if "basis" not in entry.state:
                entry.state["basis"] = first_basis(entry)

    def update(self, batch: MatrixBatch) -> None:
        group, layout, partition = batch.group, batch.entries[0].layout, batch.partition
        before, kept = batch.momenta(), batch.state("basis")  # rows ≥ columns
        before = before.to(torch.promote_types(before.dtype, torch.float32))
        M = before + batch.gradients()
        last = torch.stack(partition.bases(kept)).to(M.dtype)

        P = orthonormal_columns(partition.projected(M @ last), partition.sum)
        P = partition.for_lifting(P)
        R = M.mT @ P
        if layout.transposed:  # sharded along the rows of R
            squares = partition.sum(R.square().sum(-2, keepdim=True))
        else:
            R = partition.sum(R)
            squares = R.square().sum(-2, keepdim=True)
        rounding = 16 * torch.finfo(M.dtype).eps ** 2 * layout.rows * squares.amax(-1, keepdim=True)
        seen = squares > rounding
        Q = torch.where(seen, R / squares.sqrt(), last)

        batch.move_(P @ (Q * seen).mT, batch.adjusted)
        batch.write_momenta(torch.baddbmm(M, P, R.mT, alpha=group["momentum"] - 1), before)
        foreach_copy_(kept, partition.own_basis_rows(batch.where_finite(Q, last)).unbind())


def first_basis(entry: Entry) -> Tensor:
    """A Gaussian matrix (columns, rank), sharded as its state; the same on any device."""
    layout, shape = entry.layout, (entry.layout.columns, entry.layout.rank)
    generator = draw_generator(torch.device("cpu"), entry.group["seed"], layout.first_index)
    whole = torch.randn(shape, generator=generator, dtype=torch.float32).to(entry.weight)
    return whole if layout.sharding is None else layout.sharding.tensor(layout.sharding.part(whole).clone(), shape)
