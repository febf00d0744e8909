"""LDAdam (arXiv 2410.16103): Adam in a subspace that follows the gradient at each step, with error feedback."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.compat import foreach_copy_
from hf_lowrank.optim.adam import rotated_moments
from hf_lowrank.optim.base import Declared, Params
from hf_lowrank.optim.batch import Batch
from hf_lowrank.optim.entries import Entry
from hf_lowrank.optim.layout import Layout
from hf_lowrank.optim.methods import LDAdamSettings
from hf_lowrank.optim.orthogonal import orthonormal_columns
from hf_lowrank.optim.ranked import RankedAdamW
from hf_lowrank.optim.refresh import basis_state, choose_first
from hf_lowrank.optim.state import StateTensor, adam_moments


class LDAdamW(RankedAdamW):
    """LDAdam: `W ← (1 − η·wd) W − η · lift(m̂ / (√v̂ + ε))` of `A = G + E`, in a basis that moves at each step.

    The basis is the leading subspace of the first gradient, and then that of `ρ · lift(m̂) + (1 − ρ) A` by one power
    iteration. The moments are turned into it, and the error E keeps what it cannot hold: of A, and of the momentum.
    A direction in which that matrix is zero to rounding keeps its basis vector.

    Longer sides are kept; a square matrix is projected on its left. Sharded matrices stay sharded, error included, and
    only products of rank r are sent.

    Args:
        params: a model (its target modules become targets), groups, or parameters. Groups with a `rank` are targets;
            those with `rank=None` get AdamW, with the same `betas` and `eps`.
        lr, betas, eps, weight_decay: as in AdamW; weight decay is decoupled and acts on the whole weight.
        rank: r, at most the shorter side of each matrix.
        target_modules, target_parameters: which linear layers, and which further parameters, are targets when
            `params` is a model, see `param_groups`.
        subspace: how the first basis is chosen: `svd` (exact) or `randomized` (subspace iteration).
        rho: ρ, the weight of the momentum in what the basis follows.
        error_feedback: whether there is an E, of the size of the weight; otherwise it is zero.
        matrix: how parameters of other than two dimensions are seen, see `make_layout`.

    The other arguments are those of `ProjectedAdamW`.

    Raises:
        UserError: an option is out of range, a rank does not fit a matrix, or a target is a vector; names it.
    """

    settings = LDAdamSettings
    heeds_flags = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        target_modules: str | Sequence[str] = "auto",
        target_parameters: Sequence[str] = (),
        matrix: str = "auto",
        seed: int = 0,
        layerwise: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            options,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            target_modules=target_modules,
            target_parameters=target_parameters,
            matrix=matrix,
            adam_variant="torch",
            seed=seed,
            layerwise=layerwise,
        )

    def side(self, group: Mapping[str, Any]) -> str:
        return "std_left"

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        error = {"error": StateTensor(shape=layout.stored_shape, quantized="signed")}
        return {
            "refreshes": 0,
            "reset_at": 0,
            **adam_moments(*layout.low_shape),
            **basis_state(group["subspace"], layout),
            **(error if group["error_feedback"] else {}),
        }

    def describe(self, group: Mapping[str, Any], layout: Layout) -> str:
        feedback = "with" if group["error_feedback"] else "without"
        return f"LDAdam, rank {layout.rank}, {'left' if layout.transposed else 'right'}, {feedback} error feedback"

    def refresh(self, entries: Sequence[Entry]) -> None:
        choose_first(entries)

    def update(self, batch: Batch) -> None:
        group, partition, age = batch.group, batch.partition, batch.age
        (beta1, beta2), kept = group["betas"], batch.state("basis")
        moments = [batch.state(key) for key in ("exp_avg", "exp_avg_sq")]
        dtype = torch.promote_types(moments[0][0].dtype, torch.float32)
        A = batch.stacked_gradients(dtype)
        if group["error_feedback"]:
            last_error = batch.stack(batch.state("error"))
            A = A + last_error.to(dtype)

        last = torch.stack(partition.bases(kept)).to(dtype)
        last_mean, last_square = (torch.stack(moment).to(dtype) for moment in moments)
        Q, mean, square = last, last_mean, last_square
        if age > 1:
            Q, mean, square = follow(A, last, mean, square, batch)

        low = partition.projected(A @ Q)
        if group["error_feedback"]:
            lost = beta1 / (1 - beta1)  # the steps to come that a momentum stands for
            outside = torch.baddbmm(A, partition.for_lifting(low + lost * mean), Q.mT, alpha=-1)
            outside.baddbmm_(partition.for_lifting(last_mean), last.mT, alpha=lost)
            error = batch.where_finite(outside.to(last_error.dtype), last_error)
            foreach_copy_(batch.state("error"), batch.unstack(error))
        mean = torch.lerp(mean, low, 1 - beta1)
        square = torch.lerp(square, low.square(), 1 - beta2)
        direction = mean / (1 - beta1**age) / ((square / (1 - beta2**age)).sqrt() + group["eps"])
        batch.move_(partition.for_lifting(direction) @ Q.mT)

        foreach_copy_(moments[0], batch.where_finite(mean, last_mean).unbind())
        foreach_copy_(moments[1], batch.where_finite(square, last_square).unbind())
        foreach_copy_(kept, partition.own_basis_rows(batch.where_finite(Q, last)).unbind())


def follow(A: Tensor, last: Tensor, mean: Tensor, square: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The next bases, and the moments in them, of stacks (k, rows, columns), (k, columns, rank), (k, rows, rank).

    One power iteration `Bᵀ(B Q)` on `B = ρ · lift(m̂) + (1 − ρ) A`, of which no more than its products is formed.
    """
    partition, transposed = batch.partition, batch.entries[0].layout.transposed
    betas, age, rho = batch.group["betas"], batch.age - 1, batch.group["rho"]
    expected = rho / (1 - betas[0] ** age) * mean
    products = expected + (1 - rho) * partition.projected(A @ last)

    def over_columns(values: Tensor) -> Tensor:
        """The sum over processes that hold different columns of A."""
        return partition.sum(values) if transposed else values

    inside = over_columns(expected.mT @ products)
    moved = (1 - rho) * (A.mT @ partition.for_lifting(products)) + last @ inside
    if not transposed:  # a sum over processes that hold different rows of A
        moved = partition.sum(moved)
    Q = orthonormal_columns(moved, over_columns, toward=last)
    turn = over_columns(last.mT @ Q)
    return Q, *rotated_moments(mean, square, turn, None, age=age, betas=betas)
