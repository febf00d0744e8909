"""Choosing new bases for the targets whose subspaces are due.

A matrix that is sharded is sent whole to one process, a different one for each matrix, which chooses the basis and
gives every process its rows of it. No process holds more than one round of whole matrices at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowrank.optim.entries import Entry
from hf_lowrank.optim.layout import Layout, RowSharded
from hf_lowrank.optim.sharding import Sharding, local_part
from hf_lowrank.optim.state import StateTensor
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


def basis_state(subspace: str, layout: Layout) -> dict[str, StateTensor]:
    """The state tensors that hold the bases of a subspace; a refresh creates them."""
    if subspace == UNSTORED:
        return {}
    if subspace in OF_INDICES:
        return {"basis": StateTensor(shape=(layout.rank,), dtype=torch.int64, initial=None)}
    lengths = {"basis": layout.columns, **({"left_basis": layout.rows} if layout.both else {})}
    return {
        side: StateTensor(shape=(length, layout.rank), dtype="parameter", initial=None)
        for side, length in lengths.items()
    }


def choose_bases(due: Sequence[Entry]) -> list[Bases]:
    """New bases for each target, as its state holds them."""
    found: list[Bases] = [{} for _ in due]
    sharded: dict[tuple[Any, ...], list[int]] = {}
    for number, entry in enumerate(due):
        sharding = entry.layout.sharding
        if sharding is None or not isinstance(entry.layout.partition, RowSharded):
            found[number] = _choose_held(entry)
        elif _shapes(entry):
            subspace, grad = entry.group["subspace"], entry.grad
            key = (id(sharding.group), subspace, entry.layout.both, grad.dtype, grad.device)
            sharded.setdefault(key, []).append(number)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for entry, bases in zip(due, found, strict=True):
            if entry.layout.sharding is None:
                for basis in bases.values():  # decompositions may differ in their last bits between machines
                    dist.broadcast(basis, src=0)
    for numbers in sharded.values():
        sharding = due[numbers[0]].layout.sharding
        assert sharding is not None
        for start in range(0, len(numbers), sharding.size):
            chunk = numbers[start : start + sharding.size]
            for number, bases in zip(chunk, _choose_sharded([due[i] for i in chunk], sharding), strict=True):
                found[number] = bases
    return found


def _shapes(entry: Entry) -> dict[str, tuple[int, ...]]:
    """The shape of one matrix's basis, by side; none for a subspace that is not stored."""
    return {side: entry.declared(side).shape or () for side in SIDES if side in entry.info.declared}


def _last(entry: Entry) -> Bases:
    """The bases in use, by side; none before a first choice has counted."""
    return {side: entry.state[side] for side in _shapes(entry) if side in entry.state and entry.state["refreshes"]}


def _choose_held(entry: Entry) -> Bases:
    """The bases of matrices that this process holds whole: of an unsharded parameter, or its part of a stack."""
    layout, indices, last = entry.layout, entry.layout.held_indices, _last(entry)
    parts = {side: layout.parts(local_part(basis)) for side, basis in last.items()}
    chosen = [
        _choose(entry, matrix, index, {side: of_side[number] for side, of_side in parts.items()})
        for number, (matrix, index) in enumerate(zip(layout.matrices(entry.grad), indices, strict=True))
    ]
    if not layout.stacked:
        return chosen[0]
    bases = {}
    for side, shape in _shapes(entry).items():
        dtype = entry.declared(side).dtype_for(entry.weight, "parameter")
        stack = torch.empty((len(indices), *shape), dtype=dtype, device=entry.weight.device)
        for part, own in zip(stack, chosen, strict=True):
            part.copy_(own[side])
        if layout.sharding is not None:
            layout.sharding.synchronize_replicas([stack])
            stack = layout.sharding.tensor(stack, (layout.count, *shape))
        bases[side] = stack
    return bases


def _choose_sharded(targets: Sequence[Entry], sharding: Sharding) -> list[Bases]:
    """The bases of as many sharded matrices as there are processes, each chosen by one of them."""
    owners = [entry.layout.first_index % sharding.size for entry in targets]
    transposed = [entry.layout.transposed for entry in targets]
    stored = [view for entry in targets for view in entry.layout.stored(entry.grad)]
    lengths = [entry.layout.columns if entry.layout.transposed else entry.layout.rows for entry in targets]
    grads = sharding.to_owners(stored, owners, lengths)
    last: dict[int, Bases] = {number: {} for number in grads}
    for side in _shapes(targets[0]) if targets[0].group["subspace"] in FROM_THE_LAST else ():
        held = [number for number, entry in enumerate(targets) if side in _last(entry)]
        if held:
            wholes = sharding.to_owners(
                [local_part(_last(targets[number])[side]) for number in held],
                [owners[number] for number in held],
                [_shapes(targets[number])[side][0] for number in held],
            )
            for number, basis in wholes.items():
                last[held[number]][side] = basis
    chosen = {
        number: _choose(targets[number], grad.mT if transposed[number] else grad, None, last[number])
        for number, grad in grads.items()
    }
    bases: list[Bases] = [{} for _ in targets]
    for side in _shapes(targets[0]):
        shapes = [_shapes(entry)[side] for entry in targets]
        dtype = targets[0].declared(side).dtype_for(targets[0].weight, "parameter")
        like = targets[0].weight.new_empty(0, dtype=dtype)
        parts = sharding.from_owners({n: own[side] for n, own in chosen.items()}, owners, shapes, like)
        for of_one, part, shape in zip(bases, parts, shapes, strict=True):
            of_one[side] = sharding.tensor(part.clone(), shape)  # not a view of the exchanged buffer
    return bases


def _choose(entry: Entry, matrix: Tensor, index: int | None, last: Mapping[str, Tensor]) -> Bases:
    """The bases of one whole oriented matrix, by side, in the type of the weight.

    Args:
        index: the matrix's among all of the optimizer's; None for the only one of its parameter.
        last: the bases in use.
    """
    layout, group, sides = entry.layout, entry.group, list(_shapes(entry))
    if not sides:
        return {}
    if last and group["subspace"] in OF_GRADIENTS and not matrix.any():  # in a stack whose others have gradients
        return {side: basis.clone() for side, basis in last.items()}
    request = Request(
        grad=matrix,
        rank=layout.rank,
        transposed=layout.transposed,
        previous=last.get("basis"),
        key=(group["seed"], layout.first_index if index is None else index, entry.state["refreshes"]),
    )
    choose = SUBSPACES[group["subspace"]]
    if not layout.both:
        bases: tuple[Tensor, ...] = (choose(request),)
    elif group["subspace"] == "svd":
        bases = exact_bases(request)
    else:
        other = replace(
            request,
            grad=matrix.mT,
            transposed=not layout.transposed,
            previous=last.get("left_basis"),
            key=(*request.key, 1),
        )
        bases = (choose(request), choose(other))
    return {
        side: basis.to(entry.declared(side).dtype_for(entry.weight, "parameter")).clone(
            memory_format=torch.contiguous_format
        )
        for side, basis in zip(sides, bases, strict=True)
    }
