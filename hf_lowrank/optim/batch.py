"""The verbs of a step, for several target matrices of equal shape and age at once: project, adam, lift and add.

A batch holds oriented matrices (see `layout`), and for sharded ones this process's part of them (see `sharding`).
A basis is a (columns, rank) matrix, or for random columns the (rank,) indices of those columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowrank.compat import foreach_add_, foreach_copy_, foreach_mul_
from hf_lowrank.optim.adam import Number, adamw_, decay_factors, rate
from hf_lowrank.optim.entries import Entry
from hf_lowrank.optim.layout import Layout, stored_in
from hf_lowrank.optim.products import add_product_, product


class BatchLimits(NamedTuple):
    """Numbers of gradient elements.

    Attributes:
        stacked: of the largest matrices that are copied into a stack.
        batch: of all matrices of a batch, which bounds the memory of the stack.
    """

    stacked: int
    batch: int


# A stack saves a kernel per matrix and costs the copy. On an accelerator each kernel takes the host ten microseconds,
# and the copy next to nothing. On a CPU a batch of this size stays in the cache from the projection to the weights.
ON_CPU, ON_ACCELERATOR = BatchLimits(2**16, 2**20), BatchLimits(2**23, 2**26)


def batch_limits(device: torch.device) -> BatchLimits:
    return ON_CPU if device.type == "cpu" else ON_ACCELERATOR


class Batch:
    """Target matrices that share shape, dtype, device, group and age.

    Args:
        entries: their parameters, whose step is counted already.

    Attributes:
        entries: the same.
        group: the options of their parameter group.
        age: which Adam step this is, from 1.
        partition: how each matrix is split among processes.
        lr: the learning rate, as it multiplies the update; a tensor where the group's is one on a device.
        keep: what decoupled weight decay multiplies the weight by: `W ← keep · W − lr · update`.
        finite: on a device whose values the host does not read, which matrices have finite gradients, (k,): the
            others, and their states, stay as they are. None where the host knows that all have.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        first = entries[0]
        self.entries, self.group, self.age = entries, first.group, first.age
        self.partition, self._transposed = first.layout.partition, first.layout.transposed
        self.finite = None
        if first.finite is not None:
            flags = torch.stack([entry.finite for entry in entries if entry.finite is not None])
            self.finite = flags.repeat_interleave(len(first.layout.held_indices)) if first.layout.stacked else flags
        lr = float(self.group["lr"]) if self.finite is None else rate(self.group)
        self.keep, gain = decay_factors(lr, self.group["weight_decay"], self.group["adam_variant"])
        self.lr = lr * gain
        self._updated = [entry.wide_weight() for entry in entries]
        self._stored_weights = [
            view
            for entry, weight in zip(entries, self._updated, strict=True)
            for view in stored_in(entry.layout, weight, entry.info.name)
        ]
        self._stored_grads = [view for entry in entries for view in entry.layout.stored(entry.grad)]
        self._views: dict[str, list[Tensor]] = {}
        self._decoded: dict[str, list[Tensor]] = {}

    def _oriented(self, stored: list[Tensor]) -> list[Tensor]:
        return [matrix.mT for matrix in stored] if self._transposed else stored

    @cached_property
    def weights(self) -> list[Tensor]:
        """Oriented views (rows, columns) of the weights, to be updated in place."""
        return self._oriented(self._stored_weights)

    @property
    def grads(self) -> list[Tensor]:
        """Oriented views of the gradients, (rows, columns) each."""
        return self._oriented(self._stored_grads)

    def state(self, key: str) -> list[Tensor]:
        """A declared state tensor of each matrix, to be updated in place; this process's part of it."""
        if key not in self._views:
            declared = self.entries[0].declared(key)
            tensors = [declared.read(entry.state, key) for entry in self.entries]
            if declared.quantized and self.group["state_dtype"] == "8bit":
                self._decoded[key] = tensors
            views = Layout.matrices if declared.shape is None else Layout.parts
            pairs = zip(self.entries, tensors, strict=True)
            self._views[key] = [view for entry, tensor in pairs for view in views(entry.layout, tensor)]
        return self._views[key]

    def where_finite(self, values: Tensor, others: Tensor | float) -> Tensor:
        """`values` (k, …) for the matrices with finite gradients, `others` for the rest."""
        if self.finite is None:
            return values
        return torch.where(self.finite.view(-1, *[1] * (values.ndim - 1)), values, others)

    # All matrices in one stack

    def stack(self, stored: Sequence[Tensor]) -> Tensor:
        """An oriented copy, (k, rows, columns), of matrices as they are stored."""
        stack = torch.stack(list(stored))
        return stack.mT if self._transposed else stack

    def unstack(self, stack: Tensor) -> tuple[Tensor, ...]:
        """The matrices of an oriented stack, as they are stored."""
        return (stack.mT if self._transposed else stack).unbind()

    def stacked_gradients(self, dtype: torch.dtype) -> Tensor:
        """The oriented gradients in one stack; zeros for those that are not finite."""
        return self.where_finite(self.stack(self._stored_grads).to(dtype), 0)

    def move_(self, directions: Tensor, factor: float = 1.0) -> None:
        """`W ← keep · W − lr · factor · directions`, of an oriented stack."""
        weights, rate = self._stored_weights, self.lr * factor
        directions = directions.to(weights[0].dtype)
        if isinstance(rate, float) and self.finite is None:
            if self.keep != 1:
                foreach_mul_(weights, self.keep)
            foreach_add_(weights, self.unstack(directions), alpha=-rate)
            return
        moves = directions * rate
        if self.group["weight_decay"]:
            moves += (1 - self.keep) * self.stack(weights)
        foreach_add_(weights, self.unstack(self.where_finite(moves, 0)), alpha=-1)

    def finish(self) -> None:
        """Writes back the weights and states that were updated in copies."""
        for key, tensors in self._decoded.items():
            for entry, tensor in zip(self.entries, tensors, strict=True):
                entry.write(key, tensor)
        for entry, weight in zip(self.entries, self._updated, strict=True):
            entry.write_weight(weight)  # one that was updated in place is left as it is


class ProjectedBatch(Batch):
    """A batch whose matrices have subspaces.

    Args:
        bases: one per matrix, as this process multiplies by them.
        left_bases: (rows, rank) each, or None.
        accumulated: (k, rows, rank) projections of this step's earlier backward passes, or None.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        bases: list[Tensor],
        left_bases: list[Tensor] | None = None,
        accumulated: Tensor | None = None,
    ) -> None:
        super().__init__(entries)
        self._bases, self._left_bases, self._accumulated = bases, left_bases, accumulated
        stored = self._stored_weights[0]
        limits, count, elements = batch_limits(stored.device), len(self._stored_weights), stored.numel()
        self.stacks = count > 1 and elements <= limits.stacked and count * elements <= limits.batch
        self._by_index = not bases[0].is_floating_point()
        self._low: Tensor | None = None
        self._stacked_grads: Tensor | None = None

    @property
    def bias_gain(self) -> float:
        """What bias correction multiplies `M / (sqrt(V) + ε)` by: `sqrt(1-β2^t) / (1-β1^t)`."""
        beta1, beta2 = self.group["betas"]
        return math.sqrt(1 - beta2**self.age) / (1 - beta1**self.age)

    # The verbs

    def project(self, *, keep_stack: bool = False) -> Tensor:
        """The projected gradients, (k, rows, rank), in the type of the moments.

        Args:
            keep_stack: whether a stacked copy of the gradients stays in memory for `grad_norms`, `add_residuals_` and
                `add_scaled_gradients_`.
        """
        if self._low is None:
            low = self._project_stack(keep_stack) if self.stacks else self._project_each()
            low = self.partition.projected(low.to(self.state("exp_avg")[0].dtype))
            if self._accumulated is not None:
                low += self._accumulated
            self._low = self.where_finite(low, 0)
        return self._low

    def adam(self, low: Tensor) -> Tensor:
        """Adam's bias-corrected direction of projected gradients, (k, rows, rank); updates the moments.

        A fused step of a zero weight at learning rate −1 computes it in one pass.
        """
        direction = torch.zeros_like(low)
        moments = [self.state(key) for key in ("exp_avg", "exp_avg_sq")]
        # Where some may have to stay as they are, the step is made on copies.
        stepped = [[torch.stack(moment)] if self.finite is not None else moment for moment in moments]
        adamw_(
            [direction] if self.finite is not None else direction.unbind(),
            [low] if self.finite is not None else low.unbind(),
            stepped[0],
            stepped[1],
            age=self.age,
            lr=-1.0,
            betas=self.group["betas"],
            eps=self.group["eps"],
            weight_decay=0.0,
            variant=self.group["adam_variant"],
        )
        if self.finite is None:
            return direction
        for moment, (after,) in zip(moments, stepped, strict=True):
            foreach_copy_(moment, self.where_finite(after, torch.stack(moment)).unbind())
        return self.where_finite(direction, 0)

    def decay_(self) -> None:
        """`W ← keep · W`, for methods that do not lift."""
        if self._decays_alike:
            foreach_mul_(self._stored_weights, self.keep)
        elif self._lost is not None and self.stacks:
            foreach_add_(self._stored_weights, (torch.stack(self._stored_weights) * self._lost).unbind(), alpha=-1)
        elif self._lost is not None:
            for weight, lost in zip(self._stored_weights, self._lost.unbind(), strict=True):
                weight.mul_(1 - lost)

    def lift_and_add_(self, low: Tensor, alpha: Number) -> None:
        """`W ← keep · W + alpha · lift(low)`, without a dense temporary for large matrices."""
        low, alpha = self._with_rate(low, alpha)
        low = self.partition.for_lifting(low.to(self._stored_weights[0].dtype))
        if self.stacks:
            self.decay_()
            foreach_add_(self._stored_weights, self._lift_stack(low).unbind(), alpha=alpha)
            return
        keep = 1.0
        if self.finite is None and not isinstance(self.keep, Tensor):
            keep = self.keep
        else:
            self.decay_()
        for weight, one, basis, left in zip(self.weights, low.unbind(), self._bases, self._lefts, strict=True):
            if self._by_index:
                (weight.mul_(keep) if keep != 1 else weight).index_add_(1, basis, one, alpha=alpha)
                continue
            rows = one if left is None else left.to(one.dtype) @ one
            add_product_(weight, rows, basis.to(one.dtype).mT, keep=keep, factor=alpha)

    def add_residuals_(self, rule: Callable[[Tensor], Tensor], alpha: Number) -> None:
        """`W ← W + alpha · rule(G − lift(project(G)))`; the last use of G.

        Args:
            rule: of single values; may change its argument in place.
        """
        low = self.partition.for_lifting(self.project())
        if self.stacks:
            stack, self._stacked_grads = self._stack_of_grads(), None  # a copy, and used up here
            oriented = stack.mT if self._transposed else stack
            if self._by_index:
                outside = stack
                oriented.scatter_(2, self._index_of(oriented), 0)
            else:
                outside = stack.sub_(self._lift_stack(low.to(stack.dtype)))
            moves, alpha = self._with_rate(self.where_finite(rule(outside), 0), alpha)
            foreach_add_(self._stored_weights, moves.unbind(), alpha=alpha)
            return
        flags = [None] * len(self.weights) if self.finite is None else self.finite.unbind()
        for weight, residual, flag in zip(self.weights, self._residuals(low), flags, strict=True):
            move = rule(residual)
            move, factor = self._with_rate(move if flag is None else torch.where(flag, move, 0), alpha)
            weight.add_(move, alpha=factor)

    def lifted_squares(self, low: Tensor, squares: Tensor) -> Tensor:
        """`‖lift(r)‖²` of each row r of `low`, (k, rows), whose own squared norms are `squares`.

        A basis that is stored in a few bits is not quite orthonormal. For unsharded matrices, as such bases are.
        """
        if self.group["projection_bits"] is None:
            return squares
        wide = low.to(squares.dtype)
        if self.stacks:
            bases = self._stack_of_bases.to(squares.dtype)
            products = bases.mT @ bases
        else:  # one wide copy of a basis at a time
            products = torch.stack([basis.mT @ basis for basis in (one.to(squares.dtype) for one in self._bases)])
        return ((wide @ products) * wide).sum(-1)

    def grad_norms(self, dtype: torch.dtype) -> Tensor:
        """The norms of the gradients' rows, (k, rows)."""
        if self.stacks:
            stack = self._stack_of_grads()
            norms = row_norms(stack.mT if self._transposed else stack, dtype)
        else:
            norms = torch.stack([row_norms(grad, dtype) for grad in self.grads])
        return self.where_finite(self.partition.row_norms(norms), 0)

    def add_scaled_gradients_(self, scales: Tensor, alpha: Number) -> None:
        """`W ← W + alpha · scales · G`, with a scale per row (k, rows) or per matrix (k,); the last use of G."""
        scales, alpha = self._with_rate(scales, alpha)
        scales = self.partition.for_lifting(scales) if scales.ndim == 2 else scales.unsqueeze(-1)
        is_half = self._stored_grads[0].dtype == torch.float16  # whose range ends below many a scale
        if self.stacks and not is_half:
            stack, self._stacked_grads = self._stack_of_grads(), None  # a copy, and used up here
            stack *= scales.unsqueeze(1 if self._transposed else -1).to(stack.dtype)
            if self.finite is not None:
                stack.masked_fill_(self.finite.logical_not().view(-1, 1, 1), 0)
            foreach_add_(self._stored_weights, stack.unbind(), alpha=alpha)
            return
        flags = [None] * len(self.weights) if self.finite is None else self.finite.unbind()
        for weight, grad, scale, flag in zip(self.weights, self.grads, scales.unbind(), flags, strict=True):
            own = grad if flag is None else torch.where(flag, grad, 0)
            if is_half:
                weight.add_((alpha * scale.unsqueeze(-1) * own).to(weight.dtype))
            else:
                weight.addcmul_(own, scale.unsqueeze(-1).to(grad.dtype), value=alpha)

    # Decay and rates

    @property
    def _decays_alike(self) -> bool:
        """Whether all weights decay, by one factor."""
        return self.finite is None and (isinstance(self.keep, Tensor) or self.keep != 1)

    @property
    def _lost(self) -> Tensor | None:
        """What decay takes from each weight, (k, 1, 1), where it depends on whether gradients are finite."""
        if self.finite is None or (not isinstance(self.keep, Tensor) and self.keep == 1):
            return None
        return ((1 - self.keep) * self.finite).view(-1, 1, 1).to(self._stored_weights[0].dtype)

    @staticmethod
    def _with_rate(values: Tensor, alpha: Number) -> tuple[Tensor, float]:
        """A factor that is a tensor goes into the values: kernels take numbers alone."""
        return (values * alpha, 1.0) if isinstance(alpha, Tensor) else (values, alpha)

    # Stacks

    @property
    def _lefts(self) -> Sequence[Tensor | None]:
        return self._left_bases or [None] * len(self._bases)

    @cached_property
    def _stack_of_bases(self) -> Tensor:
        return torch.stack(self._bases)

    def _index_of(self, dense: Tensor) -> Tensor:
        """The chosen columns, expanded to the rows of `dense`, (k, rows, rank)."""
        return self._stack_of_bases.unsqueeze(1).expand(-1, dense.shape[1], -1)

    def _project_stack(self, keep_stack: bool) -> Tensor:
        stack = self._stack_of_grads()
        if not keep_stack:
            self._stacked_grads = None
        oriented = stack.mT if self._transposed else stack
        if self._by_index:
            return oriented.gather(2, self._index_of(oriented))
        if self._left_bases is not None:
            oriented = torch.bmm(torch.stack(self._left_bases).mT, oriented)
        return torch.bmm(oriented, self._stack_of_bases)

    def _lift_stack(self, low: Tensor) -> Tensor:
        """The lifted matrices, as they are stored."""
        if self._by_index:
            columns = self.entries[0].layout.columns
            lifted = low.new_zeros(*low.shape[:2], columns).scatter_(2, self._index_of(low), low)
            return lifted.mT if self._transposed else lifted
        if self._left_bases is not None:
            low = torch.bmm(torch.stack(self._left_bases).to(low.dtype), low)
        bases = self._stack_of_bases.to(low.dtype)
        return torch.bmm(bases, low.mT) if self._transposed else torch.bmm(low, bases.mT)

    def _project_each(self) -> Tensor:
        grads, rank = self.grads, self.entries[0].layout.rank
        rows = rank if self._left_bases else grads[0].shape[0]
        low = grads[0].new_empty(len(grads), rows, rank)
        for one, grad, basis, left in zip(low.unbind(), grads, self._bases, self._lefts, strict=True):
            project_matrix(grad, basis, left, out=one)
        return low

    def _residuals(self, low: Tensor) -> Iterator[Tensor]:
        """`G − lift(low)` of one matrix after the other, (rows, columns)."""
        for grad, one, basis, left in zip(self.grads, low.unbind(), self._bases, self._lefts, strict=True):
            if self._by_index:
                yield grad.index_fill(-1, basis, 0)
            else:
                rows = one.to(grad.dtype) if left is None else left @ one.to(grad.dtype)
                yield grad - product(rows, basis.mT)

    def _stack_of_grads(self) -> Tensor:
        """A copy of the gradients, stacked as they are stored."""
        if self._stacked_grads is None:
            self._stacked_grads = torch.stack(self._stored_grads)
        return self._stacked_grads


def project_matrix(
    matrix: Tensor, basis: Tensor, left_basis: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`G Q`, or `Pᵀ G Q` with a left basis: (rows, columns) -> (rows or rank, rank)."""
    if not basis.is_floating_point():
        return torch.index_select(matrix, -1, basis, out=out)
    return product(matrix if left_basis is None else product(left_basis.mT, matrix), basis, out=out)


def row_norms(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Euclidean norms of the rows of an oriented gradient, or of several: (…, rows, columns) -> (…, rows).

    The CPU's norm kernel is many times slower across memory than along it; a transposed view's squares are summed.
    """
    if matrix.stride(-1) == 1 or matrix.device.type != "cpu":
        return torch.linalg.vector_norm(matrix, dim=-1, dtype=dtype)
    return matrix.to(dtype).square().sum(-1).sqrt_()
