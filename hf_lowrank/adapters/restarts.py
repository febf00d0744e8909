"""What methods with restarts share: when they happen, a reset of optimizer state, a schedule that recovers."""

import logging
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback, TrainerState, TrainingArguments, get_scheduler

from hf_lowrank.errors import UserError

logger = logging.getLogger(__name__)

ADAM_STATE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


def is_restart(step: int, restart_every: int, warm_start_steps: int = 0) -> bool:
    """Whether a restart follows optimizer step `step`, counted from 1 like `global_step`."""
    return step > warm_start_steps and (step - warm_start_steps) % restart_every == 0


class PeriodicCallback(TrainerCallback):
    """Calls `restart` at the end of every `restart_every`-th optimizer step, before that step's checkpoint is written.

    A resume therefore has nothing to repeat. Each restart is an entry in the trainer's log history. Callbacks after
    this one, such as trackers, find how many there were in each log. Steps are counted from the end of a warm start.
    """

    title: ClassVar[str]
    log_key: ClassVar[str]
    restart_every: int
    warm_start_steps: int = 0

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        if is_restart(step, self.restart_every, self.warm_start_steps):
            self.restart(model, kwargs["optimizer"], step)
            count = self._restarts(step)
            state.log_history.append({self.log_key: count, "epoch": state.epoch, "step": step})
            logger.info("%s %d after step %d", self.title, count, step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and args.report_to:
            logs[self.log_key] = self._restarts(state.global_step)

    def _restarts(self, step: int) -> int:
        """How many there were up to optimizer step `step`."""
        return max(0, step - self.warm_start_steps) // self.restart_every

    def restart(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """What happens after optimizer step `step`."""
        raise NotImplementedError


@torch.no_grad()
def reset_state(optimizer: Optimizer, parameters: list[nn.Parameter] | None = None) -> None:
    """Makes the next step of Adam the first: zero moments and a step count of zero, in place.

    Args:
        parameters: whose state is reset; default: all that have any.

    Raises:
        UserError: the state is not that of torch's Adam or AdamW.
    """
    known = optimizer.state if parameters is None else {p: optimizer.state.get(p, {}) for p in parameters}
    for state in known.values():
        unknown = sorted(set(state) - ADAM_STATE)
        if unknown:
            raise UserError(
                f"a reset of moments needs the state of torch's AdamW, {type(optimizer).__name__} also has "
                f"{unknown[0]!r}; leave out training.optim"
            )
        for key, value in state.items():
            if torch.is_tensor(value):
                value.zero_()
            else:
                state[key] = 0


def recovery_factor(step: int, *, restart_every: int, recovery_steps: int, floor: float) -> float:
    """The share of the schedule's learning rate at optimizer step `step` (0 is the first).

    After each restart, a line from `floor` to 1 over `recovery_steps`; 1 otherwise.
    """
    since = step % restart_every
    if step < restart_every or since >= recovery_steps:
        return 1.0
    return floor + (1 - floor) * since / recovery_steps


def recovering_scheduler(
    optimizer: Optimizer,
    args: TrainingArguments,
    num_training_steps: int,
    *,
    restart_every: int,
    recovery_steps: int,
    floor: float,
) -> LRScheduler:
    """Trainer's own schedule of `args`, times `recovery_factor`.

    Raises:
        UserError: the schedule is not a function of the step.
    """
    plain: Any = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(num_training_steps),
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )
    if not isinstance(plain, LambdaLR):
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise UserError(
            f"training.lr_scheduler_type must be a function of the step, got {kind}; use e.g. cosine_with_min_lr"
        )
    schedule = plain.lr_lambdas[0]

    def factor(step: int) -> float:
        own = recovery_factor(step, restart_every=restart_every, recovery_steps=recovery_steps, floor=floor)
        return float(schedule(step)) * own

    return LambdaLR(optimizer, factor)
