"""ReLoRA's restarts under Trainer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.adapters.dense import ADAPTER
from hf_lowrank.adapters.methods import Pruning, ReLoraSettings
from hf_lowrank.adapters.relora import (
    dense_weights,
    factors,
    lora_layers,
    merge_and_reinit,
    prune_moments,
)
from hf_lowrank.errors import UserError
from hf_lowrank.methods import check_options

logger = logging.getLogger(__name__)


def is_restart(step: int, restart_every: int, warm_start_steps: int = 0) -> bool:
    """Whether a restart follows optimizer step `step`, counted from 1 like `global_step`."""
    return step > warm_start_steps and (step - warm_start_steps) % restart_every == 0


class ReLoraCallback(TrainerCallback):
    """Restarts at the end of every `restart_every`-th optimizer step, before that step's checkpoint is written.

    The checkpoint of a restart's step therefore holds the merged weights, the new factors and the pruned moments, and
    a resume has nothing to repeat. Each restart is an entry `relora_restarts` in the trainer's log history.

    With `warm_start_steps` the dense weights train first while the factors are frozen; then the factors train while
    the dense weights are frozen, and restarts count from there. Frozen here means: gradients are zeroed before they
    are accumulated and dropped before the optimizer step. This also works under DDP, where parameters must not leave
    the graph.

    Args:
        restart_every: optimizer steps between restarts.
        pruning: which moments of the factors to prune: "random", "magnitude" or "zero".
        prune_ratio: share of entries that "random" and "magnitude" set to zero.
        seed: seed of all draws, together with step and layer.
        warm_start_steps: optimizer steps of full-rank training before the factors.

    Raises:
        UserError: a value is not allowed, the model has no LoRA layers, or a warm start is requested under FSDP2.
    """

    def __init__(
        self,
        *,
        restart_every: int,
        pruning: Pruning = "random",
        prune_ratio: float = 0.99,
        seed: int = 0,
        warm_start_steps: int = 0,
        adapter: str = ADAPTER,
    ) -> None:
        options = {
            "restart_every": restart_every,
            "pruning": pruning,
            "prune_ratio": prune_ratio,
            "warm_start_steps": warm_start_steps,
        }
        check_options(ReLoraSettings, options, type(self).__name__)
        self.restart_every = restart_every
        self.pruning = pruning
        self.prune_ratio = prune_ratio
        self.seed = seed
        self.warm_start_steps = warm_start_steps
        self.adapter = adapter
        self._warm = False
        self._hooks: list[Any] = []

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        lora_layers(model)
        if self.warm_start_steps:
            for weight in dense_weights(model):
                weight.requires_grad_(True)  # so that the optimizer includes them

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.warm_start_steps:
            self._warm = state.global_step < self.warm_start_steps
            if any(isinstance(weight, DTensor) for weight in dense_weights(model)):
                raise UserError(
                    "warm_start_steps must be 0 with sharded parameters (FSDP2), whose optimizer state cannot be "
                    f"added or dropped, got {self.warm_start_steps}; do the warm start under DDP or as a full_rank run"
                )
            for weight in dense_weights(model):
                self._hooks.append(weight.register_hook(lambda grad: grad if self._warm else torch.zeros_like(grad)))
            for factor in factors(model, self.adapter).values():
                self._hooks.append(factor.register_hook(lambda grad: torch.zeros_like(grad) if self._warm else grad))
            self._settle(model, kwargs["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.warm_start_steps:
            frozen = factors(model, self.adapter).values() if self._warm else dense_weights(model)
            for parameter in frozen:
                parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        step, optimizer = state.global_step, kwargs["optimizer"]
        if self._warm and step >= self.warm_start_steps:
            self._warm = False
            self._settle(model, optimizer)
        if is_restart(step, self.restart_every, self.warm_start_steps):
            self.restart(model, optimizer, step)
            count = (step - self.warm_start_steps) // self.restart_every
            state.log_history.append({"relora_restarts": count, "epoch": state.epoch, "step": step})
            logger.info("ReLoRA: restart %d after step %d", count, step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def restart(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Merges, re-initialises and prunes after optimizer step `step`."""
        merge_and_reinit(model, seed=self.seed, step=step, adapter=self.adapter)
        prune_moments(
            _inner(optimizer),
            factors(model, self.adapter),
            mode=self.pruning,
            ratio=self.prune_ratio,
            seed=self.seed,
            step=step,
        )

    def _settle(self, model: nn.Module, optimizer: Optimizer) -> None:
        """After the warm start, drops the dense weights' moments and, in a single process, freezes the weights."""
        if self._warm:
            return
        for weight in dense_weights(model):
            _inner(optimizer).state.pop(weight, None)
            if not torch.distributed.is_initialized():
                weight.requires_grad_(False)
                weight.grad = None


def _inner(optimizer: Any) -> Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
