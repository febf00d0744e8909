"""Processes that evaluate models together, and what one of them holds of a parameter.

They hold shards of one model, or a replica each. FSDP2 (`fully_shard`) splits a tensor's first dimension into chunks
of ⌈length / processes⌉; the last ones may be shorter or empty. Seen as rows by columns, a matrix is split by rows, and
a one-dimensional parameter, a single row, by columns.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

T = TypeVar("T")
R = TypeVar("R")


class ProcessGroup:
    """A group of processes that call everything below equally often, in the same order.

    Args:
        group: torch's process group for tensors on the model's device; None: the default group of all processes.
        cpu_group: the same processes, for tensors on the CPU; None: `group` serves for those too.
    """

    def __init__(self, group: Any = None, cpu_group: Any = None) -> None:
        self.group, self.cpu_group = group, group if cpu_group is None else cpu_group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def batch_slice(self, items_B: Tensor) -> Tensor:
        """This process's ⌈B / size⌉ of B items; the last item is repeated where B is not a multiple of the size."""
        length = items_B.shape[0]
        count = -(-length // self.size)
        indices = torch.arange(self.rank * count, (self.rank + 1) * count, device=items_B.device)
        return items_B[indices.clamp_max(length - 1)]

    def gather_batch(self, batch_slice: Tensor, length: int) -> Tensor:
        """The slices of all processes concatenated on the CPU: `length` items."""
        batch_slice = batch_slice.contiguous()
        slices = [torch.empty_like(batch_slice) for _ in range(self.size)]
        dist.all_gather(slices, batch_slice, group=self.cpu_group)
        return torch.cat(slices)[:length]

    def gather_batch_at(self, owner: int, batch_slice: Tensor, length: int) -> Tensor | None:
        """Like `gather_batch`, on the model's device and in process `owner` only; None in the others."""
        batch_slice = batch_slice.contiguous()
        slices = [torch.empty_like(batch_slice) for _ in range(self.size)] if self.rank == owner else None
        dist.gather(batch_slice, slices, group=self.group, group_dst=owner)
        return None if slices is None else torch.cat(slices)[:length]

    def strided(self, items: Sequence[T]) -> Sequence[T]:
        """Every `size`-th item from `rank` on: the items of this process, for work that needs no model."""
        return items[self.rank :: self.size]

    def interleave(self, results: Sequence[Sequence[R]], length: int) -> list[R]:
        """All processes' results for their `strided` items, in the order of all `length` items."""
        return [results[index % self.size][index // self.size] for index in range(length)]

    def all_gather(self, item: T) -> list[T]:
        """Every process's item, by rank."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.cpu_group)
        return items

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`[work(item) for item in items]`, split over processes that each hold a replica of the model.

        Raises:
            RuntimeError: the work failed in another process; the message names it. An error of this process is
                raised unchanged.
        """
        own, failure = [], None
        try:
            own = [work(item) for item in self.strided(items)]
        except Exception as error:  # raised below, once the waiting processes know of it
            failure = error
        gathered = self.all_gather((own, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for rank, (_, reason) in enumerate(gathered):
            if reason is not None:
                raise RuntimeError(f"process {rank}: {reason}")
        return self.interleave([results for results, _ in gathered], len(items))


def map_over(replicas: ProcessGroup | None, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`[work(item) for item in items]`, split over `replicas` where there are several."""
    return [work(item) for item in items] if replicas is None else replicas.map(work, list(items))


def as_rows(tensor: Tensor) -> Tensor:
    """A view of a parameter as (rows, columns); one-dimensional ones are one row."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def local_tensor(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that this process holds; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class LocalShard:
    """The entries of a parameter that this process holds: all of them, unless it is a DTensor.

    Attributes:
        entries_RC: as rows by columns.
        shape: (rows, columns) of the full parameter.
        row, column: indices of the first entry in the full parameter.
        full_norm: of the full parameter; None where all of it is held here.
    """

    entries_RC: Tensor
    shape: tuple[int, int]
    row: int = 0
    column: int = 0
    full_norm: float | None = None

    @property
    def has_full_rows(self) -> bool:
        return self.entries_RC.shape[1] == self.shape[1]

    def local_rows(self, start: int, stop: int) -> slice:
        """The rows held here that are among rows `start` … `stop` of the full parameter, as local indices."""
        low, high = max(start - self.row, 0), min(stop - self.row, self.entries_RC.shape[0])
        return slice(low, max(low, high))

    def entries(self, start: int, stop: int) -> Tensor:
        """The entries held here of rows `start` … `stop` of the full parameter."""
        return self.entries_RC[self.local_rows(start, stop)]

    def crop(self, block: Tensor, start: int) -> Tensor:
        """The entries of `block`, rows of a tensor of the parameter's shape from `start` on, that match those here."""
        rows = self.local_rows(start, start + block.shape[0])
        offset = self.row - start
        columns = slice(self.column, self.column + self.entries_RC.shape[1])
        return block[rows.start + offset : rows.stop + offset, columns]

    def norm(self) -> float:
        """The norm of the full parameter."""
        return float(torch.linalg.vector_norm(self.entries_RC)) if self.full_norm is None else self.full_norm


def local_shard(tensor: Tensor, full_norm: float | None = None) -> LocalShard:
    """The shard of `tensor` that this process holds.

    Raises:
        ValueError: a DTensor that is not sharded by its first dimension over one group of processes.
    """
    entries_RC = as_rows(local_tensor(tensor))
    if not isinstance(tensor, DTensor):
        return LocalShard(entries_RC, (entries_RC.shape[0], entries_RC.shape[1]))
    length, mesh, placement = tensor.shape[0], tensor.device_mesh, tensor.placements[0]
    if mesh.ndim != 1 or type(placement) is not Shard or placement.dim != 0:
        placements = ", ".join(map(str, tensor.placements))
        raise ValueError(f"parameters must be sharded by their first dimension, as fully_shard does, got {placements}")
    first = min(mesh.get_local_rank() * -(-length // mesh.size()), length)
    if tensor.ndim < 2:
        return LocalShard(entries_RC, (1, length), column=first, full_norm=full_norm)
    return LocalShard(entries_RC, (length, entries_RC.shape[1]), row=first, full_norm=full_norm)


def full_norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Norms by name. DTensors are gathered one at a time, so that their norms have the bits of unsharded tensors; all
    processes must call this.
    """
    return {name: float(torch.linalg.vector_norm(full_tensor(tensor))) for name, tensor in tensors.items()}


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all processes, each of which must call this; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_over_shards(summand: Tensor, like: Tensor) -> Tensor:
    """The sum over the processes among which `like` is sharded, with the same bits in all of them."""
    if not isinstance(like, DTensor):
        return summand
    total = summand.to(like.device, copy=True)
    dist.all_reduce(total, group=like.device_mesh.get_group())
    return total.to(summand.device)
