"""Target matrices of equal shape and age, taken through one step together.

Where they are divided among processes, `rows` of a projection are those of this process, see `places`.
A basis is a (columns, rank) matrix, or for random columns the (rank,) indices of the columns themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowrank.optim.adam import adam_moves, bias_gain, decay_factors
from hf_lowrank.optim.places import ALONE, Alone


class Limits(NamedTuple):
    """Elements of gradients.

    Attributes:
        stacked: of the largest matrices that are copied into a stack.
        batch: of all matrices of a batch, which bounds the memory of the stack.
    """

    stacked: int
    batch: int


# A stack saves a kernel for each matrix, and costs the copy. On an accelerator each kernel takes the host ten
# microseconds, and the copy next to nothing. On a CPU a batch of this size stays in the cache from the projection to
# the weights.
ON_CPU, ON_ACCELERATOR = Limits(2**16, 2**20), Limits(2**23, 2**25)


def batch_limits(device: torch.device) -> Limits:
    return ON_CPU if device.type == "cpu" else ON_ACCELERATOR


def project_matrix(
    matrix: Tensor, basis: Tensor, left_basis: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`G Q`, or `Pᵀ G Q` with a left basis: (rows, columns) -> (rows or rank, rank)."""
    if not basis.is_floating_point():
        return torch.index_select(matrix, -1, basis, out=out)
    if left_basis is not None:
        matrix = left_basis.mT @ matrix
    return torch.mm(matrix, basis, out=out)


def row_norms(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Euclidean norms of the rows of an oriented gradient, or of several: (…, rows, columns) -> (…, rows).

    The CPU's norm kernel is many times slower across memory than along it; of a transposed view, squares are summed.
    """
    if matrix.stride(-1) == 1 or matrix.device.type != "cpu":
        return torch.linalg.vector_norm(matrix, dim=-1, dtype=dtype)
    return matrix.to(dtype).square().sum(-1).sqrt_()


def lift_matrix(low: Tensor, basis: Tensor, columns: int, left_basis: Tensor | None = None) -> Tensor:
    """`R Qᵀ`, or `P R Qᵀ` with a left basis: back to (rows, columns)."""
    if not basis.is_floating_point():
        return low.new_zeros(*low.shape[:-1], columns).index_copy_(-1, basis, low)
    if left_basis is not None:
        low = left_basis @ low
    return low @ basis.mT


@dataclass
class Batch:
    """Matrices that share shape, dtype, device, group options and Adam age.

    Attributes:
        group: the options of their parameter group.
        age: which Adam step this is, from 1.
        transposed: whether matrices are oriented by transposing them as they are stored.
        stored_weights, stored_grads: what this process holds, as it is stored.
        bases: one for each matrix, as this process multiplies by them; see the module.
        left_bases: (rows, rank) each, or None.
        exp_avgs, exp_avg_sqs: the moments, of the projected shape.
        limits: 0-dimensional tensors with the residual's last norm, or empty.
        earlier: (k, rows, rank) projections of this step's earlier backward passes, or None.
        place: where the parts of each matrix lie.
    """

    group: dict[str, Any]
    age: int
    transposed: bool
    stored_weights: list[Tensor]
    stored_grads: list[Tensor]
    bases: list[Tensor]
    left_bases: list[Tensor] | None
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    limits: list[Tensor]
    earlier: Tensor | None = None
    place: Alone = ALONE

    def __post_init__(self) -> None:
        self.weights = self._oriented(self.stored_weights)
        limits, count, elements = batch_limits(self.weights[0].device), len(self.weights), self.weights[0].numel()
        dense = self.bases[0].is_floating_point() and self.left_bases is None
        self.stackable = dense and count > 1 and elements <= limits.stacked and count * elements <= limits.batch
        self._lows: Tensor | None = None
        self._stack: Tensor | None = None
        self._stacked_bases: Tensor | None = None

    def _oriented(self, stored: list[Tensor]) -> list[Tensor]:
        return [matrix.mT for matrix in stored] if self.transposed else stored

    @property
    def grads(self) -> list[Tensor]:
        """Oriented views of the gradients, (rows, columns) each."""
        return self._oriented(self.stored_grads)

    @property
    def factors(self) -> tuple[float, float]:
        """`(keep, step)`: `weight ← keep · weight + step · move` with Adam's bias-corrected move."""
        lr = float(self.group["lr"])
        keep, gain = decay_factors(lr, self.group["weight_decay"], self.group["adam_variant"])
        return keep, lr * gain

    @property
    def bias_gain(self) -> float:
        return bias_gain(self.group["betas"], self.age)

    def _stored_stack(self) -> Tensor:
        """A copy of the gradients, stacked as they are stored."""
        if self._stack is None:
            self._stack = torch.stack(self.stored_grads)
        return self._stack

    def _stack_of_bases(self) -> Tensor:
        if self._stacked_bases is None:
            self._stacked_bases = torch.stack(self.bases)
        return self._stacked_bases

    def project(self) -> Tensor:
        """The projected gradients, (k, rows, rank), in the moments' type."""
        if self._lows is None:
            if self.stackable:
                stack = self._stored_stack()
                if not self.limits:  # only what goes outside of the subspace needs the gradients again
                    self._stack = None
                lows = torch.bmm(stack.mT if self.transposed else stack, self._stack_of_bases())
            else:
                lefts: list[Any] = self.left_bases or [None] * len(self.stored_grads)
                grads = self.grads
                rank = self.exp_avgs[0].shape[-1]
                rows = rank if self.left_bases else grads[0].shape[0]
                lows = grads[0].new_empty(len(grads), rows, rank)
                for low, grad, basis, left in zip(lows.unbind(), grads, self.bases, lefts, strict=True):
                    project_matrix(grad, basis, left, out=low)
            self._lows = self.place.projected(lows.to(self.exp_avgs[0].dtype))
            if self.earlier is not None:
                self._lows += self.earlier
        return self._lows

    def moves(self) -> Tensor:
        """Minus Adam's bias-corrected direction of the projected gradients, (k, rows, rank); updates the moments."""
        return adam_moves(
            self.project(),
            self.exp_avgs,
            self.exp_avg_sqs,
            age=self.age,
            betas=self.group["betas"],
            eps=self.group["eps"],
            variant=self.group["adam_variant"],
        )

    def apply_lifted_(self, lows: Tensor, *, keep: float, alpha: float) -> None:
        """`W ← keep · W + alpha · lift(lows)`, without a dense temporary for large matrices."""
        lows = self.place.for_lifting(lows.to(self.weights[0].dtype))
        if self.stackable:
            bases = self._stack_of_bases().to(lows.dtype)
            lifted = torch.bmm(bases, lows.mT) if self.transposed else torch.bmm(lows, bases.mT)
            if keep != 1:
                torch._foreach_mul_(self.stored_weights, keep)
            torch._foreach_add_(self.stored_weights, lifted.unbind(), alpha=alpha)
            return
        for index, (weight, low, basis) in enumerate(zip(self.weights, lows.unbind(), self.bases, strict=True)):
            if not basis.is_floating_point():
                (weight.mul_(keep) if keep != 1 else weight).index_add_(1, basis, low, alpha=alpha)
                continue
            if self.left_bases is not None:
                low = self.left_bases[index].to(low.dtype) @ low  # noqa: PLW2901
            weight.addmm_(low, basis.to(low.dtype).mT, beta=keep, alpha=alpha)

    def residuals(self) -> Iterator[Tensor]:
        """`G − lift(project(G))` of one matrix after the other, (rows, columns)."""
        lows = self.place.for_lifting(self.project())
        lefts: list[Any] = self.left_bases or [None] * len(self.stored_grads)
        for grad, low, basis, left in zip(self.grads, lows.unbind(), self.bases, lefts, strict=True):
            if basis.is_floating_point():
                yield grad - lift_matrix(low.to(grad.dtype), basis, grad.shape[-1], left)
            else:
                yield grad.index_fill(-1, basis, 0)

    def grad_norms(self, dtype: torch.dtype) -> Tensor:
        """The norms of the gradients' rows, (k, rows)."""
        if self.stackable:
            stack = self._stored_stack()
            return self.place.row_norms(row_norms(stack.mT if self.transposed else stack, dtype))
        return self.place.row_norms(torch.stack([row_norms(grad, dtype) for grad in self.grads]))

    def scale_rows_(self, scales: Tensor, *, alpha: float) -> None:
        """`W ← W + alpha · diag(scales) G` with scales (k, rows); the last that a step does."""
        self.add_scaled_gradients_(self.place.for_lifting(scales), alpha=alpha)

    def add_scaled_gradients_(self, scales: Tensor, *, alpha: float) -> None:
        """`scale_rows_` with the scales of all rows that this process holds of each matrix, or with (k, 1)."""
        if self.stackable:
            stack, self._stack = self._stored_stack(), None  # a copy, and used up here
            stack *= (scales[:, None] if self.transposed else scales[..., None]).to(stack.dtype)
            torch._foreach_add_(self.stored_weights, stack.unbind(), alpha=alpha)
            return
        for weight, grad, scale in zip(self.weights, self.grads, scales.unbind(), strict=True):
            weight.addcmul_(grad, scale[:, None].to(grad.dtype), value=alpha)
