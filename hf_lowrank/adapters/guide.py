"""Self-guided training (arXiv 2406.16450): a dense guide next to each replaced layer, in the first part of a training.

In training mode, o = α W_g x + (1 − α) f(x) with α = ½ (1 + cos(π k / T)) at step k of T. W_g starts as the layer's
own dense weight, so that the first output is the layer's. After T steps the guides leave the model, its config, the
optimizer and the checkpoints; evaluation has the layer alone from the beginning.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_lowrank.adapters.layers import ReplacedLinear
from hf_lowrank.compat import inner
from hf_lowrank.errors import UserError
from hf_lowrank.targets import adam_arguments, decay_groups


def guide_share(step: int, steps: int) -> float:
    """α at optimizer step `step` (0 is the first) of `steps` with a guide; 0 afterwards."""
    return 0.5 * (1 + math.cos(math.pi * step / steps)) if step < steps else 0.0


def guided_layers(model: nn.Module) -> list[ReplacedLinear]:
    """The layers that have a guide."""
    return [layer for layer in model.modules() if isinstance(layer, ReplacedLinear) and layer.guide is not None]


def add_guides(model: nn.Module) -> None:
    """Gives every replaced layer a guide, which starts as the layer's dense weight.

    Raises:
        UserError: a layer has no dense equivalent.
    """
    for layer in model.modules():
        if isinstance(layer, ReplacedLinear):
            layer.check_mergeable()
            A, _ = layer.factors()
            start = A.new_empty(layer.out_features, layer.in_features) if A.is_meta else layer.dense_weight()
            layer.guide = nn.Parameter(start)
            layer.guide_share = 1.0


def set_guide(model: nn.Module, share: float) -> None:
    """Sets α of all guides."""
    for layer in guided_layers(model):
        layer.guide_share = share


class GuidedAdamW(AdamW):
    """AdamW whose last group holds the guides; it stays, empty, when they are dropped, for schedules count groups."""

    def drop_guides(self) -> None:
        """Removes the guides and their state."""
        group = self.param_groups[-1]
        for parameter in group["params"]:
            self.state.pop(parameter, None)
        group["params"] = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As AdamW's; the state of a training whose guides are gone drops them here, too."""
        if len(state_dict["param_groups"]) == len(self.param_groups) and not state_dict["param_groups"][-1]["params"]:
            self.drop_guides()
        super().load_state_dict(state_dict)


def build_guided_optimizer(model: nn.Module, settings: Any, args: TrainingArguments) -> Optimizer | None:
    """AdamW split for weight decay as Trainer does, with the guides in a group of their own; None without guides.

    Raises:
        UserError: `training.optim` asks for another optimizer.
    """
    guides = [layer.guide for layer in guided_layers(model)]
    if not guides:
        return None
    optim = getattr(args.optim, "value", args.optim)
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(f"guide_share must be 0 with training.optim {optim}, got {settings.guide_share}")
    groups = [*decay_groups(model, args.weight_decay, without=guides), {"params": guides}]
    return GuidedAdamW(groups, **adam_arguments(args), fused=True)


class GuideCallback(TrainerCallback):
    """Sets α for each step, and drops the guides after their last, before that step's checkpoint is written.

    DistributedDataParallel does not know of the guides, which are to leave the model: their gradients are averaged
    over the processes here.

    Args:
        share: of all optimizer steps that have a guide.

    Raises:
        UserError: the parameters are sharded (FSDP2), from which none can be dropped.
    """

    def __init__(self, *, share: float) -> None:
        self.share = share
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        layers = guided_layers(model)
        if any(isinstance(layer.guide, DTensor) for layer in layers):
            raise UserError(
                "guide_share must be 0 with sharded parameters (FSDP2), from which guides cannot be dropped, got "
                f"{self.share}; use DDP"
            )
        self._hooks = [layer.guide.register_hook(_mean_over_processes) for layer in layers if layer.guide is not None]
        if state.max_steps > 0:
            self._follow(model, kwargs["optimizer"], state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        if guided_layers(model):
            self._follow(model, kwargs["optimizer"], state)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _follow(self, model: nn.Module, optimizer: Any, state: TrainerState) -> None:
        steps = int(self.share * state.max_steps)
        set_guide(model, guide_share(state.global_step, steps))
        if state.global_step >= steps:
            self.on_train_end()
            drop_guides(getattr(model, "module", model), inner(optimizer))


def drop_guides(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Removes the guides from the model, its config and its optimizer."""
    for layer in guided_layers(model):
        layer.guide, layer.guide_share = None, 0.0
    if hasattr(model, "config"):
        model.config.guided = False  # type: ignore[union-attr]
    if isinstance(optimizer, GuidedAdamW):
        optimizer.drop_guides()


def _mean_over_processes(grad: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return grad
    grad = grad.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(grad)
    return grad / dist.get_world_size()


def guide_callbacks(settings: Any, args: TrainingArguments) -> Sequence[TrainerCallback]:
    """The callback, if the settings ask for a guide."""
    return [GuideCallback(share=settings.guide_share)] if settings.guide_share else []
