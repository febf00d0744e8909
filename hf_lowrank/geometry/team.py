"""Processes that hold one model together and divide the sequences of a batch among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


class Team:
    """The processes among which a model's parameters are divided (FSDP2).

    Whatever calls the model is called on all of them, as often: each forward pass gathers weights from all.

    Args:
        group: the processes, for tensors on the model's device; None: all.
        host: the same processes, for tensors on the CPU; None: `group` carries those too.
    """

    def __init__(self, group: Any = None, host: Any = None) -> None:
        self.group, self.host = group, group if host is None else host
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def share(self, items_B: Tensor) -> Tensor:
        """This process's ⌈B / size⌉ of B items; where they do not go up, the last one is there more than once."""
        length = items_B.shape[0]
        count = -(-length // self.size)
        places = torch.arange(self.rank * count, (self.rank + 1) * count, device=items_B.device)
        return items_B[places.clamp_max(length - 1)]

    def join(self, share: Tensor, length: int) -> Tensor:
        """The shares of all processes in order, on the CPU: `length` items."""
        share = share.contiguous()
        shares = [torch.empty_like(share) for _ in range(self.size)]
        dist.all_gather(shares, share, group=self.host)
        return torch.cat(shares)[:length]

    def join_at(self, owner: int, share: Tensor, length: int) -> Tensor | None:
        """As `join`, on the model's device and at process `owner` alone; None at the others."""
        share = share.contiguous()
        shares = [torch.empty_like(share) for _ in range(self.size)] if self.rank == owner else None
        dist.gather(share, shares, group=self.group, group_dst=owner)
        return None if shares is None else torch.cat(shares)[:length]

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """Every `size`-th item: what this process does of work that needs no model."""
        return items[self.rank :: self.size]

    def in_order(self, shares: Sequence[Sequence[R]], length: int) -> list[R]:
        """What came of the processes' `own` items, in the order of all `length` items."""
        return [shares[place % self.size][place // self.size] for place in range(length)]

    def exchange(self, item: T) -> list[T]:
        """What each process gave, in their order."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.host)
        return items

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`[work(item) for item in items]`, every process doing its own; all have a model of their own.

        Raises:
            RuntimeError: the work failed in another process; names it. What fails here is raised as it is.
        """
        own, fault = [], None
        try:
            own = [work(item) for item in self.own(items)]
        except Exception as error:  # raised again once the others, who wait, have been told
            fault = error
        shares = self.exchange((own, None if fault is None else f"{type(fault).__name__}: {fault}"))
        if fault is not None:
            raise fault
        for rank, (_, reason) in enumerate(shares):
            if reason is not None:
                raise RuntimeError(f"process {rank}: {reason}")
        return self.in_order([done for done, _ in shares], len(items))


def each(work: Callable[[T], R], items: Iterable[T], replicas: Team | None) -> list[R]:
    """`[work(item) for item in items]`, divided among `replicas` where there are several."""
    return [work(item) for item in items] if replicas is None else replicas.each(work, list(items))
