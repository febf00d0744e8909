"""Memory in a run's facts: the estimate when training starts, and the measured peak when it ends."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.compat import profiled_allocation, profiler_enabled
from hf_lowrank.errors import UserError, first_line
from hf_lowrank.formats import byte_size
from hf_lowrank.memory.estimates import MemoryEstimate, estimate
from hf_lowrank.optim.sharding import local_part
from hf_lowrank.training.recipe import Recipe

logger = logging.getLogger(__name__)

STEPS = 2
# An evaluation that is estimated below this share of the peak is not measured.
NEAR = 0.8
ITEMS = ("weights", "gradients", "optimizer_state", "activations", "workspace", "estimated_peak")


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
    """The peak of torch's CPU allocator from `start` to `stop`, e.g. during a few steps of a real training.

    The profiler reports every block that is allocated or freed while it is active; what was held before is counted
    from the tensors. The computation does not change, and outside the measured steps nothing runs at all. Start it
    between steps: older blocks that are freed before `stop` count as held.
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
        """The most bytes held since `start`."""
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


class MemoryRecorder(TrainerCallback):
    """Logs an estimate (if there is one), measures the peak, and keeps both as `facts["memory"]`.

    On an accelerator the peak is torch's own, of the whole training. On the CPU the first two steps are measured (the
    first creates the optimizer state and chooses subspaces, the second is typical), and the first evaluation if it may
    hold more; the rest of the training is not affected. A value that was measured before an interruption stays.
    """

    def __init__(self, estimate: MemoryEstimate | None, facts: dict[str, Any]) -> None:
        self._estimate, self._facts = estimate, facts
        before = facts.get("memory") or {}
        self._measured: int | None = before.get("measured_peak")
        self._watch = AllocatorPeak()
        self._steps = STEPS if self._measured is None else 0
        may_peak = estimate is None or estimate.phases.get("evaluation", 0) > NEAR * estimate.peak
        self._evaluations = 1 if self._measured is None and may_peak else 0
        self._keep()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if self._estimate is not None and state.is_world_process_zero:
            logger.info("memory: estimated peak %s (%s)", byte_size(self._estimate.peak), self._estimate.peak_phase)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._steps and not self._watch.running and args.device.type == "cpu":
            self._start(kw)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._watch.running and self._steps:
            self._steps -= 1
            last = state.global_step >= state.max_steps or control.should_evaluate or control.should_save
            if not self._steps or last:
                self._steps = 0
                self._take(self._watch.stop())
        if self._evaluations and control.should_evaluate and not self._watch.running and args.device.type == "cpu":
            self._evaluations -= 1
            self._start(kw)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._watch.running and not self._steps:
            self._take(self._watch.stop())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Gives trackers, which come after it, the estimated and the measured peak as far as they are known."""
        if args.report_to:
            sizes = {"measured": self._measured, "estimated": self._estimate and self._estimate.peak}
            kw["logs"].update({f"memory/{kind}_peak_bytes": size for kind, size in sizes.items() if size is not None})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._read_accelerator(args)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._watch.running:
            self._take(self._watch.stop())
        self._read_accelerator(args)
        if state.is_world_process_zero and self._measured is not None and self._estimate is not None:
            logger.info(
                "memory: measured peak %s, estimated %s (ratio %.2f)",
                byte_size(self._measured),
                byte_size(self._estimate.peak),
                self._estimate.peak / self._measured,
            )

    def close(self) -> None:
        """Stops a measurement that a failed training left running."""
        if self._watch.running:
            self._watch.stop()

    def _start(self, around: dict[str, Any]) -> None:
        optimizer = around.get("optimizer")
        self._watch.start(around["model"], getattr(optimizer, "optimizer", optimizer))

    def _read_accelerator(self, args: TrainingArguments) -> None:
        if args.device.type == "cuda":
            self._take(torch.cuda.max_memory_allocated(args.device))

    def _take(self, peak: int) -> None:
        self._measured = max(self._measured or 0, peak)
        self._keep()

    def _keep(self) -> None:
        items = self._estimate.facts() if self._estimate is not None else dict.fromkeys(ITEMS)
        self._facts["memory"] = {**items, "measured_peak": self._measured}


def memory_recorder(
    recipe: Recipe, args: TrainingArguments, model: nn.Module, facts: dict[str, Any]
) -> MemoryRecorder:
    """The recorder of a run by `recipe`; without an estimate if there can be none."""
    sharded = args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    expected = None
    try:
        expected = estimate(
            recipe,
            world_size=args.world_size,
            sharding=None if args.world_size == 1 else "fsdp2" if sharded else "ddp",
            device=args.device.type,
            vocabulary_size=model.get_input_embeddings().weight.shape[0],  # type: ignore[operator]
        )
    except Exception as error:  # a model or an optimizer may do anything that fake tensors do not support
        named = isinstance(error, UserError)
        logger.warning("memory: %s", error if named else f"no estimate: {type(error).__name__}: {first_line(error)}")
    return MemoryRecorder(expected, facts)
