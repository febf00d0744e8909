"""The estimate logged when training begins, the measured peak beside it when it ends, and both in `facts.json`."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import UserError
from hf_lowrank.memory.estimates import MemoryEstimate, estimate
from hf_lowrank.memory.measured import AllocatorPeak
from hf_lowrank.memory.units import size_text
from hf_lowrank.training.recipe import Recipe, first_line

logger = logging.getLogger(__name__)

STEPS = 2
# An evaluation that is estimated below this share of the peak is not watched: it cannot be the peak.
NEAR = 0.8
ITEMS = ("weights", "gradients", "optimizer_state", "activations", "workspace", "estimated_peak")


def memory_recorder(
    recipe: Recipe, args: TrainingArguments, model: nn.Module, facts: dict[str, Any]
) -> MemoryRecorder:
    """The recorder of a run by `recipe`; what cannot be estimated is trained and measured all the same."""
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
    except Exception as error:  # whatever a model or an optimizer does that tensors without memory cannot do
        named = isinstance(error, UserError)
        logger.warning("memory: %s", error if named else f"no estimate: {type(error).__name__}: {first_line(error)}")
    return MemoryRecorder(expected, facts)


class MemoryRecorder(TrainerCallback):
    """Logs an estimate, measures the peak, and keeps both as `facts["memory"]`.

    On an accelerator the peak is torch's own count from the beginning to the end. On the CPU the first two steps are
    watched (the first makes the optimizer's state and chooses its subspaces, the second is like those to come), and
    the first evaluation where it may hold more; the rest of the training runs untouched. What was measured before an
    interruption stays.

    Args:
        estimate: what is expected, or None where that is not known; then only the peak is recorded.
        facts: the run's facts, which whoever writes them takes over.
    """

    def __init__(self, estimate: MemoryEstimate | None, facts: dict[str, Any]) -> None:
        self._estimate, self._facts = estimate, facts
        before = facts.get("memory") or {}
        self._measured: int | None = before.get("measured_peak")
        self._watch = AllocatorPeak()
        self._steps = STEPS if self._measured is None else 0
        self._evaluations = 1 if self._measured is None and self._evaluation_may_be_it() else 0
        self._keep()

    def _evaluation_may_be_it(self) -> bool:
        if self._estimate is None:
            return True
        phases = self._estimate.phases
        return phases.get("evaluation", 0) > NEAR * max(phases.values())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if self._estimate is not None and state.is_world_process_zero:
            logger.info(
                "memory: %s expected at the most, at %s",
                size_text(self._estimate.peak),
                self._estimate.peak_phase,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._steps and not self._watch.running and args.device.type == "cpu":
            self._start(kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._watch.running and self._steps:
            self._steps -= 1
            last = state.global_step >= state.max_steps or control.should_evaluate or control.should_save
            if not self._steps or last:
                self._steps = 0
                self._stop()
        if self._evaluations and control.should_evaluate and not self._watch.running and args.device.type == "cpu":
            self._evaluations -= 1
            self._start(kwargs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._watch.running and not self._steps:
            self._stop()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._read_accelerator(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._watch.running:
            self._stop()
        self._read_accelerator(args)
        if state.is_world_process_zero and self._measured is not None and self._estimate is not None:
            logger.info(
                "memory: %s measured at most, %s estimated (%.2f of it)",
                size_text(self._measured),
                size_text(self._estimate.peak),
                self._estimate.peak / self._measured,
            )

    def close(self) -> None:
        """Ends what a training that failed left running."""
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
