"""Logs the memory estimate when training starts and the measured peak when it ends; both go to `facts.json`."""

import logging
from typing import Any, Literal

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import UserError
from hf_lowrank.formats import byte_size
from hf_lowrank.memory.estimates import MemoryEstimate, estimate
from hf_lowrank.memory.measured import AllocatorPeak
from hf_lowrank.training.recipe import Recipe, first_line

logger = logging.getLogger(__name__)

STEPS = 2
# An evaluation that is estimated below this share of the peak is not measured.
NEAR = 0.8
ITEMS = ("weights", "gradients", "optimizer_state", "activations", "workspace", "estimated_peak")


class MemoryRecorder(TrainerCallback):
    """Logs an estimate, measures the peak, and keeps both as `facts["memory"]`.

    On an accelerator the peak is torch's own, of the whole training. On the CPU the first two steps are measured (the
    first creates the optimizer state and chooses subspaces, the second is typical), and the first evaluation if it may
    hold more; the rest of the training is not affected. A value that was measured before an interruption stays.

    Args:
        estimate: the estimate, or None; then only the peak is recorded.
        facts: the run's facts, updated in place.
    """

    def __init__(self, estimate: MemoryEstimate | None, facts: dict[str, Any]) -> None:
        self._estimate, self._facts = estimate, facts
        before = facts.get("memory") or {}
        self._measured: int | None = before.get("measured_peak")
        self._watch = AllocatorPeak()
        self._steps = STEPS if self._measured is None else 0
        self._evaluations = 1 if self._measured is None and self._evaluation_may_peak() else 0
        self._keep()

    def _evaluation_may_peak(self) -> bool:
        if self._estimate is None:
            return True
        phases = self._estimate.phases
        return phases.get("evaluation", 0) > NEAR * max(phases.values())

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
                self._stop()
        if self._evaluations and control.should_evaluate and not self._watch.running and args.device.type == "cpu":
            self._evaluations -= 1
            self._start(kw)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._watch.running and not self._steps:
            self._stop()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._read_accelerator(args)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._watch.running:
            self._stop()
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

    def _stop(self) -> None:
        self._take(self._watch.stop())

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
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        sharding = "fsdp2"
    expected = None
    try:
        expected = estimate(
            recipe,
            world_size=args.world_size,
            sharding=sharding if args.world_size > 1 else None,
            device=args.device.type,
            vocabulary_size=model.get_input_embeddings().weight.shape[0],  # type: ignore[operator]
        )
    except Exception as error:  # a model or an optimizer may do anything that fake tensors do not support
        named = isinstance(error, UserError)
        logger.warning("memory: %s", error if named else f"no estimate: {type(error).__name__}: {first_line(error)}")
    return MemoryRecorder(expected, facts)
