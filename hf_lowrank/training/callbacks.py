"""Wires between Trainer and this package's view of a run."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_lowrank.errors import DivergedError
from hf_lowrank.storage.checksums import write_checksums
from hf_lowrank.training.sequences import IGNORED

logger = logging.getLogger(__name__)


class FinalCheckpoint(TrainerCallback):
    """The last step is evaluated and saved, whatever the intervals are; what is saved is logged.

    Trainer logs the mean loss since the last log, and forgets that sum when it is resumed: with a log at every
    checkpoint a resumed run logs what an undisturbed one does.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_save = True
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO
        control.should_log = control.should_log or control.should_save
        return control


class NumbersOnly(TrainerCallback):
    """A loss that is no number ends the run, and what weights came to by numbers that are none is never saved.

    The package's optimizers skip a gradient that is not finite and warn. A run that goes on so trains by another
    algorithm than its recipe's, and would be compared as if it had not.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        for name in ("loss", "eval_loss"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                raise _diverged(args, state, f"{name} is {value}")

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        if not control.should_save:
            return
        if anywhere(not all_finite(model), args.device):
            raise _diverged(args, state, "weights are no numbers")
        skipped = sorted(getattr(getattr(optimizer, "optimizer", optimizer), "skipped", ()))
        if anywhere(bool(skipped), args.device):
            named = f" (of {skipped[0]})" if skipped else ""
            raise _diverged(args, state, f"a gradient{named} has been no number")


def _diverged(args: TrainingArguments, state: TrainerState, what: str) -> DivergedError:
    return DivergedError(
        f"{args.output_dir}: {what} at step {state.global_step}, nothing of it is saved; lower "
        "training.learning_rate or training.max_grad_norm, or lengthen the warm-up"
    )


def all_finite(model: torch.nn.Module) -> bool:
    """Whether every parameter (of a sharded model: this process's part) holds numbers only."""
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters)


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process of the launch; all of them have to ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


class WholeWeights(TrainerCallback):
    """Of a sharded model (FSDP2) Trainer saves each process's shards; every checkpoint gets the whole weights, too.

    They are what everything after training reads, and tell that the checkpoint is whole. After this, all processes
    have written what they had to write.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if state.is_world_process_zero:
                model.save_pretrained(folder, state_dict=weights)
                tokenizer = others.get("processing_class")
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()


class Checksums(TrainerCallback):
    """Every checkpoint carries the checksums of its files, written last."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_checksums(folder)


def drop_logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """In place of a batch's logits, which Trainer would gather over the whole evaluation set: almost nothing."""
    first = logits[0] if isinstance(logits, tuple) else logits
    return first[:, :1, :1].clone()  # a view would keep all of them


def token_loss(prediction: EvalPrediction) -> dict[str, float]:
    """The mean loss per predicted token, from the means per batch that Trainer gives to each of a batch's sequences.

    Trainer itself would weigh a batch by its sequences, which differs where sequences are padded. Named `loss`, the
    result takes the place of Trainer's `eval_loss`.
    """
    tokens = (np.asarray(prediction.label_ids)[:, 1:] != IGNORED).sum(1)
    return {"loss": float((np.asarray(prediction.losses, dtype=np.float64) * tokens).sum() / tokens.sum())}


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
