"""The processes of `accelerate launch` or `torchrun`, how they split work, and the errors that end or fail it."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from hf_lowrank.errors import UserError, one_line

T = TypeVar("T")

# One process may need hours longer than another; a launcher ends all processes when one is lost.
LONGEST_WAIT = timedelta(days=30)


# An error of these types fails the metric or task at hand; the command continues with the next one.
RECOVERABLE_ERRORS = (
    ValueError, RuntimeError, OSError, MemoryError, LookupError, AttributeError, TypeError, ArithmeticError,
    AssertionError, ImportError,
)  # fmt: skip


class CollectiveError(UserError):
    """An error of some processes that was raised in all of them.

    Attributes:
        unexpected: whether it may have left models in the middle of a forward pass.
        own: this process's own error; None where it had none.
    """

    def __init__(self, message: str, *, unexpected: bool, own: Exception | None = None) -> None:
        super().__init__(message)
        self.unexpected = unexpected
        self.own = own


class LostProcessError(Exception):
    """Processes that work jointly cannot continue; the message says why."""


def error_line(error: BaseException) -> str:
    """The error as one line, with its type unless that is a ValueError."""
    message = one_line(error, 500)
    return (message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}")[:500]


def launched_processes() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def usable_device(named: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        UserError: this machine has none.
    """
    usable, name = ["cpu"], str(named)
    if name != "cpu" and (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        kind = accelerator.type
        usable += [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in usable:
        raise UserError(f"device must be {' or '.join(usable)} on this machine, got {name!r}")
    return torch.device(name)


class Launch:
    """This process among those of its launch.

    Args:
        device: where models are evaluated; None: accelerate's choice.
        sharded: whether the processes hold shards of every model, so that all of them do all work jointly.

    Raises:
        UserError: a device that this machine does not have, `sharded` without several processes, or processes that
            accelerate cannot connect; later: a process was lost.
    """

    def __init__(self, device: str | torch.device | None = None, *, sharded: bool = False) -> None:
        several = launched_processes() > 1
        if sharded and not several:
            raise UserError(
                "sharded=True (--sharded) shards every model over the processes of a launch, got one process; start "
                "several with accelerate launch --num_processes N, or torchrun --nproc-per-node N on CPUs"
            )
        self.sharded, self.index, self.count = sharded, 0, 1
        chosen = None if device is None else usable_device(device)
        if several or chosen is None:
            from accelerate import PartialState
            from accelerate.utils import parse_flag_from_env

            # accelerate picks the backend that connects CPUs only where `cpu` says so.
            cpu = not torch.accelerator.is_available() if chosen is None else chosen.type == "cpu"
            options = {} if sharded or not several else {"timeout": LONGEST_WAIT}
            self._state = PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), **options)
            if several and self._state.num_processes == 1:
                raise UserError(
                    f"accelerate cannot join {launched_processes()} processes on {self._state.device.type}, they "
                    "would all do the same work; start one, or choose --device cpu"
                )
            self.index, self.count = self._state.process_index, self._state.num_processes
            chosen = chosen or self._state.device
        self.device = chosen

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def split(self, units: Sequence[T], cost: Callable[[T], float]) -> tuple[list[T], list[T]]:
        """(units that this process does by itself, units that all processes do jointly).

        Each process gets consecutive units, since neighbours reuse what they read, of about the same total cost: a
        unit goes to the process in whose interval of the total cost its middle lies. What remains of the units after
        dividing their number by that of the processes is done jointly; so are all units of sharded models.
        """
        if self.sharded:
            return [], list(units)
        remaining = len(units) % self.count
        separate, joint = list(units[: len(units) - remaining]), list(units[len(units) - remaining :])
        costs = [cost(unit) for unit in separate]
        total, before, own = sum(costs), 0.0, []
        for unit, weight in zip(separate, costs, strict=True):
            if min(int((before + weight / 2) / total * self.count), self.count - 1) == self.index:
                own.append(unit)
            before += weight
        return own, joint

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process; the others wait and call nothing."""
        made: list[Any] = [make() if self.is_first else None]
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            with _lost_process_is_a_user_error():
                broadcast_object_list(made)
        return made[0]

    def wait_for_all(self) -> None:
        """Returns once every process has called it."""
        if self.count > 1:
            with _lost_process_is_a_user_error():
                self._state.wait_for_everyone()


@contextmanager
def _lost_process_is_a_user_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # the connection to a process ends with it
        raise UserError("another process of this launch was lost; finished rows are saved, rerun to resume") from None
