"""What one process holds of a parameter: all of it, or the part that FSDP2 (`fully_shard`) left it.

FSDP2 divides a tensor's first dimension into chunks of ⌈length / processes⌉; the last ones may be shorter, or empty.
Seen as rows by columns, a matrix is divided by rows and a one-dimensional parameter, a single row, by columns.
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


def local(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`: of a DTensor its shard, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Part:
    """The part of a parameter that this process holds.

    Attributes:
        held_RC: its entries as rows by columns.
        shape: (rows, columns) of the whole parameter.
        row, column: where `held_RC` begins in the whole.
        norm: of the whole parameter; None where it is all held here and can be had from it.
    """

    held_RC: Tensor
    shape: tuple[int, int]
    row: int = 0
    column: int = 0
    norm: float | None = None

    @property
    def device(self) -> torch.device:
        return self.held_RC.device

    @property
    def whole_rows(self) -> bool:
        """Whether rows are held from their first to their last entry."""
        return self.held_RC.shape[1] == self.shape[1]

    @property
    def handed(self) -> Tensor | Part:
        """What a `Direction` is handed: the tensor, where all of it is held here."""
        return self.held_RC if tuple(self.held_RC.shape) == self.shape else self

    def rows(self, start: int, stop: int) -> slice:
        """Which of the rows held here lie among the whole's rows `start` … `stop`."""
        count = self.held_RC.shape[0]
        low, high = max(start - self.row, 0), min(stop - self.row, count)
        return slice(low, max(low, high))

    def cut(self, block: Tensor, start: int) -> Tensor:
        """Of `block`, the whole's rows from `start` on, what lies in this part."""
        rows = self.rows(start, start + block.shape[0])
        first = self.row - start
        return block[rows.start + first : rows.stop + first, self.column : self.column + self.held_RC.shape[1]]

    def total_norm(self) -> float:
        """The norm of the whole parameter."""
        return float(torch.linalg.vector_norm(self.held_RC)) if self.norm is None else self.norm


def part_of(tensor: Tensor, norm: float | None = None) -> Part:
    """The part of `tensor` that is here.

    Raises:
        ValueError: a DTensor that is not divided by its first dimension over one group of processes.
    """
    if not isinstance(tensor, DTensor):
        rows = as_rows(tensor)
        return Part(rows, (rows.shape[0], rows.shape[1]))
    check_division(tensor)
    length, mesh = tensor.shape[0], tensor.device_mesh
    first = min(mesh.get_local_rank() * -(-length // mesh.size()), length)
    if tensor.ndim < 2:
        return Part(as_rows(local(tensor)), (1, length), column=first, norm=norm)
    held_RC = as_rows(local(tensor))
    return Part(held_RC, (length, held_RC.shape[1]), row=first, norm=norm)


def check_division(tensor: DTensor) -> None:
    """Raises ValueError where a DTensor is divided otherwise than FSDP2 divides parameters on one mesh dimension."""
    placement = tensor.placements[0]
    if tensor.device_mesh.ndim != 1 or type(placement) is not Shard or placement.dim != 0:
        placed = ", ".join(map(str, tensor.placements))
        raise ValueError(f"parameters must be divided by their first dimension, as fully_shard does, got {placed}")


def norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Norms by name. A DTensor is made whole for it, one at a time, so that its norm has the bits it has undivided;
    every process comes by here.
    """
    return {name: float(torch.linalg.vector_norm(whole(tensor))) for name, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, a DTensor gathered from all processes, each of which calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def summed(summands: Tensor, like: Tensor) -> Tensor:
    """The sum over the processes among which `like` is divided, the same bits on all of them."""
    if not isinstance(like, DTensor):
        return summands
    total = summands.to(like.device, copy=True)
    dist.all_reduce(total, group=like.device_mesh.get_group())
    return total.to(summands.device)
