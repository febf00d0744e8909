"""Sharing the work over the processes of `accelerate launch`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from hf_lowrank.errors import UserError
from hf_lowrank.runs.measurements import append_measurements, read_measurements

T = TypeVar("T")

# Shares of the work may take hours more than others; a launcher ends all processes when it loses one.
LONGEST_WAIT = timedelta(days=30)


class Processes:
    """This process among those that measure together.

    Each writes what it measures into a part file beside the table; the first merges the parts, at the end and, for
    those that a killed run left, at the beginning. Where they hold models together, all do everything, and the first
    writes.

    Args:
        device: where models are evaluated; None: accelerate's choice.
        together: whether they hold models together.

    Raises:
        UserError: there are no several processes to hold models together, or those that are there cannot be joined;
            later: a process was lost.
    """

    def __init__(self, device: str | torch.device | None = None, *, together: bool = False) -> None:
        if together and int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise UserError(
                "sharded=True (--sharded) divides every model among the processes of a launch, got one process; start "
                "several with accelerate launch --num_processes N, or torchrun --nproc-per-node N on CPUs"
            )
        self.together = together
        self._state: Any = None
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if several or device is None:
            from accelerate import PartialState
            from accelerate.utils import parse_flag_from_env

            # Between processors tensors travel by other means than between accelerators, and accelerate joins them
            # only where it is told to.
            cpu = torch.device(device).type == "cpu" if device is not None else not torch.accelerator.is_available()
            options = {} if together or not several else {"timeout": LONGEST_WAIT}
            self._state = PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), **options)
            if several and self._state.num_processes == 1:
                raise UserError(
                    f"accelerate cannot join {os.environ['WORLD_SIZE']} processes on {self._state.device.type}, they "
                    "would all do the same work; start one, or choose --device cpu"
                )
        self.index = self._state.process_index if self._state is not None else 0
        self.count = self._state.num_processes if self._state is not None else 1
        self.device = torch.device(device) if device is not None else self._state.device

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes what it measures."""
        return self.first or not self.together

    def share(self, work: Sequence[T], cost: Callable[[T], float] = lambda item: 1.0) -> list[T]:
        """This process's part of the work: consecutive items, so that neighbours share what they read.

        Shares cost alike as far as whole items allow: an item is its process's in whose part of the total its middle
        lies.
        """
        if self.together:
            return list(work)
        costs = [cost(item) for item in work]
        total, before, own = sum(costs), 0.0, []
        for item, weight in zip(work, costs, strict=True):
            if min(int((before + weight / 2) / total * self.count), self.count - 1) == self.index:
                own.append(item)
            before += weight
        return own

    def rounds(self, work: Sequence[T]) -> tuple[list[T], list[T]]:
        """What goes up in shares of whole items, and the rest: fewer items than processes, which do them together."""
        rest = 0 if self.together else len(work) % self.count
        return list(work[: len(work) - rest]), list(work[len(work) - rest :])

    def part(self, file: Path) -> Path:
        """Where this process writes rows of `file`."""
        return file if self.count == 1 or self.together else file.with_name(f".{file.stem}-{self.index}.part.jsonl")

    def merge_parts(
        self,
        files: Sequence[Path],
        read: Callable[[Path], Sequence[Any]] = read_measurements,
        append: Callable[[Path, Sequence[Any]], None] = append_measurements,
    ) -> None:
        """Waits for all processes, then moves the rows of part files into their tables."""
        self._wait()
        if self.first:
            for file in dict.fromkeys(files):
                for part in sorted(file.parent.glob(f".{file.stem}-*.part.jsonl")):
                    append(file, read(part))
                    part.unlink()
        self._wait()

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process; the others wait for it, and find in the cache what it left there."""
        made: list[Any] = [make() if self.first else None]
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            with _lost_is_one_line():
                broadcast_object_list(made)
        return made[0]

    def _wait(self) -> None:
        if self.count > 1:
            with _lost_is_one_line():
                self._state.wait_for_everyone()


@contextmanager
def _lost_is_one_line() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # the connection to it ends with a process
        raise UserError(
            "another process of this launch was lost; what was written stays, start again to go on"
        ) from None
