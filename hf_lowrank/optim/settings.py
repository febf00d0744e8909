"""What a recipe's `method:` block may say for each optimizer method, and how it becomes an optimizer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from hf_lowrank.method_settings import MethodSettings
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.fira import FiraAdamW
from hf_lowrank.optim.galore import GaLoreAdamW
from hf_lowrank.optim.groups import adam_arguments, check_coverage, param_groups


class SubspaceSettings(MethodSettings):
    """Settings that the subspace methods share; their meaning is at `ProjectedAdamW`."""

    optimizer: ClassVar[type[ProjectedAdamW]]

    rank: int = Field(128, ge=1)
    update_proj_gap: int = Field(200, ge=1)
    scale: float = Field(1.0, gt=0)
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    target_modules: str | list[str] = "auto"
    subspace: Literal["svd"] = "svd"
    adam_variant: Literal["official", "torch"] = "official"
    moments: Literal["keep", "rotate", "reset"] = "keep"
    state_dtype: Literal["parameter", "float32"] = "parameter"
    seed: int | None = Field(None, description="of the random draws; the run's own seed when it is not given")


class GaLoreSettings(SubspaceSettings):
    optimizer = GaLoreAdamW
    scale: float = Field(0.25, gt=0)


class FiraSettings(SubspaceSettings):
    optimizer = FiraAdamW
    scale: float = Field(0.25, gt=0)
    proj_type: Literal["std", "reverse_std", "right", "left"] = "std"
    residual: Literal["official", "paper"] = "official"
    norm_growth_limit: float = Field(1.01, ge=1)


def build_projected(model: nn.Module, settings: SubspaceSettings, args: TrainingArguments) -> Optimizer:
    """The optimizer of `settings` on `model`, with the learning rate, betas, ε and weight decay of `args`.

    Raises:
        UserError: the target pattern matches nothing, or the rank is too large for a target.
    """
    options: dict[str, Any] = settings.model_dump(exclude={"rank", "target_modules", "seed"})
    options["seed"] = args.seed if settings.seed is None else settings.seed
    adam = adam_arguments(args)
    groups = param_groups(
        model, rank=settings.rank, target_modules=settings.target_modules, weight_decay=adam.pop("weight_decay")
    )
    check_coverage(model, groups)
    return settings.optimizer(groups, **adam, **options)
