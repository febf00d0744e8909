"""Wires between Trainer and this package's view of a run."""

from __future__ import annotations

import logging
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

logger = logging.getLogger(__name__)


class FinalCheckpoint(TrainerCallback):
    """The last step is evaluated and saved, whatever the intervals are."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_save = True
            control.should_log = True
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO
        return control


class Progress(TrainerCallback):
    """A bar in a terminal, once training takes over two seconds; the losses as log lines."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(
                desc="training", total=state.max_steps, initial=state.global_step, delay=2, disable=None, leave=False
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        shown = {key: logs[key] for key in ("loss", "eval_loss", "learning_rate") if key in logs}
        if shown:
            logger.info(
                "step %d of %d: %s",
                state.global_step,
                state.max_steps,
                ", ".join(f"{key} {value:.4g}" for key, value in shown.items()),
            )
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
