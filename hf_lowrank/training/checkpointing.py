"""Checkpoints of a run, in one order: when they are saved, what completes them, how SIGTERM stops and resumes a run.

On SIGTERM a run saves at the end of its step and stops. Unless that step is one of the schedule's, the checkpoint is
*interim*: it is marked, it stores the loss that Trainer has summed up since its last log, and it is removed as soon as
a later checkpoint is complete. The final files therefore match those of an uninterrupted run.
"""

import json
import logging
import shutil
import signal
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_lowrank.compat import set_unlogged_loss, unlogged_loss
from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs import layout
from hf_lowrank.runs.layout import checkpoint_folder, step_of
from hf_lowrank.storage.checksums import write_checksums
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json
from hf_lowrank.training.callbacks import check_finite, in_any_process
from hf_lowrank.training.stream import StreamPlaces

logger = logging.getLogger(__name__)

INTERIM_FILE = layout.INTERIM


class Checkpointing(TrainerCallback):
    """Decides at the end of a step whether to save, and completes what Trainer has saved.

    It must be the first of a run's callbacks: the others read its decision to save.

    Args:
        resumed: the checkpoint that the run resumes from; None for a new run.
        write_facts: writes `facts.json`, given the step and the optimizer.
        epoch: the steps of one pass over the training sequences, a fraction; None for a stream. To Trainer all passes
            are one epoch, so strategies "epoch" are followed here.
        places: of a stream: they save the place after a step into its checkpoint, and forget those of other steps.
    """

    def __init__(
        self,
        resumed: Path | None,
        write_facts: Callable[[int, Any], None],
        epoch: Fraction | None = None,
        places: StreamPlaces | None = None,
    ) -> None:
        self.trainer: Trainer | None = None  # set once it exists
        self.stopped: int | None = None  # the step after which SIGTERM stopped the run
        self._resumed, self._write_facts = resumed, write_facts
        self._epoch, self._places = epoch, places
        self._signalled = self._interim = False
        self._previous_handler: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_signal)
        if self.trainer is not None and self._resumed is not None and is_interim(self._resumed):
            _restore_interim(self.trainer, self._resumed)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._places is not None:
            self._places.forget(state.global_step - 1)
        if self._epoch is not None and state.global_step // self._epoch > (state.global_step - 1) // self._epoch:
            passes = state.global_step // self._epoch
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= passes
        if state.global_step >= state.max_steps:
            control.should_save = True
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO
        # Trainer logs the mean loss since its last log, and forgets the sum when it resumes. Logging at every
        # scheduled checkpoint lets a resumed run log what an uninterrupted one does.
        control.should_log = control.should_log or control.should_save
        if in_any_process(self._signalled, args.device) and state.global_step < state.max_steps:
            self.stopped = state.global_step
            self._interim = not control.should_save
            control.should_save = True
        if control.should_save:
            check_finite(kw["model"], kw["optimizer"], args, state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save = control.should_log = control.should_evaluate = False  # done at the end of the step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        run = Path(str(args.output_dir))
        checkpoint = checkpoint_folder(run, state.global_step)
        if self.stopped is not None:
            # Only now: the saved state of an uninterrupted run does not contain it.
            control.should_training_stop = True
        if self._interim and self.trainer is not None:
            _mark_interim(self.trainer, checkpoint)
        save_full_weights(kw["model"], checkpoint, kw["processing_class"], is_writer=state.is_world_process_zero)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # every process has written its part
        if state.is_world_process_zero:
            self._write_facts(state.global_step, kw["optimizer"])
            if self._places is not None:
                self._places.save(state.global_step, checkpoint)
            write_checksums(checkpoint)  # completes the checkpoint
            remove_interim(run, before=state.global_step)

    def release(self) -> None:
        """Restores the previous SIGTERM handler."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def _on_signal(self, *_: Any) -> None:
        self._signalled = True
        self.release()  # a second SIGTERM ends the process at once


def save_full_weights(
    model: PreTrainedModel, checkpoint: Path, tokenizer: PreTrainedTokenizerBase | None, *, is_writer: bool
) -> None:
    """Adds the full weights to a checkpoint of a sharded model (FSDP2), of which Trainer saves shards only.

    All later stages read the full weights. All processes must call this together; a model that is not sharded is left
    to Trainer.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_writer:
        model.save_pretrained(checkpoint, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(checkpoint)


def is_interim(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved off the schedule because the run was stopped."""
    return (checkpoint / INTERIM_FILE).is_file()


def remove_interim(run: Path, *, before: int) -> None:
    """Removes the run's interim checkpoints of steps before `before`."""
    for mark in run.glob(f"checkpoint-*/{INTERIM_FILE}"):
        if step_of(mark.parent) < before:
            shutil.rmtree(mark.parent)
            logger.debug("removed the interim checkpoint %s", mark.parent)


def _mark_interim(trainer: Trainer, checkpoint: Path) -> None:
    """Stores what Trainer keeps in memory between two logs; all processes call this together."""
    loss, last_logged = unlogged_loss(trainer)
    losses: list[float] = [loss.item()]
    if dist.is_available() and dist.is_initialized():
        gathered: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(gathered, losses[0])
        losses = gathered
    if trainer.is_world_process_zero():
        content = {"losses": losses, "last_logged": last_logged}
        write_text(checkpoint / INTERIM_FILE, json.dumps(content) + "\n")


def _restore_interim(trainer: Trainer, checkpoint: Path) -> None:
    file, args = checkpoint / INTERIM_FILE, trainer.args
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        losses, logged = [float(loss) for loss in content["losses"]], int(content["last_logged"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{file}: damaged ({one_line(error)}); remove {checkpoint}") from None
    own = losses[args.process_index] if len(losses) == args.world_size else sum(losses) / len(losses)
    set_unlogged_loss(trainer, torch.tensor(own, device=args.device), logged)
