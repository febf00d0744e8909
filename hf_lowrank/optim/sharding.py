"""Parameters whose rows are divided among processes, as FSDP2 (`fully_shard`) divides them.

A tensor of `length` rows is cut into chunks of ⌈length / processes⌉ rows: the last ones may be shorter, or empty. The
optimizers' state is divided in the same way, as DTensors, so that torch.distributed.checkpoint saves it and loads it
into any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hf_lowrank.errors import UserError


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`: of a DTensor its shard, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Sharding:
    """How the rows of a tensor are divided.

    Attributes:
        mesh, placements: as the parameter's.
        group: the processes among which the rows are divided; each holds a part.
        replicas: groups whose processes hold the same rows (hybrid sharding), each group's first being right.
    """

    def __init__(self, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> None:
        axis = next(number for number, placement in enumerate(placements) if isinstance(placement, Shard))
        self.mesh, self.placements = mesh, placements
        self.group = mesh.get_group(axis)
        self.size, self.rank = mesh.size(axis), mesh.get_local_rank(axis)
        self.replicas = [
            mesh.get_group(number) for number in range(mesh.ndim) if number != axis and mesh.size(number) > 1
        ]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for tensors that are divided alike."""
        return self.mesh, self.placements

    def chunk(self, length: int) -> int:
        """Rows of a full chunk."""
        return -(-length // self.size)

    def bounds(self, length: int, rank: int | None = None) -> tuple[int, int]:
        """Which of `length` rows process `rank` of the group holds (this one by default): from, up to."""
        rank = self.rank if rank is None else rank
        chunk = self.chunk(length)
        return min(rank * chunk, length), min((rank + 1) * chunk, length)

    def count(self, length: int, rank: int | None = None) -> int:
        """How many of `length` rows process `rank` holds."""
        start, stop = self.bounds(length, rank)
        return stop - start

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor that it has whole."""
        return whole[slice(*self.bounds(whole.shape[0]))]

    def tensor(self, part: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The DTensor of `shape` of which this process holds `part`."""
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part.contiguous(), self.mesh, self.placements, run_check=False, shape=torch.Size(shape), stride=strides
        )

    def zeros(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """A DTensor of zeros on `like`'s device."""
        return self.tensor(torch.zeros(self.count(shape[0]), *shape[1:], dtype=dtype, device=like.device), shape)

    # Between the processes

    def gather(self, parts: Tensor, length: int) -> Tensor:
        """Every process's rows together: (k, rows of this one, …) of k tensors -> (k, length, …)."""
        if self.size == 1:
            return parts
        padded = _padded(parts, self.chunk(length)).contiguous()
        gathered = padded.new_empty(self.size * padded.shape[0], *padded.shape[1:])
        _all_gather(gathered, padded, group=self.group)
        gathered = gathered.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1, 2)
        return gathered[:, :length]

    def scatter_sum(self, summands: Tensor) -> Tensor:
        """The sum over the processes, each keeping its rows: (k, length, …) -> (k, rows of this one, …)."""
        if self.size == 1:
            return summands
        length = summands.shape[1]
        padded = _padded(summands, self.size * self.chunk(length))
        padded = padded.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        own = torch.empty_like(padded[0])
        _reduce_scatter(own, padded.flatten(0, 1), group=self.group)
        return own[:, : self.count(length)]

    def sum(self, summands: Tensor) -> Tensor:
        """The sum over the processes, the same bits on all of them."""
        if self.size > 1:
            summands = summands.contiguous()
            dist.all_reduce(summands, group=self.group)
        return summands

    def to_owners(self, parts: Sequence[Tensor], owners: Sequence[int], lengths: Sequence[int]) -> dict[int, Tensor]:
        """Hands matrices round: each whole at its owner, in one exchange.

        Args:
            parts: this process's rows of each matrix, all of one type.
            owners: the process of each.
            lengths: the rows that each has together.

        Returns:
            The matrices of which this process is the owner, by their place in the list.
        """
        order = sorted(range(len(parts)), key=owners.__getitem__)
        mine = [i for i in order if owners[i] == self.rank]
        sent = [parts[i].reshape(-1) for i in order]
        sent_sizes = [sum(part.numel() for i, part in zip(order, sent, strict=True) if owners[i] == to) for to in self]
        rests = {i: tuple(parts[i].shape[1:]) for i in mine}
        shapes = [[(self.count(lengths[i], source), *rests[i]) for i in mine] for source in self]
        received = self._exchange(sent, sent_sizes, shapes)
        return {i: torch.cat([from_one[place] for from_one in received]) for place, i in enumerate(mine)}

    def from_owners(
        self, wholes: dict[int, Tensor], owners: Sequence[int], shapes: Sequence[tuple[int, ...]], like: Tensor
    ) -> list[Tensor]:
        """The way back: of each owner's matrix every process gets its rows, the same in all replicas.

        Args:
            wholes: the matrices of which this process is the owner, by their place in the list, contiguous.
            owners: the process of each.
            shapes: of the whole matrices.
            like: gives type and device.
        """
        order = sorted(range(len(owners)), key=owners.__getitem__)
        mine = [i for i in order if owners[i] == self.rank]
        sent = [wholes[i][slice(*self.bounds(shapes[i][0], to))].reshape(-1) for to in self for i in mine]
        sent = sent or [like.new_empty(0)]
        sent_sizes = [sum(self.count(shapes[i][0], to) * _area(shapes[i][1:]) for i in mine) for to in self]
        expected = [
            [(self.count(shapes[i][0]), *shapes[i][1:]) for i in order if owners[i] == source] for source in self
        ]
        received = [part for from_one in self._exchange(sent, sent_sizes, expected) for part in from_one]
        parts = [part for _, part in sorted(zip(order, received, strict=True), key=lambda pair: pair[0])]
        self.settle_replicas(parts)
        return parts

    def settle_replicas(self, parts: Sequence[Tensor]) -> None:
        """Makes what processes of different replicas hold of the same rows the first one's, in place."""
        for group in self.replicas:
            for part in parts:
                dist.broadcast(part, group=group, group_src=0)

    def _exchange(
        self, sent: Sequence[Tensor], sent_sizes: list[int], shapes: list[list[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """What each process sent to this one: tensors of `shapes[process]`."""
        flat = torch.cat(list(sent))
        sizes = [[_area(shape) for shape in of_one] for of_one in shapes]
        received = flat.new_empty(sum(map(sum, sizes)))
        if self.size == 1:
            received = flat
        else:
            dist.all_to_all_single(received, flat, list(map(sum, sizes)), sent_sizes, group=self.group)
        pieces = iter(received.split([size for of_one in sizes for size in of_one]))
        return [[next(pieces).view(shape) for shape in of_one] for of_one in shapes]

    def __iter__(self) -> Iterator[int]:
        """The processes' numbers in the group."""
        return iter(range(self.size))


def sharding_of(tensor: Tensor) -> Sharding | None:
    """How a tensor's rows are divided, None where each process holds all of it or the division is another one."""
    if not isinstance(tensor, DTensor):
        return None
    shards = [placement for placement in tensor.placements if not isinstance(placement, Replicate)]
    # A subclass of Shard, as for tensor parallelism beside FSDP, orders the rows otherwise.
    if len(shards) != 1 or type(shards[0]) is not Shard or shards[0].dim != 0:
        return None
    return Sharding(tensor.device_mesh, tuple(tensor.placements))


def check_divided_by_rows(tensor: Tensor, name: str) -> None:
    """Raises UserError where a target's matrices are divided otherwise than by rows, as FSDP2 does."""
    if isinstance(tensor, DTensor) and sharding_of(tensor) is None:
        placed = ", ".join(map(str, tensor.placements))
        if not all(isinstance(placement, Replicate) for placement in tensor.placements):
            raise UserError(
                f"{name} must be sharded along its first dimension alone, as fully_shard does, got {placed}; "
                "leave out tensor parallelism and shard_placement_fn"
            )


def agree_all(flags: Tensor, mesh: DeviceMesh) -> Tensor:
    """Whether a flag is true on all processes of `mesh`, (k,) bool."""
    agreed = flags.to(torch.uint8)
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=mesh.get_group(axis))
    return agreed.bool()


def _padded(tensor: Tensor, length: int) -> Tensor:
    """`tensor` with zeros behind its second dimension, up to `length`."""
    missing = length - tensor.shape[1]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], dim=1)


def _area(shape: tuple[int, ...]) -> int:
    area = 1
    for length in shape:
        area *= length
    return area


# torch 2.13 renames both.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
