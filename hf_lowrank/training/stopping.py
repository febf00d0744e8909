"""On SIGTERM a run saves at the end of its step and stops; the next call goes on to the same bits.

That checkpoint is off the run's schedule: it is marked, carries what Trainer has added up since its last log, and is
gone as soon as a later one is whole. What an undisturbed run leaves is left.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import UserError
from hf_lowrank.runs.resume import step_of
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json
from hf_lowrank.training.callbacks import anywhere

logger = logging.getLogger(__name__)

MARK = "interim.json"


class StopOnSignal(TrainerCallback):
    """Saves and stops at the end of the step in which SIGTERM came; a second SIGTERM ends the process at once.

    It has to come after the callback that logs at every checkpoint and before those that write beside checkpoints.

    Attributes:
        stopped: the step after which the run stopped before its end, None where it did not.
    """

    def __init__(self, resumed: Path | None) -> None:
        self.stopped: int | None = None
        self.trainer: Trainer | None = None
        self._resumed, self._asked, self._off_schedule = resumed, False, False
        self._before: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        if self._resumed is not None and is_interim(self._resumed) and self.trainer is not None:
            losses, logged = _read_mark(self._resumed)
            own = losses[args.process_index] if len(losses) == args.world_size else sum(losses) / len(losses)
            self.trainer._tr_loss = torch.tensor(own, device=args.device)
            self.trainer._globalstep_last_logged = logged

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if anywhere(self._asked, args.device) and state.global_step < state.max_steps:
            self._off_schedule = not control.should_save
            self.stopped = state.global_step
            control.should_save = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.stopped is not None:
            control.should_training_stop = True  # after the state is saved: an undisturbed run's does not say so
        if self.trainer is None or not self._off_schedule:
            return control
        losses = _of_all_processes(self.trainer._tr_loss.item())
        if state.is_world_process_zero:
            content = {"losses": losses, "last_logged": self.trainer._globalstep_last_logged}
            write_text(folder / MARK, json.dumps(content) + "\n")
        return control

    def release(self) -> None:
        """Gives the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _ask(self, *_: Any) -> None:
        self._asked = True
        self.release()


class InterimRemoved(TrainerCallback):
    """Once a checkpoint is whole, those off the schedule before it go. It comes after whatever completes it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            remove_interim(Path(str(args.output_dir)), state.global_step)


def is_interim(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved off the schedule, because the run was asked to stop."""
    return (checkpoint / MARK).is_file()


def remove_interim(run: Path, before: int) -> None:
    """Removes the checkpoints off the schedule of steps before `before`."""
    for mark in run.glob(f"checkpoint-*/{MARK}"):
        if step_of(mark.parent) < before:
            shutil.rmtree(mark.parent)
            logger.debug("%s was off the schedule and is gone", mark.parent)


def _read_mark(checkpoint: Path) -> tuple[list[float], int]:
    file = checkpoint / MARK
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        return [float(loss) for loss in content["losses"]], int(content["last_logged"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{file}: damaged ({' '.join(str(error).split())}); remove {checkpoint}") from None


def _of_all_processes(value: float) -> list[float]:
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
