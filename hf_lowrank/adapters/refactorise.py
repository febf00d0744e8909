"""Refactorised low rank with momentum reset (arXiv 2505.22922), for the low-rank control and SLTrain.

Every `refactorise_every` optimizer steps the factors of each product are replaced by balanced ones of the same
product, `B ← U √S` and `A ← √S Vᵀ` with `U S Vᵀ = B A`; all moments and Adam's step count start anew, and the learning
rate climbs back from a thousandth of its schedule. Sparse values stay.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainingArguments

from hf_lowrank.adapters.functional import balanced_factors, fill_from_first, whole
from hf_lowrank.adapters.guide import guide_callbacks
from hf_lowrank.adapters.layers import CoLALinear, ReplacedLinear, SLTrainLinear
from hf_lowrank.adapters.methods import Refactorised
from hf_lowrank.adapters.restarts import PeriodicCallback, recovering_scheduler, reset_state
from hf_lowrank.compat import inner
from hf_lowrank.errors import UserError
from hf_lowrank.methods import check_options

# Share of the schedule's learning rate right after a restart.
FLOOR = 1e-3


@torch.no_grad()
def refactorise(model: nn.Module) -> None:
    """Balances the factors of all replaced layers; the model computes the same function to rounding.

    Processes of a launch must call this together: the first one's factors are everyone's.

    Raises:
        UserError: the model has no layer with a product of factors.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, ReplacedLinear)]
    products = all(isinstance(layer, CoLALinear | SLTrainLinear) for layer in layers)
    if not layers or not products or any(layer.dense_weight_kind != "exact" for layer in layers):
        what = f"{layers[0].title} layers{' with a non-linearity' if products else ''}" if layers else "none"
        raise UserError(
            f"refactorise needs a model with low-rank or SLTrain layers, {type(model).__name__} has {what}"
        )
    for layer in layers:
        A, B = layer.factors()
        for factor, balanced in zip((A, B), balanced_factors(whole(A), whole(B)), strict=True):
            fill_from_first(factor, balanced)


class RefactoriseCallback(PeriodicCallback):
    """Calls `refactorise` and `reset_state` every `refactorise_every` optimizer steps.

    Raises:
        UserError: a value is not allowed.
    """

    title, log_key = "refactorisation", "refactorisations"

    def __init__(self, *, refactorise_every: int) -> None:
        check_options(Refactorised, {"refactorise_every": refactorise_every}, type(self).__name__)
        if not refactorise_every:
            raise UserError("refactorise_every of RefactoriseCallback must be at least 1, got 0")
        self.restart_every = refactorise_every

    def restart(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        refactorise(model)
        reset_state(inner(optimizer))


def build_scheduler(
    optimizer: Optimizer, settings: Any, args: TrainingArguments, num_training_steps: int
) -> LRScheduler | None:
    """Trainer's schedule with a recovery after each restart; None, which leaves Trainer its own, without restarts."""
    if not settings.refactorise_every:
        return None
    return recovering_scheduler(
        optimizer,
        args,
        num_training_steps,
        restart_every=settings.refactorise_every,
        recovery_steps=settings.recovery_steps,
        floor=FLOOR,
    )


def refactorise_callbacks(settings: Any, args: TrainingArguments) -> Sequence[TrainerCallback]:
    """The callback, if the settings ask for restarts.

    Raises:
        UserError: a recovery would not end before the next restart.
    """
    every, recovery = settings.refactorise_every, settings.recovery_steps
    if not every:
        return []
    if recovery > every:
        raise UserError(f"recovery_steps must be at most refactorise_every = {every}, got {recovery}")
    return [RefactoriseCallback(refactorise_every=every)]


def low_rank_callbacks(settings: Any, args: TrainingArguments) -> Sequence[TrainerCallback]:
    """Those of refactorisation and of a guide."""
    return [*refactorise_callbacks(settings, args), *guide_callbacks(settings, args)]
