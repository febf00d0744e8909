"""Choosing new bases for the targets whose subspaces are due.

A matrix that is sharded is sent whole to one process, a different one for each matrix, which chooses the basis and
gives every process its rows of it. No process holds more than one round of whole matrices at a time.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.compat import foreach_copy_
from hf_lowrank.optim.adam import host_reads
from hf_lowrank.optim.batch import batch_limits
from hf_lowrank.optim.entries import Entry, are_any, nonzero
from hf_lowrank.optim.layout import Layout, RowSharded
from hf_lowrank.optim.sharding import Sharding, local_part
from hf_lowrank.optim.state import StateTensor
from hf_lowrank.optim.subspaces import (
    FROM_THE_LAST,
    OF_GRADIENTS,
    OF_INDICES,
    SUBSPACES,
    TURN_EVERY,
    UNSTORED,
    Request,
    exact_bases,
    is_usable,
)
from hf_lowrank.storage.codes import Codes, byte_count, decode, encode, group_count

SIDES = ("basis", "left_basis")
# What a side with codes stores besides them.
OF_CODES = ("scale", "zero")
# The names of all state tensors that hold bases.
STORED_BASES = tuple(key for side in SIDES for key in (side, *(f"{side}_{part}" for part in OF_CODES)))
# State tensors of bases by their names: a side's basis, or its codes, scales and zero points.
Bases = dict[str, Tensor]


def basis_state(subspace: str, layout: Layout, bits: int | None = None) -> dict[str, StateTensor]:
    """The state tensors that hold the bases of a subspace; a refresh creates them.

    Args:
        bits: of each value of a basis; None: that of the parameter.
    """
    if subspace == UNSTORED:
        return {}
    if subspace in OF_INDICES:
        return {"basis": StateTensor(shape=(layout.rank,), dtype=torch.int64, initial=None)}
    lengths = {"basis": layout.columns, **({"left_basis": layout.rows} if layout.both else {})}
    if bits is None:
        return {
            side: StateTensor(shape=(length, layout.rank), dtype="parameter", initial=None)
            for side, length in lengths.items()
        }
    found = {}
    for side, length in lengths.items():
        size = length * layout.rank
        found[side] = StateTensor(shape=(byte_count(size, bits),), dtype=torch.uint8, initial=None)
        for part in OF_CODES:
            found[f"{side}_{part}"] = StateTensor(shape=(group_count(size),), dtype="wide", initial=None)
    return found


def held_bases(entries: Sequence[Entry], side: str) -> list[Tensor]:
    """This process's part of the bases in use of targets of one shape, stacks among them, one per matrix, decoded."""
    bits = _bits(entries[0])
    parts = {
        key: [part for entry in entries for part in entry.layout.parts(local_part(entry.state[key]))]
        for key in _keys_of(side, bits)
    }
    if bits is None:
        return parts[side]
    stored = {key: torch.stack(list(own)) for key, own in parts.items()}
    return list(_decoded(entries[0], stored, side).to(entries[0].weight.dtype).unbind())


def _bits(entry: Entry) -> int | None:
    """Bits of each value of a target's bases; None where they are stored as they are."""
    bits: int | None = entry.group.get("projection_bits")
    return bits


def _keys_of(side: str, bits: int | None) -> list[str]:
    """The state tensors of one side's basis."""
    return [side] if bits is None else [side, *(f"{side}_{part}" for part in OF_CODES)]


def _stored(entry: Entry, side: str, basis: Tensor) -> Bases:
    """A side's new bases, (k, length, rank), as the state holds them."""
    bits = _bits(entry)
    if bits is None:
        dtype = entry.declared(side).dtype_for(entry.weight, "parameter")
        return {side: basis.to(dtype).clone(memory_format=torch.contiguous_format)}
    return dict(zip(_keys_of(side, bits), encode(basis, bits), strict=True))


def _decoded(entry: Entry, stored: Bases, side: str) -> Tensor:
    """A side's bases, (k, length, rank), from what the state holds of k matrices."""
    bits, layout = _bits(entry), entry.layout
    if bits is None:
        return stored[side]
    length = layout.rows if side == "left_basis" else layout.columns
    return decode(Codes(*(stored[key] for key in _keys_of(side, bits))), (length, layout.rank), bits)


def choose_bases(due: Sequence[Entry], *, afresh: bool = False) -> list[Bases]:
    """New bases for each target, as its state holds them; `afresh`: as if it had none.

    A matrix without directions, because its gradient is zero or not finite, keeps its last basis; if it has none, it
    gets one of zeros, or any columns.
    """
    found: list[Bases] = [{} for _ in due]
    held: list[int] = []
    sharded: dict[tuple[Any, ...], list[int]] = {}
    for number, entry in enumerate(due):
        sharding = entry.layout.sharding
        if sharding is None or not isinstance(entry.layout.partition, RowSharded):
            held.append(number)
        elif _shapes(entry):
            subspace, grad = entry.group["subspace"], entry.grad
            key = (id(sharding.group), subspace, entry.layout.both, grad.dtype, grad.device)
            sharded.setdefault(key, []).append(number)
    for number, bases in zip(held, _choose_held([due[number] for number in held], afresh), strict=True):
        found[number] = bases
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
            for number, bases in zip(chunk, _choose_sharded([due[i] for i in chunk], sharding, afresh), strict=True):
                found[number] = bases
    return found


def write_bases(targets: Sequence[Entry], chosen: Sequence[Bases]) -> None:
    """Puts what `choose_bases` returned into the state: into the tensors there, if there are some."""
    held: list[Tensor] = []
    fresh: list[Tensor] = []
    for entry, bases in zip(targets, chosen, strict=True):
        for side, basis in bases.items():
            if side in entry.state:
                held.append(local_part(entry.state[side]))
                fresh.append(local_part(basis))
            else:  # a basis of one matrix may be a view of many
                entry.state[side] = basis if isinstance(basis, DTensor) else basis.clone()
    if held:
        foreach_copy_(held, fresh)


def without_directions(entries: Sequence[Entry]) -> set[Entry]:
    """Those whose gradients are zero, so that no basis can be chosen from them, where the host reads gradients."""
    asked = [one for one in entries if one.group["subspace"] in OF_GRADIENTS and host_reads(one.grad.device)]
    return set(asked).difference(nonzero(asked))


def choose_first(entries: Sequence[Entry]) -> None:
    """Chooses the first bases of targets whose later ones are made from the last at each step.

    Where the host reads gradients, it waits for one that is not zero, which is the first that Adam's steps count.
    Elsewhere a matrix without directions gets unit vectors, from which the steps find their way.
    """
    due = [entry for entry in entries if not entry.state["refreshes"]]
    silent = without_directions(due)
    chosen = choose_bases(due)
    for entry, bases in zip(due, chosen, strict=True):
        layout, basis = entry.layout, local_part(bases["basis"])
        unit = torch.eye(layout.columns, layout.rank, dtype=basis.dtype, device=basis.device)
        found = layout.partition.sum(basis.abs().sum((-2, -1), keepdim=True)) > 0
        foreach_copy_([basis], [torch.where(found, basis, layout.partition.own_rows(unit))])
    write_bases(due, chosen)
    for entry in due:
        entry.state["refreshes"] += entry not in silent
        entry.state["reset_at"] = entry.state["step"]


def _shapes(entry: Entry) -> dict[str, tuple[int, ...]]:
    """The shapes of the state tensors of one matrix's bases; none for a subspace that is not stored."""
    return {key: entry.declared(key).shape or () for key in STORED_BASES if key in entry.info.declared}


def _last(entry: Entry, afresh: bool) -> Bases:
    """The bases in use, as the state holds them; none before a first choice has counted."""
    if afresh:
        return {}
    return {key: entry.state[key] for key in _shapes(entry) if key in entry.state and entry.state["refreshes"]}


def _choose_held(targets: Sequence[Entry], afresh: bool) -> list[Bases]:
    """The bases of matrices that this process holds whole: of unsharded parameters, or its part of stacks."""
    matrices = [
        Matrix(entry, grad, index, {side: basis[number] for side, basis in parts.items()})
        for entry in targets
        for parts in [{side: entry.layout.parts(local_part(basis)) for side, basis in _last(entry, afresh).items()}]
        for number, (grad, index) in enumerate(
            zip(entry.layout.stored(entry.grad), entry.layout.held_indices, strict=True)
        )
    ]
    chosen = iter(_choose(matrices))
    found: list[Bases] = []
    for entry in targets:
        layout = entry.layout
        own = [next(chosen) for _ in layout.held_indices]
        if not layout.stacked:
            found.append(own[0])
            continue
        bases = {}
        for side, shape in _shapes(entry).items():
            dtype = entry.declared(side).dtype_for(entry.weight, "parameter")
            stack = torch.empty((len(own), *shape), dtype=dtype, device=entry.weight.device)
            if own:
                torch.stack([basis[side] for basis in own], out=stack)
            if layout.sharding is not None:
                layout.sharding.synchronize_replicas([stack])
                stack = layout.sharding.tensor(stack, (layout.count, *shape))
            bases[side] = stack
        found.append(bases)
    return found


def _choose_sharded(targets: Sequence[Entry], sharding: Sharding, afresh: bool) -> list[Bases]:
    """The bases of as many sharded matrices as there are processes, each chosen by one of them."""
    owners = [entry.layout.first_index % sharding.size for entry in targets]
    if targets[0].group["subspace"] in OF_GRADIENTS:
        stored = [view for entry in targets for view in entry.layout.stored(entry.grad)]
        lengths = [entry.layout.columns if entry.layout.transposed else entry.layout.rows for entry in targets]
        grads = sharding.to_owners(stored, owners, lengths)
    else:
        grads = {
            number: entry.grad.new_zeros(()).expand(entry.layout.stored_shape)
            for number, entry in enumerate(targets)
            if owners[number] == sharding.rank
        }
    last: dict[int, Bases] = {number: {} for number in grads}
    for side in _shapes(targets[0]) if targets[0].group["subspace"] in FROM_THE_LAST else ():
        held = [number for number, entry in enumerate(targets) if side in _last(entry, afresh)]
        if held:
            wholes = sharding.to_owners(
                [local_part(_last(targets[number], afresh)[side]) for number in held],
                [owners[number] for number in held],
                [_shapes(targets[number])[side][0] for number in held],
            )
            for number, basis in wholes.items():
                last[held[number]][side] = basis
    owned = [
        Matrix(targets[number], grad, targets[number].layout.first_index, last[number])
        for number, grad in grads.items()
    ]
    chosen = dict(zip(grads, _choose(owned), strict=True))
    bases: list[Bases] = [{} for _ in targets]
    for side in _shapes(targets[0]):
        shapes = [_shapes(entry)[side] for entry in targets]
        dtype = targets[0].declared(side).dtype_for(targets[0].weight, "parameter")
        like = targets[0].weight.new_empty(0, dtype=dtype)
        parts = sharding.from_owners({n: own[side] for n, own in chosen.items()}, owners, shapes, like)
        for of_one, part, shape in zip(bases, parts, shapes, strict=True):
            of_one[side] = sharding.tensor(part.clone(), shape)  # not a view of the exchanged buffer
    return bases


class Matrix(NamedTuple):
    """One whole matrix that is due.

    Attributes:
        grad: its gradient, as it is stored.
        number: its place among all of the optimizer's matrices.
        last: the bases in use, as the state holds them; none before the first choice.
    """

    entry: Entry
    grad: Tensor
    number: int
    last: Bases


def _choose(matrices: Sequence[Matrix]) -> list[Bases]:
    """The bases of whole matrices, as the state holds them; all that are alike at once."""
    found: list[Bases] = [{} for _ in matrices]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, (entry, grad, _, last) in enumerate(matrices):
        layout, group = entry.layout, entry.group
        turns = bool(last) and entry.state["refreshes"] % TURN_EVERY == 0
        key = (group["subspace"], layout.rank, layout.transposed, layout.both, bool(last), turns)
        alike.setdefault((*key, entry.weight.dtype, grad.dtype, grad.device, grad.shape), []).append(number)
    for (*_, turns, _, _, device, shape), numbers in alike.items():
        limits = batch_limits(device)
        size = max(1, limits.batch // shape.numel()) if shape.numel() <= limits.stacked else 1
        for start in range(0, len(numbers), size):
            chunk = numbers[start : start + size]
            bases = _choose_alike([matrices[number] for number in chunk], turns)
            parts = {side: stack.unbind() for side, stack in bases.items()}
            for place, number in enumerate(chunk):
                found[number] = {side: part[place] for side, part in parts.items()}
    return found


def _choose_alike(matrices: Sequence[Matrix], turns: bool) -> Bases:
    """The bases of several whole matrices, as the state holds them, (k, …)."""
    entry, _, _, last = matrices[0]
    layout, group, sides = entry.layout, entry.group, [side for side in SIDES if side in entry.info.declared]
    if not sides:
        return {}
    grads = stacked([matrix.grad for matrix in matrices])
    grads = grads.mT if layout.transposed else grads
    held = {key: stacked([matrix.last[key] for matrix in matrices]) for key in last}
    previous = {side: _decoded(entry, held, side) for side in sides} if held else {}
    request = Request(
        grads=grads,
        rank=layout.rank,
        transposed=layout.transposed,
        previous=_as_start(previous.get("basis")),
        keys=[(one.group["seed"], index, one.state["refreshes"]) for one, _, index, _ in matrices],
        turns=turns,
    )
    choose = SUBSPACES[group["subspace"]]
    if not layout.both:
        bases: tuple[Tensor, ...] = (choose(request),)
    elif group["subspace"] == "svd":
        bases = exact_bases(request)
    else:
        other = replace(
            request,
            grads=grads.mT,
            transposed=not layout.transposed,
            previous=_as_start(previous.get("left_basis")),
            keys=[(*key, 1) for key in request.keys],
        )
        bases = (choose(request), choose(other))
    chosen: Bases = {}
    for side, basis in zip(sides, bases, strict=True):
        chosen |= _stored(entry, side, basis)
    if group["subspace"] not in OF_GRADIENTS:
        return chosen
    if not last and group["subspace"] in OF_INDICES:
        return chosen
    usable = is_usable(grads)
    for basis in bases:
        usable &= basis.isfinite().flatten(1).all(-1)
    return {
        key: torch.where(usable.view(-1, *[1] * (part.ndim - 1)), part, held.get(key, 0))
        for key, part in chosen.items()
    }


def _as_start(bases: Tensor | None) -> Tensor | None:
    """The bases to iterate from: those in use, unit vectors for a basis of zeros."""
    if bases is None or not bases.is_floating_point():
        return bases
    unit = torch.eye(*bases.shape[-2:], dtype=bases.dtype, device=bases.device)
    return torch.where(are_any(bases.flatten(1)).view(-1, 1, 1), bases, unit)


def stacked(matrices: Sequence[Tensor], transposed: bool = False) -> Tensor:
    """Matrices in one tensor (k, rows, columns), in the memory order of the stored ones; one alone is not copied."""
    if len(matrices) == 1:
        return matrices[0].unsqueeze(0)
    return torch.stack([matrix.mT for matrix in matrices]).mT if transposed else torch.stack(list(matrices))
