"""What a recipe's `method:` block may say for each optimizer method, and how it becomes an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments

from hf_lowrank.method_settings import MethodSettings
from hf_lowrank.optim.apollo import ApolloAdamW
from hf_lowrank.optim.diagnostics import SubspaceLogCallback
from hf_lowrank.optim.fira import FiraAdamW
from hf_lowrank.optim.frugal import FrugalAdamW
from hf_lowrank.optim.galore import GaLoreAdamW
from hf_lowrank.optim.groups import adam_arguments, check_coverage, param_groups
from hf_lowrank.optim.layerwise import check_layerwise
from hf_lowrank.optim.muon import MuonAdamW, muon_groups


class OptimizerSettings(MethodSettings):
    """Settings that all optimizer methods share; their meaning is at `ProjectedAdamW`."""

    optimizer: ClassVar[Callable[..., Optimizer]]

    target_modules: str | list[str] = "auto"
    state_dtype: Literal["parameter", "float32", "8bit"] = "parameter"
    stochastic_rounding: bool = False
    layerwise: bool = False
    seed: int | None = Field(None, description="of the random draws; the run's own seed when it is not given")


class SubspaceSettings(OptimizerSettings):
    """Settings that the subspace methods share."""

    rank: int = Field(128, ge=1)
    target_parameters: list[str] = Field([], description="targets beside, as the stacks of a mixture's experts")
    update_proj_gap: int = Field(200, ge=1)
    scale: float = Field(1.0, gt=0)
    proj_type: Literal["std", "reverse_std", "right", "left"] = "std"
    stagger: bool = False
    adam_variant: Literal["official", "torch"] = "official"
    moments: Literal["keep", "rotate", "reset"] = "keep"
    diagnostics: bool = Field(False, description="logs the captured gradient energy and the overlap of bases")


class GaLoreSettings(SubspaceSettings):
    optimizer = GaLoreAdamW
    scale: float = Field(0.25, gt=0)
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"  # type: ignore[assignment]
    subspace: Literal["svd", "randomized", "random", "columns", "gaussian"] = "randomized"


class FiraSettings(SubspaceSettings):
    optimizer = FiraAdamW
    scale: float = Field(0.25, gt=0)
    subspace: Literal["svd", "randomized", "random", "columns"] = "randomized"
    residual: Literal["official", "paper"] = "official"
    norm_growth_limit: float = Field(1.01, ge=1)


class ApolloSettings(SubspaceSettings):
    optimizer = ApolloAdamW
    subspace: Literal["svd", "randomized", "random", "columns", "gaussian"] = "gaussian"
    scale_type: Literal["channel", "tensor"] = "channel"
    norm_growth_limit: float = Field(1.01, ge=1)


class ApolloMiniSettings(ApolloSettings):
    rank: int = Field(1, ge=1)
    scale: float = Field(128.0, gt=0)
    scale_type: Literal["channel", "tensor"] = "tensor"


class FrugalSettings(SubspaceSettings):
    optimizer = FrugalAdamW
    subspace: Literal["svd", "randomized", "random", "columns", "blocks"] = "columns"
    moments: Literal["keep", "rotate", "reset"] = "reset"
    state_free_rule: Literal["sign", "sgd"] = "sign"
    state_free_lr_ratio: float = Field(1.0, ge=0)


class MuonSettings(OptimizerSettings):
    optimizer = MuonAdamW
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    ns_steps: int = Field(5, ge=1)
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"


def build_projected(model: nn.Module, settings: SubspaceSettings, args: TrainingArguments) -> Optimizer:
    """The optimizer of `settings` on `model`, with the learning rate, betas, ε and weight decay of `args`.

    Raises:
        UserError: the target pattern matches nothing, the rank is too large for a target, or `args` ask for what a
            layerwise update cannot do.
    """
    adam = adam_arguments(args)
    decay = adam.pop("weight_decay")
    groups = param_groups(
        model,
        rank=settings.rank,
        target_modules=settings.target_modules,
        target_parameters=settings.target_parameters,
        weight_decay=decay,
    )
    return _build(model, groups, settings, args, adam)


def build_muon(model: nn.Module, settings: MuonSettings, args: TrainingArguments) -> Optimizer:
    """`build_projected` for Muon, which has no rank."""
    adam = adam_arguments(args)
    groups = muon_groups(model, target_modules=settings.target_modules, weight_decay=adam.pop("weight_decay"))
    return _build(model, groups, settings, args, adam)


def _build(
    model: nn.Module,
    groups: list[dict[str, Any]],
    settings: OptimizerSettings,
    args: TrainingArguments,
    adam: dict[str, Any],
) -> Optimizer:
    if settings.layerwise:
        check_layerwise(max_grad_norm=args.max_grad_norm, fp16=args.fp16)
    check_coverage(model, groups)
    options: dict[str, Any] = settings.model_dump(exclude={"rank", "target_modules", "target_parameters", "seed"})
    seed = args.seed if settings.seed is None else settings.seed
    return settings.optimizer(groups, seed=seed, **adam, **options)


def subspace_callbacks(settings: SubspaceSettings, args: TrainingArguments) -> Sequence[TrainerCallback]:
    """The log lines of the subspaces, for whoever asked."""
    return [SubspaceLogCallback()] if settings.diagnostics else []
