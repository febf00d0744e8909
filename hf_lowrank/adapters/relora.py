"""ReLoRA (arXiv 2307.05695): LoRA whose update is merged and restarted every `restart_every` optimizer steps.

The parts of a restart are functions; `ReLoraCallback` calls them under Trainer.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters.dense import ADAPTER, lora_dense_weight
from hf_lowrank.adapters.functional import fill, kaiming_uniform, keyed_generator, placed_like
from hf_lowrank.adapters.methods import Pruning, ReLoraSettings
from hf_lowrank.adapters.restarts import PeriodicCallback
from hf_lowrank.compat import inner
from hf_lowrank.errors import UserError
from hf_lowrank.methods import check_options
from hf_lowrank.targets import LINEAR_TYPES, adam_arguments, decay_groups

logger = logging.getLogger(__name__)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers of `model` by their dotted name without a wrapper's prefix.

    Raises:
        UserError: the model has none, or one is not on a linear layer.
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
    """Redraws each A (Kaiming-uniform, a = √5) and zeroes B.

    The draws depend on the seed, the step and the layer's name alone: they are equal on every rank and after a resume.
    """
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if not A.is_meta:
            fill(A, kaiming_uniform(A.shape[0], A.shape[1], keyed_generator(seed, step, name)))
            B.zero_()


@torch.no_grad()
def merge_and_reinit(model: nn.Module, *, seed: int, step: int, adapter: str = ADAPTER) -> None:
    """W ← W + (α/r) B A, then `reinitialise`; the model computes the same function to rounding."""
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
    """Sets a share of the entries of the parameters' moments to zero; step counters continue.

    An entry is pruned from all moments of its parameter or from none: a first moment without its second would be
    divided by ε alone.

    Args:
        parameters: by name, which is the key of the draws.
        mode: "random" zeroes a random share `ratio`, "magnitude" that of the smallest first moments, "zero" all.

    Raises:
        UserError: the mode is unknown or the ratio is outside [0, 1].
    """
    check_options(ReLoraSettings, {"pruning": mode, "prune_ratio": ratio}, "prune_moments")
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
    """The base weights of the LoRA layers, which are frozen except during a warm start."""
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
    """The factor of the peak learning rate at optimizer step `step` (0 is the first).

    Linear warm-up over `warmup_steps`, then one cosine to `min_lr_ratio` at the end. After each restart, a line from 0
    back to that cosine over `restart_warmup_steps`.
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
    """`relora_lr_factor` as a scheduler, whose state contains only numbers.

    Raises:
        UserError: a value is not allowed.
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
        self.num_training_steps, self.warmup_steps = num_training_steps, warmup_steps
        self.restart_every, self.restart_warmup_steps = restart_every, restart_warmup_steps
        self.min_lr_ratio, self.first_restart = min_lr_ratio, first_restart
        check_options(ReLoraSettings, vars(self), type(self).__name__)
        first = restart_every if first_restart is None else first_restart
        if restart_warmup_steps > restart_every:
            raise UserError(
                f"restart_warmup_steps must be at most restart_every = {restart_every}, got {restart_warmup_steps}"
            )
        if first < warmup_steps:
            raise UserError(f"the first restart must not precede the warm-up's end at {warmup_steps}, got {first}")
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


class ReLoraCallback(PeriodicCallback):
    """Restarts at the end of every `restart_every`-th optimizer step, before that step's checkpoint is written.

    The checkpoint of a restart's step therefore holds the merged weights, the new factors and the pruned moments, and
    a resume has nothing to repeat. Each restart is an entry `relora_restarts` in the trainer's log history.

    With `warm_start_steps` the dense weights train first while the factors are frozen; then the factors train while
    the dense weights are frozen, and restarts count from there. Frozen here means: gradients are zeroed before they
    are accumulated and dropped before the optimizer step. This also works under DDP, where parameters must not leave
    the graph.

    The arguments are settings of the method, see `ReLoraSettings`; draws depend on the seed, the step and the layer.

    Raises:
        UserError: a value is not allowed, the model has no LoRA layers or is PEFT's wrapper, or a warm start is
            requested under FSDP2.
    """

    title, log_key = "ReLoRA: restart", "relora_restarts"

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
        self.restart_every, self.warm_start_steps = restart_every, warm_start_steps
        self.pruning, self.prune_ratio = pruning, prune_ratio
        check_options(ReLoraSettings, vars(self), type(self).__name__)
        self.seed, self.adapter = seed, adapter
        self._warm = False
        self._hooks: list[Any] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        lora_layers(model)
        if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):  # by model.add_adapter
            raise UserError(
                "ReLoraCallback needs a model that Trainer saves whole, got a PEFT model, of which it saves the "
                "adapter alone: the weights that restarts merge into the base would be lost; use "
                "LowRankForCausalLM.from_dense(model, LoraConfig(...)), whose checkpoints contain both"
            )
        if self.warm_start_steps:
            for weight in dense_weights(model):
                weight.requires_grad_(True)  # so that the optimizer includes them

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
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

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.warm_start_steps:
            frozen = factors(model, self.adapter).values() if self._warm else dense_weights(model)
            for parameter in frozen:
                parameter.grad = None

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._warm and state.global_step >= self.warm_start_steps:
            self._warm = False
            self._settle(model, kwargs["optimizer"])
        super().on_step_end(args, state, control, model, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def restart(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Merges, re-initialises and prunes after optimizer step `step`."""
        merge_and_reinit(model, seed=self.seed, step=step, adapter=self.adapter)
        prune_moments(
            inner(optimizer),
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
            inner(optimizer).state.pop(weight, None)
            if not torch.distributed.is_initialized():
                weight.requires_grad_(False)
                weight.grad = None


def build_relora_optimizer(model: nn.Module, settings: ReLoraSettings, args: TrainingArguments) -> Optimizer:
    """AdamW on all trainable parameters, split for weight decay as Trainer does."""
    return AdamW(decay_groups(model, args.weight_decay), **adam_arguments(args), fused=True)


def build_relora_scheduler(
    optimizer: Optimizer, settings: ReLoraSettings, args: TrainingArguments, num_training_steps: int
) -> ReLoraScheduler:
    """ReLoRA's schedule, with the warm-up of `args`; after a warm start the factors warm up as after a restart."""
    return ReLoraScheduler(
        optimizer,
        num_training_steps=num_training_steps,
        warmup_steps=args.get_warmup_steps(num_training_steps),
        first_restart=settings.warm_start_steps or None,
        **settings.model_dump(include={"restart_every", "restart_warmup_steps", "min_lr_ratio"}),
    )


def check_schedule(settings: ReLoraSettings, args: TrainingArguments) -> None:
    """Raises a `UserError` if `args` ask for another schedule than ReLoRA's restarted cosine."""
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    given: Any = args.lr_scheduler_kwargs or {}
    if kind not in ("linear", "cosine", "cosine_with_min_lr"):  # linear is Trainer's default
        raise UserError(
            "training.lr_scheduler_type must be left out or cosine_with_min_lr with ReLoRA, which has a cosine of its "
            f"own, restarted, got {kind!r}"
        )
    if given and given != {"min_lr_rate": settings.min_lr_ratio}:
        raise UserError(
            "training.lr_scheduler_kwargs must be left out with ReLoRA, whose cosine ends at method.min_lr_ratio, or "
            f"{{'min_lr_rate': {settings.min_lr_ratio}}}, got {given!r}"
        )


def relora_callbacks(settings: ReLoraSettings, args: TrainingArguments) -> Sequence[TrainerCallback]:
    check_schedule(settings, args)
    own = settings.model_dump(include={"restart_every", "pruning", "prune_ratio", "warm_start_steps"})
    return [ReLoraCallback(**own, seed=settings.seed_or(args.seed))]
