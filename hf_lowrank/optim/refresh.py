"""Choosing new bases for the parameters that are due.

A matrix that is divided among processes is handed round: one process, another for each matrix, gets it whole, chooses,
and gives every process its rows of the basis. No process holds more than the matrices of its turn, and only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowrank.optim.base import Entry
from hf_lowrank.optim.matrices import Layout
from hf_lowrank.optim.places import Cut
from hf_lowrank.optim.sharding import Sharding, local_part
from hf_lowrank.optim.subspaces import (
    FROM_THE_LAST,
    OF_GRADIENTS,
    OF_INDICES,
    SUBSPACES,
    UNSTORED,
    Request,
    exact_bases,
)

SIDES = ("basis", "left_basis")
Bases = dict[str, Tensor]


class Due(NamedTuple):
    """A parameter that gets a new basis."""

    entry: Entry
    layout: Layout
    state: dict[str, Any]

    @property
    def subspace(self) -> str:
        return str(self.entry.group["subspace"])

    @property
    def sides(self) -> tuple[str, ...]:
        """The state's keys of what is chosen."""
        if self.subspace == UNSTORED:
            return ()
        return SIDES if self.layout.both else SIDES[:1]

    @property
    def last(self) -> dict[str, Tensor]:
        """The bases in use, by side; none before the first choice counts."""
        return {side: self.state[side] for side in self.sides if side in self.state and self.state["refreshes"]}

    def whole_shape(self, side: str) -> tuple[int, ...]:
        """Shape of the basis of one whole matrix."""
        if self.subspace in OF_INDICES:
            return (self.layout.rank,)
        return (self.layout.columns if side == "basis" else self.layout.rows, self.layout.rank)


def choose_bases(due: Sequence[Due]) -> list[Bases]:
    """The new bases of each, as its state keeps them."""
    found: list[Bases] = [{} for _ in due]
    divided: dict[tuple[Any, ...], list[int]] = {}
    for number, one in enumerate(due):
        sharding = one.layout.sharding
        if sharding is not None and isinstance(one.layout.place, Cut):
            if one.sides:
                key = (id(sharding.group), one.subspace, one.layout.both, one.entry.grad.dtype, one.entry.grad.device)
                divided.setdefault(key, []).append(number)
        else:
            found[number] = _choose_held(one)
    whole = [bases for one, bases in zip(due, found, strict=True) if one.layout.sharding is None]
    if whole and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for bases in whole:
            for basis in bases.values():  # decompositions may differ in their last bits between machines
                dist.broadcast(basis, src=0)
    for numbers in divided.values():
        sharding = due[numbers[0]].layout.sharding
        assert sharding is not None
        for start in range(0, len(numbers), sharding.size):
            turn = numbers[start : start + sharding.size]
            for number, bases in zip(turn, _choose_divided([due[i] for i in turn], sharding), strict=True):
                found[number] = bases
    return found


def _choose_held(due: Due) -> Bases:
    """The bases of matrices that this process holds whole: of a plain parameter, or of its part of a stack."""
    entry, layout, _ = due
    numbers = layout.numbers
    last = {side: layout.parts(due.last[side]) if side in due.last else [None] * len(numbers) for side in SIDES}
    chosen = [
        _choose(due, matrix, number, {side: parts[place] for side, parts in last.items()})
        for place, (matrix, number) in enumerate(zip(layout.matrices(entry.grad), numbers, strict=True))
    ]
    if not layout.stacked:
        return chosen[0]
    bases = {}
    for side in due.sides:
        shape = (len(numbers), *due.whole_shape(side))
        dtype = torch.int64 if due.subspace in OF_INDICES else entry.weight.dtype
        stack = torch.empty(shape, dtype=dtype, device=entry.weight.device)
        for part, own in zip(stack, chosen, strict=True):
            part.copy_(own[side])
        if layout.sharding is not None:
            layout.sharding.settle_replicas([stack])
            stack = layout.sharding.tensor(stack, (layout.count, *shape[1:]))
        bases[side] = stack
    return bases


def _choose_divided(turn: Sequence[Due], sharding: Sharding) -> list[Bases]:
    """The bases of as many divided matrices as there are processes, each chosen by one of them."""
    owners = [due.layout.index % sharding.size for due in turn]
    stored = [
        matrix.mT if due.layout.transposed else matrix
        for due in turn
        for matrix in due.layout.matrices(due.entry.grad)
    ]
    lengths = [due.layout.columns if due.layout.transposed else due.layout.rows for due in turn]
    grads = sharding.to_owners(stored, owners, lengths)
    last: dict[int, dict[str, Tensor | None]] = {number: dict.fromkeys(SIDES) for number in grads}
    for side in turn[0].sides if turn[0].subspace in FROM_THE_LAST else ():
        held = [number for number, due in enumerate(turn) if side in due.last]
        if held:
            wholes = sharding.to_owners(
                [local_part(turn[number].last[side]) for number in held],
                [owners[number] for number in held],
                [turn[number].whole_shape(side)[0] for number in held],
            )
            for place, basis in wholes.items():
                last[held[place]][side] = basis
    chosen = {
        number: _choose(turn[number], grad.mT if turn[number].layout.transposed else grad, None, last[number])
        for number, grad in grads.items()
    }
    bases: list[Bases] = [{} for _ in turn]
    for side in turn[0].sides:
        shapes = [due.whole_shape(side) for due in turn]
        like = turn[0].entry.weight
        if turn[0].subspace in OF_INDICES:
            like = like.new_empty(0, dtype=torch.int64)
        parts = sharding.from_owners({n: own[side] for n, own in chosen.items()}, owners, shapes, like)
        for of_one, part, shape in zip(bases, parts, shapes, strict=True):
            of_one[side] = sharding.tensor(part.clone(), shape)  # not a view of the exchange
    return bases


def _choose(due: Due, matrix: Tensor, number: int | None, last: dict[str, Tensor | None]) -> Bases:
    """The basis of one whole oriented matrix, and the left one where both sides are projected, in the weight's type.

    Args:
        number: the matrix's own among the optimizer's; None where its parameter holds no other.
        last: the bases in use before.
    """
    layout, group = due.layout, due.entry.group
    if due.subspace == UNSTORED:
        return {}
    kept = {side: basis.clone() for side in due.sides if (basis := last[side]) is not None}
    if kept and due.subspace in OF_GRADIENTS and not matrix.any():  # of a stack whose others have gradients
        return kept
    request = Request(
        grad=matrix,
        rank=layout.rank,
        transposed=layout.transposed,
        previous=last["basis"],
        key=(group["seed"], layout.index if number is None else number, due.state["refreshes"]),
    )
    choose = SUBSPACES[due.subspace]
    if not layout.both:
        bases: tuple[Tensor, ...] = (choose(request),)
    elif due.subspace == "svd":
        bases = exact_bases(request)
    else:
        other = replace(
            request,
            grad=matrix.mT,
            transposed=not layout.transposed,
            previous=last["left_basis"],
            key=(*request.key, 1),
        )
        bases = (choose(request), choose(other))
    dtype = due.entry.weight.dtype
    return {
        side: (basis.to(dtype) if basis.is_floating_point() else basis).clone(memory_format=torch.contiguous_format)
        for side, basis in zip(due.sides, bases, strict=True)
    }
