"""Processes that evaluate models together: they hold shards of one model, or a replica each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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
