"""What a recipe's `method:` block may say for each method of adapters, and how it becomes a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedConfig, TrainerCallback, TrainingArguments

from hf_lowrank.adapters.configuration import LowRankConfig
from hf_lowrank.adapters.modeling import LowRankForCausalLM
from hf_lowrank.adapters.relora import Pruning, ReLoraScheduler, dense_weights, reinitialise
from hf_lowrank.adapters.relora_callback import ReLoraCallback
from hf_lowrank.method_settings import MethodSettings
from hf_lowrank.optim.groups import adam_arguments, decayed_names


class AdapterSettings(MethodSettings):
    """Settings that the methods of adapters share."""

    peft_type: ClassVar[str]
    fixed: ClassVar[dict[str, Any]] = {}

    r: int = Field(128, ge=1, description="rank")
    target_modules: str | list[str] = Field("auto", description="as everywhere: auto, all-linear, names or a pattern")
    seed: int | None = Field(None, description="of the random draws; the run's own seed when it is not given")

    def adapter_config(self, seed: int) -> dict[str, Any]:
        """The adapter's entries in `LowRankConfig`."""
        own = self.model_dump(include=self.adapter_fields())
        return {"peft_type": self.peft_type, **self.fixed, **own}

    def adapter_fields(self) -> set[str]:
        """Which settings are the adapter's, under the same name."""
        return set(type(self).model_fields) - {"seed"}


class ReplacingSettings(AdapterSettings):
    exclude_modules: str | list[str] | None = Field(None, description="targets to leave dense")
    rank_pattern: dict[str, int] = Field({}, description="other ranks, by name ending or pattern")

    def adapter_config(self, seed: int) -> dict[str, Any]:
        return {**super().adapter_config(seed), "seed": seed if self.seed is None else self.seed}


class CoLASettings(ReplacingSettings):
    peft_type = "COLA"

    bottleneck_act: str = Field("silu", description="the non-linearity between the factors")
    checkpoint_activations: bool = Field(False, description="CoLA-M: keep only r-wide activations, recompute the rest")


class LowRankSettings(ReplacingSettings):
    """W = B A is CoLA's layer without its non-linearity."""

    peft_type = "COLA"
    fixed: ClassVar[dict[str, Any]] = {"bottleneck_act": "linear"}


class SLTrainSettings(ReplacingSettings):
    peft_type = "SLTRAIN"

    lora_alpha: float = Field(32, gt=0)
    sparsity: float = Field(0.03, gt=0, lt=1, description="kept share of the sparse part")


class ReLoraSettings(AdapterSettings):
    peft_type = "LORA"

    lora_alpha: float = Field(32, gt=0)
    restart_every: int = Field(1000, ge=1, description="optimizer steps between restarts")
    restart_warmup_steps: int = Field(100, ge=0, description="steps from 0 back up to the cosine after a restart")
    pruning: Pruning = Field("random", description="of the factors' moments at a restart")
    prune_ratio: float = Field(0.99, ge=0, le=1, description="share of entries set to zero")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="where the cosine ends, of the peak")
    warm_start_steps: int = Field(0, ge=0, description="steps of full-rank training before")

    def adapter_fields(self) -> set[str]:
        return {"r", "target_modules", "lora_alpha"}


def build_adapted(config: PreTrainedConfig, settings: AdapterSettings, seed: int) -> LowRankForCausalLM:
    """The adapted model, from scratch. What is not a target starts as in the dense model of the same seed.

    Raises:
        UserError: the targets match nothing, or the rank does not fit one of them.
    """
    return LowRankForCausalLM(LowRankConfig(base_config=config, adapter_config=settings.adapter_config(seed)))


def build_relora(config: PreTrainedConfig, settings: ReLoraSettings, seed: int) -> LowRankForCausalLM:
    """As `build_adapted`, with LoRA's factors drawn from the seed; the dense weights train during a warm start."""
    model = build_adapted(config, settings, seed)
    reinitialise(model, seed=_seed(settings, seed), step=0)
    if settings.warm_start_steps:
        for weight in dense_weights(model):
            weight.requires_grad_(True)
    return model


def build_relora_optimizer(model: nn.Module, settings: ReLoraSettings, args: TrainingArguments) -> Optimizer:
    """AdamW on all that trains, split for weight decay as Trainer does."""
    adam = adam_arguments(args)
    weight_decay, decayed = adam.pop("weight_decay"), decayed_names(model)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if (name in decayed) is decays], "weight_decay": weight_decay * decays}
        for decays in (True, False)
    ]
    return AdamW([group for group in groups if group["params"]], **adam, fused=True)


def build_relora_scheduler(
    optimizer: Optimizer, settings: ReLoraSettings, args: TrainingArguments, num_training_steps: int
) -> ReLoraScheduler:
    """ReLoRA's schedule; its warm-up is `args`', and the factors warm up as after a restart when they begin."""
    return ReLoraScheduler(
        optimizer,
        num_training_steps=num_training_steps,
        restart_every=settings.restart_every,
        warmup_steps=args.get_warmup_steps(num_training_steps),
        restart_warmup_steps=settings.restart_warmup_steps,
        min_lr_ratio=settings.min_lr_ratio,
        first_restart=settings.warm_start_steps or None,
    )


def relora_callbacks(settings: ReLoraSettings, args: TrainingArguments) -> Sequence[TrainerCallback]:
    return [
        ReLoraCallback(
            restart_every=settings.restart_every,
            pruning=settings.pruning,
            prune_ratio=settings.prune_ratio,
            seed=_seed(settings, args.seed),
            warm_start_steps=settings.warm_start_steps,
        )
    ]


def _seed(settings: AdapterSettings, seed: int) -> int:
    return seed if settings.seed is None else settings.seed
