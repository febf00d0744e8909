"""The PEFT configs of CoLA and SLTrain."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft import PeftConfig
from peft.utils import PeftType
from transformers.activations import ACT2FN

from hf_lowrank.adapters.methods import CoLASettings, ReplacingSettings, SLTrainSettings
from hf_lowrank.errors import UserError, nearest
from hf_lowrank.methods import check_options

INITS = ("random", "svd")


def _check_pattern(method: str, key: str, pattern: object) -> None:
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{method}: {key} must be a regular expression, got {pattern!r}: {error}") from None


def _check_names(method: str, key: str, names: object) -> None:
    if names is None or isinstance(names, str):
        return
    if not isinstance(names, list | set | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{method}: {key} must be a name or a list of names, got {names!r:.80}")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class ReplacingConfig(PeftConfig):
    """Fields that CoLA and SLTrain share: the linear layers to replace, the rank and the initialisation.

    Raises:
        UserError: a value is not allowed; the message names the field and what is allowed.
    """

    settings: ClassVar[type[ReplacingSettings]]

    r: int = field(default=128, metadata=_help("Rank of the factors; at most the smaller side of each target."))
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata=_help(
            "Names or name endings, a regular expression for the whole name, 'all-linear', or 'auto' (the default): "
            "every linear layer inside the model's repeated blocks."
        ),
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata=_help("Names, name endings, or a regular expression: layers to leave dense.")
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata=_help("Other modules to train and save with the adapter.")
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata=_help("Other ranks for the layers that a name ending or expression matches.")
    )
    bias: str = field(default="none", metadata=_help("Biases to train and save: 'none', 'all' or '<method>_only'."))
    init: Literal["random", "svd"] = field(
        default="random",
        metadata=_help("'random' draws as the paper does; 'svd' starts from the dense weight's truncated SVD."),
    )
    seed: int = field(default=0, metadata=_help("Seed of the random draws of each layer."))

    def __post_init__(self) -> None:
        super().__post_init__()
        method = type(self).__name__
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            _check_names(method, key, getattr(self, key))
        if not isinstance(self.rank_pattern or {}, dict):
            raise UserError(f"{method}: rank_pattern must map names to ranks, got {self.rank_pattern!r:.80}")
        check_options(self.settings, {"r": self.r}, method)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise UserError(f"{method}: seed must be an integer, got {self.seed!r:.80}")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        for key in ("target_modules", "exclude_modules"):
            _check_pattern(method, key, getattr(self, key))
        for name, rank in (self.rank_pattern or {}).items():
            check_options(self.settings, {"r": rank}, f"{method} for {name!r}")
        if self.init not in INITS:
            raise UserError(f"{method}: init must be 'random' or 'svd', got {self.init!r}")
        only = f"{self.method_name}_only"
        if self.bias not in ("none", "all", only):
            raise UserError(f"{method}: bias must be 'none', 'all' or {only!r}, got {self.bias!r}")

    @property
    def method_name(self) -> str:
        """The method's name in PEFT."""
        raise NotImplementedError

    def options(self, r: int) -> dict[str, Any]:
        """The other options of a layer of rank `r`."""
        raise NotImplementedError


@dataclass(kw_only=True)
class CoLAConfig(ReplacingConfig):
    """y = B · σ(A x) in place of a linear layer (arXiv 2502.10940).

    The layer replaces the dense weight instead of adding to it, so it cannot be merged or disabled. With
    `bottleneck_act="linear"` it is the plain low-rank W = B A, which can be merged.
    """

    settings = CoLASettings

    bottleneck_act: str = field(
        default="silu", metadata=_help("σ, by its name in transformers; 'linear' omits it (low-rank W = B A).")
    )
    checkpoint_activations: bool = field(
        default=False,
        metadata=_help("CoLA-M: store only the r-wide activations of each block, recompute the rest."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.COLA  # type: ignore[attr-defined]
        if not isinstance(self.bottleneck_act, str):
            raise UserError(f"CoLAConfig: bottleneck_act must be a name, got {self.bottleneck_act!r:.80}")
        if self.bottleneck_act not in ACT2FN:
            raise UserError(
                f"CoLAConfig: unknown bottleneck_act {self.bottleneck_act!r}; {nearest(self.bottleneck_act, ACT2FN)}"
            )

    @property
    def method_name(self) -> str:
        return "cola"

    def options(self, r: int) -> dict[str, Any]:
        return {"bottleneck_act": self.bottleneck_act, "keep_bottleneck": self.checkpoint_activations}


@dataclass(kw_only=True)
class SLTrainConfig(ReplacingConfig):
    """W = (lora_alpha / r) · B A + S with a fixed random support, in place of a linear layer (arXiv 2406.02214)."""

    settings = SLTrainSettings

    lora_alpha: float = field(default=32, metadata=_help("α; the product of the factors is scaled by α / r."))
    sparsity: float = field(default=0.03, metadata=_help("Kept share of S, between 0 and 1: δ · out · in values."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SLTRAIN  # type: ignore[attr-defined]
        check_options(self.settings, {"sparsity": self.sparsity, "lora_alpha": self.lora_alpha}, "SLTrainConfig")

    @property
    def method_name(self) -> str:
        return "sltrain"

    def options(self, r: int) -> dict[str, Any]:
        return {"scaling": self.lora_alpha / r, "sparsity": self.sparsity}
