"""Parameters whose rows are sharded, as FSDP2 (`fully_shard`) shards them.

A tensor of `length` rows is split into chunks of ⌈length / processes⌉ rows: the last ones may be shorter, or empty.
Optimizer state is sharded in the same way, as DTensors, so that torch.distributed.checkpoint can save it and load it
into any number of processes.

A matrix, oriented so that G (rows × columns) is projected to R = G Q, is sharded in one of two ways:

    along its rows      R_i = G_i Q, with the whole Q: bases are gathered.
    along its columns   R = Σ_i G_i Q_i, where Q_i are the rows of Q for the columns of G_i: products are summed and
                        each process keeps its rows R_i; before lifting they are gathered.

In both, process i keeps the rows R_i of the moments and the rows Q_i of the basis, and nothing else. If both sides are
projected, R = Pᵀ G Q is a sum over processes either way. `Replicated` and `RowSharded` hide the difference.
"""

import math
from collections.abc import Iterator, Sequence

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

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for tensors that are sharded in the same way."""
        return self.mesh, self.placements

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
        order = sorted(range(len(parts)), key=owners.__getitem__)
        mine = [i for i in order if owners[i] == self.rank]
        sent = [parts[i].reshape(-1) for i in order]
        sent_sizes = [sum(part.numel() for i, part in zip(order, sent, strict=True) if owners[i] == to) for to in self]
        rests = {i: tuple(parts[i].shape[1:]) for i in mine}
        shapes = [[(self.count(lengths[i], source), *rests[i]) for i in mine] for source in self]
        received = self._exchange(sent, sent_sizes, shapes)
        return {i: torch.cat([from_one[number] for from_one in received]) for number, i in enumerate(mine)}

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
        order = sorted(range(len(owners)), key=owners.__getitem__)
        mine = [i for i in order if owners[i] == self.rank]
        sent = [wholes[i][slice(*self.bounds(shapes[i][0], to))].reshape(-1) for to in self for i in mine]
        sent = sent or [like.new_empty(0)]
        sent_sizes = [sum(self.count(shapes[i][0], to) * math.prod(shapes[i][1:]) for i in mine) for to in self]
        expected = [
            [(self.count(shapes[i][0]), *shapes[i][1:]) for i in order if owners[i] == source] for source in self
        ]
        received = [part for from_one in self._exchange(sent, sent_sizes, expected) for part in from_one]
        parts = [part for _, part in sorted(zip(order, received, strict=True), key=lambda pair: pair[0])]
        self.synchronize_replicas(parts)
        return parts

    def synchronize_replicas(self, parts: Sequence[Tensor]) -> None:
        """Overwrites the rows of every replica with the first one's."""
        for group in self.replicas:
            for part in parts:
                dist.broadcast(part, group=group, group_src=0)

    def _exchange(
        self, sent: Sequence[Tensor], sent_sizes: list[int], shapes: list[list[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """The tensors that each process sent to this one, of `shapes[process]`."""
        flat = torch.cat(list(sent))
        sizes = [[math.prod(shape) for shape in of_one] for of_one in shapes]
        received = flat.new_empty(sum(map(sum, sizes)))
        if self.size == 1:
            received = flat
        else:
            dist.all_to_all_single(received, flat, list(map(sum, sizes)), sent_sizes, group=self.group)
        pieces = iter(received.split([size for of_one in sizes for size in of_one]))
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


# One matrix at a time


class Replicated:
    """Matrices that each process holds whole: nothing is communicated.

    Methods take k matrices of one shape at a time; `rows_i` are a process's rows of the projection.
    """

    def bases(self, parts: list[Tensor]) -> list[Tensor]:
        """The bases that this process multiplies by, from its rows of them."""
        return parts

    def left_bases(self, parts: list[Tensor]) -> list[Tensor]:
        """The same for the bases that project the rows."""
        return parts

    def bases_from_whole(self, bases: list[Tensor]) -> list[Tensor]:
        """The bases that this process multiplies by, from whole ones."""
        return bases

    def basis_rows(self, parts: list[Tensor], columns: int) -> list[Tensor]:
        """This process's rows of the bases; column indices are converted to matrices."""
        if parts and not parts[0].is_floating_point():
            return [torch.eye(columns, device=basis.device)[:, basis] for basis in parts]
        return parts

    def own_rows(self, basis: Tensor) -> Tensor:
        """This process's rows of a whole basis."""
        return basis

    def projected(self, products: Tensor) -> Tensor:
        """This process's rows of the projections, from its products: (k, rows, rank) -> (k, rows_i, rank)."""
        return products

    def for_lifting(self, parts: Tensor) -> Tensor:
        """The rows that this process needs to lift, or to scale its part of the gradients: (k, rows_i, …)."""
        return parts

    def own_low_rows(self, whole: Tensor) -> Tensor:
        """The inverse of `for_lifting`, for one matrix."""
        return whole

    def energy(self, products: Tensor) -> Tensor:
        """`‖G Q‖²` of one gradient, from this process's product."""
        return products.square().sum()

    def row_norms(self, norms: Tensor) -> Tensor:
        """Norms of the gradients' rows, (k, rows_i), from the norms of this process's parts of them."""
        return norms

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        return values

    def norms(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Euclidean norms over the last dimension, which is split among processes."""
        return torch.linalg.vector_norm(values, dim=-1, dtype=dtype)


REPLICATED = Replicated()


class RowSharded(Replicated):
    """Matrices that are sharded along their rows or their columns.

    Args:
        sharding: of the parameter.
        rows, columns: shape of a whole oriented matrix.
        low_rows, rank: shape of its projection.
        dtype: of the gradients.
        along_rows: whether the oriented matrix is sharded along its rows.
        both: whether the rows are projected as well.
    """

    def __init__(
        self,
        sharding: Sharding,
        *,
        rows: int,
        columns: int,
        low_rows: int,
        rank: int,
        dtype: torch.dtype,
        along_rows: bool,
        both: bool,
    ) -> None:
        self._sharding, self._dtype = sharding, dtype
        self._rows, self._columns, self._low_rows, self._rank = rows, columns, low_rows, rank
        self._along_rows = along_rows
        self._is_sum = both or not along_rows

    def bases(self, parts: list[Tensor]) -> list[Tensor]:
        if not parts[0].is_floating_point():
            return self.bases_from_whole(self._gathered(parts, self._rank))
        return self._gathered(parts, self._columns) if self._along_rows else parts

    def left_bases(self, parts: list[Tensor]) -> list[Tensor]:
        return parts if self._along_rows else self._gathered(parts, self._rows)

    def bases_from_whole(self, bases: list[Tensor]) -> list[Tensor]:
        if self._along_rows:
            return bases
        if not bases[0].is_floating_point():
            return self._unit_rows(bases)
        return [self._sharding.part(basis) for basis in bases]

    def basis_rows(self, parts: list[Tensor], columns: int) -> list[Tensor]:
        if parts[0].is_floating_point():
            return parts
        return self._unit_rows(self._gathered(parts, self._rank))

    def own_rows(self, basis: Tensor) -> Tensor:
        return self._sharding.part(basis)

    def projected(self, products: Tensor) -> Tensor:
        return self._sharding.scatter_sum(products) if self._is_sum else products

    def for_lifting(self, parts: Tensor) -> Tensor:
        return self._sharding.gather(parts, self._low_rows) if self._is_sum else parts

    def own_low_rows(self, whole: Tensor) -> Tensor:
        return self._sharding.part(whole) if self._is_sum else whole

    def energy(self, products: Tensor) -> Tensor:
        if not self._along_rows:
            products = self._sharding.scatter_sum(products[None])
        return self.sum(products.square().sum())

    def row_norms(self, norms: Tensor) -> Tensor:
        return self._sharding.scatter_sum(norms.square()).sqrt() if self._is_sum else norms

    def sum(self, values: Tensor) -> Tensor:
        return self._sharding.sum(values)

    def norms(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.sum(super().norms(values, dtype).square()).sqrt()

    def _gathered(self, parts: Sequence[Tensor], length: int) -> list[Tensor]:
        return list(self._sharding.gather(torch.stack(list(parts)), length).unbind())

    def _unit_rows(self, bases: Sequence[Tensor]) -> list[Tensor]:
        """This process's rows of the unit vectors that column indices stand for."""
        held = torch.arange(*self._sharding.bounds(self._columns), device=bases[0].device)
        return [(held[:, None] == chosen).to(self._dtype) for chosen in bases]
