"""What one process holds of a parameter: all of it, or the rows that FSDP2 (`fully_shard`) gave it.

FSDP2 splits a tensor's first dimension into chunks of ⌈length / processes⌉; the last ones may be shorter or empty.
Seen as rows by columns, a matrix is split by rows, and a one-dimensional parameter, a single row, by columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


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
    _check_sharding(tensor)
    length, mesh = tensor.shape[0], tensor.device_mesh
    first = min(mesh.get_local_rank() * -(-length // mesh.size()), length)
    if tensor.ndim < 2:
        return LocalShard(entries_RC, (1, length), column=first, full_norm=full_norm)
    return LocalShard(entries_RC, (length, entries_RC.shape[1]), row=first, full_norm=full_norm)


def _check_sharding(tensor: DTensor) -> None:
    placement = tensor.placements[0]
    if tensor.device_mesh.ndim != 1 or type(placement) is not Shard or placement.dim != 0:
        placements = ", ".join(map(str, tensor.placements))
        raise ValueError(f"parameters must be sharded by their first dimension, as fully_shard does, got {placements}")


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
