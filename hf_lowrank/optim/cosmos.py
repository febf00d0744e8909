"""COSMOS (arXiv 2502.17410): Adam in the leading subspace of the gradients (as SOAP), Muon in what is left."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.compat import foreach_copy_
from hf_lowrank.optim.base import Declared
from hf_lowrank.optim.entries import Entry
from hf_lowrank.optim.layout import Layout
from hf_lowrank.optim.methods import CosmosSettings
from hf_lowrank.optim.muon import MatrixBatch, OrthogonalAdamW
from hf_lowrank.optim.orthogonal import orthonormal_columns
from hf_lowrank.optim.refresh import basis_state, choose_first
from hf_lowrank.optim.state import StateTensor, adam_moments

# What of a momentum outside the subspace is rounding error, in units of its type's precision.
ROUNDING = 64


class CosmosAdamW(OrthogonalAdamW):
    """COSMOS: `W ← (1 − η·wd) W − η · lr_ratio · √(m n) · D / (‖D‖ + ε)`, `D = A + gamma · C`.

    With `M ← β₁M + G` and its Nesterov mean H: A is Adam's direction of H inside a basis P of the columns' side,
    lifted back, and C is `H − H P Pᵀ` orthogonalised and brought to a root mean square of one. P follows the second
    moment of the gradients by one power iteration per step: `P = qr(β₂ P S + (1−β₂) GᵀG P)`, where S is that moment
    inside P. The first P is the leading subspace of the first gradient. A direction that is zero to rounding keeps its
    basis vector, and C is zero where nothing is left outside P.

    Sharded matrices stay sharded but for C, which is orthogonalised on one process each.

    Args:
        betas: β₁ and β₂, of these matrices and of AdamW.
        rank: of P, at most the shorter side of each matrix.
        lr_ratio: root mean square of an update, in units of the learning rate.
        gamma: weight of C.
        nesterov: otherwise H is the mean that M stands for.
        subspace: how the first basis is chosen: `svd` (exact) or `randomized` (subspace iteration).

    The other arguments are those of `MuonAdamW`.
    """

    settings = CosmosSettings
    settings_of_model = OrthogonalAdamW.settings_of_model - {"rank"}

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        return {
            "refreshes": 0,
            "reset_at": 0,
            **super().declare_state(group, layout),
            **basis_state(group["subspace"], layout),
            "exp_avg_sq": adam_moments(*layout.low_shape)["exp_avg_sq"],
            "gram": StateTensor(shape=(layout.rank, layout.rank), sharded=False),
        }

    def describe(self, group: Mapping[str, Any], layout: Layout) -> str:
        return f"COSMOS, rank {layout.rank}"

    def refresh(self, entries: Sequence[Entry]) -> None:
        choose_first(entries)

    def update(self, batch: MatrixBatch) -> None:
        group, layout, partition, age = batch.group, batch.entries[0].layout, batch.partition, batch.age
        (beta1, beta2), eps = group["betas"], group["eps"]
        held = {key: batch.state(key) for key in ("basis", "exp_avg_sq", "gram")}
        last_momentum = batch.momenta()
        dtype = torch.promote_types(last_momentum.dtype, torch.float32)
        G = batch.stacked_gradients(dtype)
        last = {key: torch.stack(held[key]).to(dtype) for key in ("exp_avg_sq", "gram")}
        last["basis"] = torch.stack(partition.bases(held["basis"])).to(dtype)

        P = last["basis"]
        if age > 1:
            covariance = partition.sum(G.mT @ (G @ P))
            P = torch.lerp(covariance, P @ last["gram"], beta2)
            P = orthonormal_columns(P, toward=last["basis"])
        low, turn = G @ P, last["basis"].mT @ P
        S = torch.lerp(partition.sum(low.mT @ low), turn.mT @ last["gram"] @ turn, beta2)
        V = torch.lerp(low.square(), last["exp_avg_sq"], beta2)

        M = beta1 * last_momentum.to(dtype) + G
        kappa = (1 - beta1**age) / (1 - beta1)
        H = (G + beta1 * M) / (1 + beta1 * kappa) if group["nesterov"] else M / kappa
        inside = H @ P
        A = inside / ((V / (1 - beta2**age)).sqrt() + eps)
        outside = torch.baddbmm(H, inside, P.mT, alpha=-1)
        C = self.outside_part(batch, outside, H)
        D = torch.baddbmm(C, A, P.mT, beta=group["gamma"])
        size = math.sqrt(layout.rows * layout.columns)
        batch.move_(D / (norms(D, batch) + eps), group["lr_ratio"] * size)

        batch.write_momenta(M.to(last_momentum.dtype), last_momentum)
        for key, value in {"exp_avg_sq": V, "gram": S}.items():
            foreach_copy_(held[key], batch.where_finite(value, last[key]).unbind())
        P = batch.where_finite(P, last["basis"])
        foreach_copy_(held["basis"], partition.own_basis_rows(P).unbind())

    def outside_part(self, batch: MatrixBatch, outside: Tensor, momenta: Tensor) -> Tensor:
        """What lies outside the subspaces, orthogonalised, with a root mean square of one or zeros."""
        layout, precision = batch.entries[0].layout, torch.finfo(outside.dtype).eps
        seen = norms(outside, batch) > ROUNDING * precision * norms(momenta, batch)
        found = batch.orthogonalised(torch.where(seen, outside, 0))
        size = norms(found, batch).clamp(min=torch.finfo(found.dtype).tiny)
        return found / size * math.sqrt(layout.rows * layout.columns)


def norms(stack: Tensor, batch: MatrixBatch) -> Tensor:
    """Frobenius norms of whole matrices, (k, rows, columns) -> (k, 1, 1)."""
    return batch.partition.sum(stack.square().sum((-2, -1), keepdim=True)).sqrt()
