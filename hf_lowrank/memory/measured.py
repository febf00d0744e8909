"""The peak of torch's CPU allocator during a few steps of a real training.

The profiler reports every block that is allocated or freed while it is active; what was held before is counted from
the tensors. The computation does not change, and outside the measured steps nothing runs at all.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_lowrank.compat import profiled_allocation, profiler_enabled
from hf_lowrank.optim.sharding import local_part


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages of `tensors` in this process, each counted once."""
    sizes = {}
    for tensor in tensors:
        if tensor is not None:
            storage = local_part(tensor.detach()).untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def resident_tensors(model: nn.Module, optimizer: Optimizer | None) -> list[Tensor | None]:
    """What is kept between steps: parameters, gradients if any, buffers, optimizer state."""
    found: list[Tensor | None] = [*model.parameters(), *model.buffers()]
    found += [parameter.grad for parameter in model.parameters()]
    if optimizer is not None:
        values = (value for state in optimizer.state.values() for value in state.values())
        found += [value for value in values if isinstance(value, Tensor)]
    return found


class AllocatorPeak:
    """Measures from `start` to `stop`.

    Start it between steps: older blocks that are freed before `stop` count as held.
    """

    def __init__(self) -> None:
        self._profile: Any = None
        self._before = 0

    def start(self, model: nn.Module, optimizer: Optimizer | None = None) -> bool:
        """Starts; returns False if the profiler is already in use."""
        if profiler_enabled():
            return False
        self._before = storage_bytes(resident_tensors(model, optimizer))
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        known_before = torch.empty(1)
        with _quiet():
            self._profile.start()
            # torch warns about the first freed block that it has not seen allocated: let that be this one.
            del known_before
        return True

    @property
    def running(self) -> bool:
        return self._profile is not None

    def stop(self) -> int:
        """Ends; returns the most bytes held since `start`."""
        profile, self._profile = self._profile, None
        with _quiet():
            profile.stop()
        held: dict[int, int] = {}
        balance = highest = 0
        for _, address, size in sorted(_blocks(profile.profiler.kineto_results.experimental_event_tree())):
            if size > 0:
                held[address] = size
                balance += size
                highest = max(highest, balance)
            else:
                # Unknown addresses are older blocks.
                balance -= held.pop(address, 0)
        return self._before + highest


def _blocks(events: list[Any]) -> Iterator[tuple[int, int, int]]:
    """Time, address and size of each block that was allocated (positive) or freed."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == profiled_allocation:
            block = event.extra_fields
            yield event.start_time_ns, block.ptr, block.alloc_size


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the profiler's library writes to the process's stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
