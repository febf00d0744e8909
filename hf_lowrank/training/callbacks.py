"""Trainer callbacks that watch a run: non-finite numbers stop it, and its losses are shown."""

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import DivergedError

logger = logging.getLogger(__name__)


class StopOnNonFinite(TrainerCallback):
    """Stops a run whose logged training or evaluation loss is NaN or Inf."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        for name in ("loss", "eval_loss"):
            value = kw["logs"].get(name, 0.0)
            if not math.isfinite(value):
                raise _diverged(args, state, f"{name} is {value}")


def check_finite(model: torch.nn.Module, optimizer: Any, args: TrainingArguments, state: TrainerState) -> None:
    """Stops a run before it saves weights that are not finite, or that were trained with skipped gradients.

    The package's optimizers skip a non-finite gradient with a warning. A run that continues after that follows another
    algorithm than its recipe says, and must not be compared as if it did not. All processes must call this together.

    Raises:
        DivergedError: in every process, if it is true of any.
    """
    if in_any_process(not _all_finite(model), args.device):
        raise _diverged(args, state, "the weights contain NaN or Inf")
    skipped = sorted(getattr(getattr(optimizer, "optimizer", optimizer), "skipped", ()))
    if in_any_process(bool(skipped), args.device):
        names = f" ({skipped[0]})" if skipped else ""
        raise _diverged(args, state, f"the optimizer skipped a non-finite gradient{names}")


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process of the launch; all processes must call this together."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def _all_finite(model: torch.nn.Module) -> bool:
    """Whether every parameter, of a sharded model every local shard, is finite."""
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters)


def _diverged(args: TrainingArguments, state: TrainerState, what: str) -> DivergedError:
    return DivergedError(
        f"{args.output_dir}: {what} at step {state.global_step}, which is not saved; lower training.learning_rate or "
        "training.max_grad_norm, or lengthen the warm-up"
    )


class Progress(TrainerCallback):
    """A bar in a terminal once training takes more than two seconds; losses as log lines."""

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

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        logs = kw["logs"]
        if not state.is_world_process_zero:
            return
        shown = {key: logs[key] for key in ("loss", "eval_loss", "learning_rate") if key in logs}
        if shown:
            text = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, text)
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
