"""Parameters whose rows are sharded, as FSDP2 (`fully_shard`) shards them.

A tensor of `length` rows is split into chunks of ⌈length / processes⌉ rows: the last ones may be shorter, or empty.
Optimizer state is sharded in the same way, as DTensors, so that torch.distributed.checkpoint can save it and load it
into any number of processes.

A matrix, oriented so that G (rows × columns) is projected to R = G Q, is sharded in one of two ways:

    along its rows      R_i = G_i Q, with the whole Q: bases are gathered.
    along its columns   R = Σ_i G_i Q_i, where Q_i are the rows of Q for the columns of G_i: products are summed and
                        each process keeps its rows R_i; before lifting they are gathered.

In both, process i keeps the rows R_i of the moments and the rows Q_i of the basis, and nothing else. If both sides are
projected, R = Pᵀ G Q is a sum over processes either way. `layout.Replicated` and `layout.RowSharded` hide the
difference.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hf_lowrank.compat import all_gather_into_tensor, reduce_scatter_tensor
from hf_lowrank.errors import UserError


def local_part(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Sharding:
    """How the rows of a tensor are sharded.

    Attributes:
        mesh, placements: the parameter's.
        group: the processes that share the rows.
        size, rank: of that group.
        replicas: groups whose processes hold the same rows (hybrid sharding); the first of each is authoritative.
    """

    def __init__(self, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> None:
        axis = next(number for number, placement in enumerate(placements) if isinstance(placement, Shard))
        self.mesh, self.placements = mesh, placements
        self.group = mesh.get_group(axis)
        self.size, self.rank = mesh.size(axis), mesh.get_local_rank(axis)
        self.replicas = [
            mesh.get_group(number) for number in range(mesh.ndim) if number != axis and mesh.size(number) > 1
        ]

    def chunk(self, length: int) -> int:
        """Number of rows of a full chunk."""
        return -(-length // self.size)

    def bounds(self, length: int, rank: int | None = None) -> tuple[int, int]:
        """Start and end of the rows, of `length`, that process `rank` of the group holds (default: this one)."""
        rank = self.rank if rank is None else rank
        chunk = self.chunk(length)
        return min(rank * chunk, length), min((rank + 1) * chunk, length)

    def count(self, length: int, rank: int | None = None) -> int:
        """Number of rows, of `length`, that process `rank` holds."""
        start, stop = self.bounds(length, rank)
        return stop - start

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows of a whole tensor."""
        return whole[slice(*self.bounds(whole.shape[0]))]

    def tensor(self, part: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The DTensor of `shape` whose local shard is `part`."""
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part.contiguous(), self.mesh, self.placements, run_check=False, shape=torch.Size(shape), stride=strides
        )

    def zeros(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """A DTensor of zeros on `like`'s device."""
        return self.tensor(torch.zeros(self.count(shape[0]), *shape[1:], dtype=dtype, device=like.device), shape)

    # Communication

    def gather(self, parts: Tensor, length: int) -> Tensor:
        """All rows of k tensors, from each process's own: (k, rows of this one, …) -> (k, length, …)."""
        if self.size == 1:
            return parts
        padded = _padded(parts, self.chunk(length)).contiguous()
        gathered = padded.new_empty(self.size * padded.shape[0], *padded.shape[1:])
        all_gather_into_tensor(gathered, padded, group=self.group)
        gathered = gathered.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1, 2)
        return gathered[:, :length]

    def scatter_sum(self, summands: Tensor) -> Tensor:
        """The sum over processes, of which each keeps its rows: (k, length, …) -> (k, rows of this one, …)."""
        if self.size == 1:
            return summands
        length = summands.shape[1]
        padded = _padded(summands, self.size * self.chunk(length))
        padded = padded.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        own = torch.empty_like(padded[0])
        reduce_scatter_tensor(own, padded.flatten(0, 1), group=self.group)
        return own[:, : self.count(length)]

    def sum(self, summands: Tensor) -> Tensor:
        """The sum over processes, bitwise equal on all of them; in place."""
        if self.size > 1:
            summands = summands.contiguous()
            dist.all_reduce(summands, group=self.group)
        return summands

    def to_owners(self, parts: Sequence[Tensor], owners: Sequence[int], lengths: Sequence[int]) -> dict[int, Tensor]:
        """Sends each matrix, whole, to one process, in one exchange.

        Args:
            parts: this process's rows of each matrix, all of one type.
            owners: the process that gets each matrix.
            lengths: each matrix's number of rows.

        Returns:
            The matrices that this process owns, by index.
        """
        owned = self._owned(owners)
        mine = owned[self.rank]
        shapes = [[(self.count(lengths[i], source), *parts[i].shape[1:]) for i in mine] for source in self]
        received = self._exchange([[parts[i] for i in of_one] for of_one in owned], shapes, parts[0])
        return {i: torch.cat(rows) for i, *rows in zip(mine, *received, strict=True)}

    def from_owners(
        self, wholes: dict[int, Tensor], owners: Sequence[int], shapes: Sequence[tuple[int, ...]], like: Tensor
    ) -> list[Tensor]:
        """The inverse of `to_owners`: this process's rows of every matrix, equal in all replicas.

        Args:
            wholes: the matrices that this process owns, by index, contiguous.
            owners: the process that owns each matrix.
            shapes: of the whole matrices.
            like: gives type and device.
        """
        owned = self._owned(owners)
        sent = [[wholes[i][slice(*self.bounds(shapes[i][0], to))] for i in owned[self.rank]] for to in self]
        expected = [[(self.count(shapes[i][0]), *shapes[i][1:]) for i in of_one] for of_one in owned]
        received = dict(zip(chain(*owned), chain(*self._exchange(sent, expected, like)), strict=True))
        parts = [received[i] for i in range(len(owners))]
        self.synchronize_replicas(parts)
        return parts

    def synchronize_replicas(self, parts: Sequence[Tensor]) -> None:
        """Overwrites the rows of every replica with the first one's."""
        for group in self.replicas:
            for part in parts:
                dist.broadcast(part, group=group, group_src=0)

    def _owned(self, owners: Sequence[int]) -> list[list[int]]:
        """The indices of the matrices that each process owns."""
        return [[i for i, owner in enumerate(owners) if owner == process] for process in self]

    def _exchange(
        self, sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], like: Tensor
    ) -> list[list[Tensor]]:
        """Sends `sent[process]` to each process; returns what each sent to this one, of `shapes[process]`."""
        flat = torch.cat([part.reshape(-1) for part in chain(*sent)] or [like.new_empty(0)])
        sent_sizes = [sum(part.numel() for part in to_one) for to_one in sent]
        sizes = [[math.prod(shape) for shape in of_one] for of_one in shapes]
        received = flat
        if self.size > 1:
            received = flat.new_empty(sum(map(sum, sizes)))
            dist.all_to_all_single(received, flat, list(map(sum, sizes)), sent_sizes, group=self.group)
        pieces = iter(received.split(list(chain(*sizes))))
        return [[next(pieces).view(shape) for shape in of_one] for of_one in shapes]

    def __iter__(self) -> Iterator[int]:
        """The ranks of the group."""
        return iter(range(self.size))


def sharding_of(tensor: Tensor) -> Sharding | None:
    """How a tensor's rows are sharded, None if each process holds all of it or it is sharded otherwise."""
    if not isinstance(tensor, DTensor):
        return None
    shards = [placement for placement in tensor.placements if not isinstance(placement, Replicate)]
    # A subclass of Shard, such as that of tensor parallelism combined with FSDP, orders the rows differently.
    if len(shards) != 1 or type(shards[0]) is not Shard or shards[0].dim != 0:
        return None
    return Sharding(tensor.device_mesh, tuple(tensor.placements))


def check_sharded_by_rows(tensor: Tensor, name: str) -> None:
    """Raises UserError if a target is sharded in any other way than by rows."""
    if isinstance(tensor, DTensor) and sharding_of(tensor) is None:
        placed = ", ".join(map(str, tensor.placements))
        if not all(isinstance(placement, Replicate) for placement in tensor.placements):
            raise UserError(
                f"{name} must be sharded along its first dimension alone, as fully_shard does, got {placed}; "
                "leave out tensor parallelism and shard_placement_fn"
            )


def agree_all(flags: Tensor, mesh: DeviceMesh) -> Tensor:
    """Whether each flag is true on all processes of `mesh`, (k,) bool."""
    agreed = flags.to(torch.uint8)
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=mesh.get_group(axis))
    return agreed.bool()


def _padded(tensor: Tensor, length: int) -> Tensor:
    """`tensor` with its second dimension padded by zeros to `length`."""
    missing = length - tensor.shape[1]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], dim=1)
