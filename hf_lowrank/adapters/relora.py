"""ReLoRA (arXiv 2307.05695): LoRA whose update is merged and begun anew every `restart_every` optimizer steps.

The steps of a restart are plain functions; `ReLoraCallback` only calls them.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters.dense import ADAPTER, lora_dense_weight
from hf_lowrank.adapters.seeding import fill, kaiming_uniform, keyed_generator, placed_like
from hf_lowrank.errors import UserError
from hf_lowrank.targets import LINEAR_TYPES

Pruning = Literal["random", "magnitude", "zero"]
PRUNINGS = ("random", "magnitude", "zero")


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers of `model` with LoRA, by their dotted name without any wrapper's prefix.

    Raises:
        UserError: there is none, or one is not linear.
    """
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model.").removeprefix("lm."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    if not layers:
        raise UserError(f"ReLoRA needs a model with LoRA layers, got {type(model).__name__} without any")
    for name, layer in layers.items():
        if not isinstance(layer.get_base_layer(), LINEAR_TYPES):
            raise UserError(
                f"{name}: ReLoRA restarts LoRA on linear layers, got {type(layer.get_base_layer()).__name__}; "
                "name the linear layers in target_modules"
            )
    return layers


@torch.no_grad()
def reinitialise(model: nn.Module, *, seed: int, step: int, adapter: str = ADAPTER) -> None:
    """Draws each A anew (Kaiming-uniform, a = √5) and zeroes B.

    The draws depend on seed, step and the layer's name alone: they come out the same on every rank and after a resume.
    """
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if not A.is_meta:
            fill(A, kaiming_uniform(A.shape[0], A.shape[1], keyed_generator(seed, step, name)))
            B.zero_()


@torch.no_grad()
def merge_and_reinit(model: nn.Module, *, seed: int, step: int, adapter: str = ADAPTER) -> None:
    """W ← W + (α/r) B A, then `reinitialise`; the model's function stays the same to rounding."""
    for layer in lora_layers(model).values():
        base = layer.get_base_layer()
        weight = lora_dense_weight(layer, adapter)
        base.weight.copy_(weight.T if isinstance(base, Conv1D) else weight)
    reinitialise(model, seed=seed, step=step, adapter=adapter)


@torch.no_grad()
def prune_moments(
    optimizer: Optimizer,
    parameters: dict[str, nn.Parameter],
    *,
    mode: Pruning = "random",
    ratio: float = 0.99,
    seed: int = 0,
    step: int = 0,
) -> None:
    """Sets a share of the entries of the parameters' moments to zero; counters of steps go on.

    An entry goes in all moments of its parameter or in none: a first moment that outlives its second would be divided
    by nothing.

    Args:
        parameters: by name, which keys the draws.
        mode: "random" zeroes a random share `ratio`, "magnitude" that share with the least first moments, "zero" all.

    Raises:
        UserError: the mode is unknown or the ratio lies outside [0, 1].
    """
    if mode not in PRUNINGS:
        raise UserError(f"pruning must be one of {', '.join(PRUNINGS)}, got {mode!r}")
    if not 0 <= ratio <= 1:
        raise UserError(f"prune_ratio must lie between 0 and 1, got {ratio!r}")
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        moments = [value for value in state.values() if torch.is_tensor(value) and value.shape == parameter.shape]
        if not moments:
            continue
        if mode == "random":
            drawn = torch.rand(parameter.shape, generator=keyed_generator(seed, step, name, "moments"))
            kept = drawn >= ratio
        elif mode == "magnitude":
            whole: Any = moments[0]
            size = (whole.full_tensor() if isinstance(whole, DTensor) else whole).abs().flatten()
            dropped = size.argsort(stable=True)[: math.floor(ratio * size.numel())]
            kept = torch.ones_like(size, dtype=torch.bool).index_fill_(0, dropped, False).view(parameter.shape)
        else:
            kept = torch.zeros(parameter.shape, dtype=torch.bool)
        for moment in moments:
            moment.mul_(placed_like(kept, moment))


def factors(model: nn.Module, adapter: str = ADAPTER) -> dict[str, nn.Parameter]:
    """The LoRA factors of `model` by name."""
    found = {}
    for name, layer in lora_layers(model).items():
        found[f"{name}.A"] = layer.lora_A[adapter].weight
        found[f"{name}.B"] = layer.lora_B[adapter].weight
    return found


def dense_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights under LoRA, which are frozen but in a warm start."""
    return [layer.get_base_layer().weight for layer in lora_layers(model).values()]


def relora_lr_factor(
    step: int,
    *,
    num_training_steps: int,
    warmup_steps: int,
    restart_every: int,
    restart_warmup_steps: int,
    min_lr_ratio: float = 0.1,
    first_restart: int | None = None,
) -> float:
    """The factor on the peak learning rate at optimizer step `step` (0 is the first).

    Linear warm-up over `warmup_steps`, one cosine from there to `min_lr_ratio` at the end; from each restart on, over
    `restart_warmup_steps`, a line from 0 up to that cosine instead.
    """

    def cosine(at: int) -> float:
        progress = (at - warmup_steps) / max(1, num_training_steps - warmup_steps)
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    if step < warmup_steps:
        return step / warmup_steps
    first = restart_every if first_restart is None else first_restart
    if step >= first:
        since = (step - first) % restart_every
        if since < restart_warmup_steps:
            return since / restart_warmup_steps * cosine(step - since + restart_warmup_steps)
    return cosine(step)


class ReLoraScheduler(LRScheduler):
    """`relora_lr_factor` as a scheduler; its state is numbers only.

    Raises:
        UserError: the numbers do not fit together; the message names them.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        num_training_steps: int,
        restart_every: int,
        warmup_steps: int = 0,
        restart_warmup_steps: int = 100,
        min_lr_ratio: float = 0.1,
        first_restart: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        first = restart_every if first_restart is None else first_restart
        if restart_every < 1:
            raise UserError(f"restart_every must be a positive number of steps, got {restart_every}")
        if not 0 <= restart_warmup_steps <= restart_every:
            raise UserError(
                f"restart_warmup_steps must lie between 0 and restart_every = {restart_every}, "
                f"got {restart_warmup_steps}"
            )
        if not 0 <= min_lr_ratio <= 1:
            raise UserError(f"min_lr_ratio must lie between 0 and 1, got {min_lr_ratio}")
        if first < warmup_steps:
            raise UserError(f"the first restart must not come before the warm-up ends at {warmup_steps}, got {first}")
        self.num_training_steps = num_training_steps
        self.warmup_steps = warmup_steps
        self.restart_every = restart_every
        self.restart_warmup_steps = restart_warmup_steps
        self.min_lr_ratio = min_lr_ratio
        self.first_restart = first_restart
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        factor = relora_lr_factor(
            self.last_epoch,
            num_training_steps=self.num_training_steps,
            warmup_steps=self.warmup_steps,
            restart_every=self.restart_every,
            restart_warmup_steps=self.restart_warmup_steps,
            min_lr_ratio=self.min_lr_ratio,
            first_restart=self.first_restart,
        )
        return [base * factor for base in self.base_lrs]
