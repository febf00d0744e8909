"""How the methods with adapter layers build models, optimizers, schedules and callbacks from their settings."""

from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedConfig, TrainerCallback, TrainingArguments

from hf_lowrank.adapters.configuration import LowRankConfig
from hf_lowrank.adapters.methods import AdapterSettings, ReLoraSettings
from hf_lowrank.adapters.modeling import LowRankForCausalLM
from hf_lowrank.adapters.relora import ReLoraCallback, ReLoraScheduler, dense_weights, reinitialise
from hf_lowrank.targets import adam_arguments, decayed_names


def build_adapted(config: PreTrainedConfig, settings: AdapterSettings, seed: int) -> LowRankForCausalLM:
    """The adapted model, from scratch. Whatever is not a target starts as in the dense model of the same seed.

    Raises:
        UserError: the targets match nothing, or the rank does not fit one of them.
    """
    return LowRankForCausalLM(LowRankConfig(base_config=config, adapter_config=settings.adapter_config(seed)))


def build_relora(config: PreTrainedConfig, settings: ReLoraSettings, seed: int) -> LowRankForCausalLM:
    """`build_adapted` with LoRA's factors drawn from the seed; the dense weights train during a warm start."""
    model = build_adapted(config, settings, seed)
    reinitialise(model, seed=settings.seed_or(seed), step=0)
    if settings.warm_start_steps:
        for weight in dense_weights(model):
            weight.requires_grad_(True)
    return model


def build_relora_optimizer(model: nn.Module, settings: ReLoraSettings, args: TrainingArguments) -> Optimizer:
    """AdamW on all trainable parameters, split for weight decay as Trainer does."""
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
    """ReLoRA's schedule, with the warm-up of `args`; after a warm start the factors warm up as after a restart."""
    return ReLoraScheduler(
        optimizer,
        num_training_steps=num_training_steps,
        warmup_steps=args.get_warmup_steps(num_training_steps),
        first_restart=settings.warm_start_steps or None,
        **settings.model_dump(include={"restart_every", "restart_warmup_steps", "min_lr_ratio"}),
    )


def relora_callbacks(settings: ReLoraSettings, args: TrainingArguments) -> Sequence[TrainerCallback]:
    own = settings.model_dump(include={"restart_every", "pruning", "prune_ratio", "warm_start_steps"})
    return [ReLoraCallback(**own, seed=settings.seed_or(args.seed))]
