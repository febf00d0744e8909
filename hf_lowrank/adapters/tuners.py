"""Replaced layers as PEFT tuners: their configs, the layers they replace and the operations they support."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NoReturn

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters.functional import SAVED_BY_COLA_M
from hf_lowrank.adapters.layers import CoLALinear, ReplacedLinear, SLTrainLinear, check_plain
from hf_lowrank.adapters.methods import (
    CoLASettings,
    ReplacingSettings,
    SLTrainSettings,
    SSTSettings,
    StructuredSettings,
)
from hf_lowrank.adapters.spectral import SSTLinear
from hf_lowrank.adapters.structured import StructuredLinear
from hf_lowrank.compat import enable_checkpointing, register_with_peft
from hf_lowrank.errors import UserError, nearest
from hf_lowrank.methods import check_options
from hf_lowrank.targets import LINEAR_TYPES, compiled, target_modules, warn_about_stacks


@dataclass(kw_only=True)
class ReplacingConfig(PeftConfig):
    """Fields that these tuners share: the linear layers to replace, the rank and the initialisation.

    Raises:
        UserError: a value is not allowed; the message names the field and what is allowed.
    """

    method_name: ClassVar[str]
    settings: ClassVar[type[ReplacingSettings]]

    r: int = field(default=128, metadata={"help": "Rank of the factors; at most the smaller side of each target."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names or name endings, a regular expression for the whole name, 'all-linear', or 'auto' (the "
            "default): every linear layer inside the model's repeated blocks."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, name endings, or a regular expression: layers to leave dense."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save with the adapter."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks for the layers that a name ending or expression matches."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train and save: 'none', 'all' or '<method>_only'."})
    init: Literal["random", "svd"] = field(
        default="random",
        metadata={"help": "'random' draws as the paper does; 'svd' starts from the dense weight's truncated SVD."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random draws of each layer."})

    def __post_init__(self) -> None:
        super().__post_init__()
        method = type(self).__name__
        self.peft_type = PeftType(self.method_name.upper())
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            names = getattr(self, key)
            listed = isinstance(names, list | set | tuple) and all(isinstance(name, str) for name in names)
            self._check(key, names is None or isinstance(names, str) or listed, "be a name or a list of names")
        self._check("rank_pattern", isinstance(self.rank_pattern or {}, dict), "map names to ranks")
        self._check("seed", isinstance(self.seed, int) and not isinstance(self.seed, bool), "be an integer")
        self._check("init", self.init in ("random", "svd"), "be 'random' or 'svd'")
        only = f"{self.method_name}_only"
        self._check("bias", self.bias in ("none", "all", only), f"be 'none', 'all' or {only!r}")
        for key in ("target_modules", "exclude_modules"):
            names = getattr(self, key)
            if isinstance(names, list):
                setattr(self, key, set(names))
            elif isinstance(names, str):
                compiled(names, f"{method}: {key}")
        check_options(self.settings, {"r": self.r}, method)
        for name, rank in (self.rank_pattern or {}).items():
            check_options(self.settings, {"r": rank}, f"{method} for {name!r}")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves the options but `init`: loaded weights replace what it would draw or decompose."""
        saved = copy.copy(self)
        saved.init = "random"
        super(ReplacingConfig, saved).save_pretrained(save_directory, **kwargs)

    def _check(self, key: str, valid: bool, rule: str) -> None:
        if not valid:
            raise UserError(f"{type(self).__name__}: {key} must {rule}, got {getattr(self, key)!r:.80}")

    def options(self, r: int) -> dict[str, Any]:
        """The other options of a layer of rank `r`."""
        raise NotImplementedError


@dataclass(kw_only=True)
class CoLAConfig(ReplacingConfig):
    """y = B · σ(A x) in place of a linear layer (arXiv 2502.10940).

    The layer replaces the dense weight instead of adding to it, so it cannot be merged or disabled. With
    `bottleneck_act="linear"` it is the plain low-rank W = B A, which can be merged.
    """

    method_name = "cola"
    settings = CoLASettings

    bottleneck_act: str = field(
        default="silu", metadata={"help": "σ, by its name in transformers; 'linear' omits it (low-rank W = B A)."}
    )
    checkpoint_activations: bool = field(
        default=False,
        metadata={"help": "CoLA-M: store only the r-wide activations of each block, recompute the rest."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("bottleneck_act", isinstance(self.bottleneck_act, str), "be a name")
        if self.bottleneck_act not in ACT2FN:
            raise UserError(
                f"CoLAConfig: unknown bottleneck_act {self.bottleneck_act!r}; {nearest(self.bottleneck_act, ACT2FN)}"
            )

    def options(self, r: int) -> dict[str, Any]:
        return {"bottleneck_act": self.bottleneck_act, "keep_bottleneck": self.checkpoint_activations}


@dataclass(kw_only=True)
class SLTrainConfig(ReplacingConfig):
    """W = (lora_alpha / r) · B A + S with a fixed random support, in place of a linear layer (arXiv 2406.02214)."""

    method_name = "sltrain"
    settings = SLTrainSettings

    lora_alpha: float = field(default=32, metadata={"help": "α; the product of the factors is scaled by α / r."})
    sparsity: float = field(default=0.03, metadata={"help": "Kept share of S, between 0 and 1: δ · out · in values."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.settings, {"sparsity": self.sparsity, "lora_alpha": self.lora_alpha}, "SLTrainConfig")

    def options(self, r: int) -> dict[str, Any]:
        return {"scaling": self.lora_alpha / r, "sparsity": self.sparsity}


@dataclass(kw_only=True)
class StructuredConfig(ReplacingConfig):
    """Two factors, of which one or both are block-diagonal, in place of a linear layer (arXiv 2406.16450)."""

    method_name = "structured"
    settings = StructuredSettings

    structure: Literal["low_rank", "block_dense", "block_shuffle"] = field(
        default="block_dense", metadata={"help": "No, the first or both factors are block-diagonal."}
    )
    blocks: int = field(default=4, metadata={"help": "Blocks of a block-diagonal factor."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.settings, {"structure": self.structure, "blocks": self.blocks}, "StructuredConfig")

    def options(self, r: int) -> dict[str, Any]:
        return {"structure": self.structure, "blocks": self.blocks}


@dataclass(kw_only=True)
class SSTConfig(ReplacingConfig):
    """W = U diag(S) Vᵀ, of whose vectors r drawn pairs train at a time, in place of a linear layer (arXiv 2405.15481).

    The layer starts as the dense one, whatever `init` says, and at random only where an earlier adapter has replaced
    that. `SSTCallback` normalises the vectors and draws new pairs.
    """

    method_name = "sst"
    settings = SSTSettings

    def options(self, r: int) -> dict[str, Any]:
        return {}


class ReplacingTuner(BaseTuner):
    """Replaces each target by `tuner_layer_cls` and drops its dense weight.

    Raises:
        UserError: the targets match no linear layer, one is not linear, or a rank does not fit; names the module.
    """

    tuner_layer_cls: type[ReplacedLinear]
    title: ClassVar[str]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        wanted = peft_config.target_modules
        replaced = {name for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
        if wanted is None or wanted == "auto":
            peft_config.target_modules = replaced | _dense_targets(model, replaced)
        elif not wanted:
            raise UserError("target_modules must name at least one module, got an empty list")
        elif wanted == "all-linear":
            peft_config.target_modules = replaced | _dense_targets(model, replaced, wanted)
        elif not replaced:
            # Each name must match a module: a misspelt one would silently leave its layers dense.
            target_modules(model, wanted if isinstance(wanted, str) else sorted(wanted))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        key = get_pattern_key(list(peft_config.rank_pattern), current_key)
        r = peft_config.rank_pattern.get(key, peft_config.r)
        layer, weight = self._layer_for(target, current_key)
        layer.update_layer(
            adapter_name,
            r,
            init=peft_config.init,
            seed=peft_config.seed,
            weight=weight,
            options=peft_config.options(r),
            inference_mode=peft_config.inference_mode,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)

    def _layer_for(self, target: nn.Module, name: str) -> tuple[ReplacedLinear, Tensor | None]:
        if isinstance(target, self.tuner_layer_cls):
            return target, None
        if isinstance(target, BaseTunerLayer):
            raise UserError(f"{name}: {self.title} replaces linear layers, but this one already has another adapter")
        if not isinstance(target, LINEAR_TYPES):
            raise UserError(f"{name}: {self.title} replaces nn.Linear and Conv1D layers, got {type(target).__name__}")
        check_plain(name, target)
        weight = target.weight.detach()
        return self.tuner_layer_cls(target, name), weight.T if isinstance(target, Conv1D) else weight

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's method, but a missing tensor is an error: there is no dense weight to fall back to."""
        result = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, layer in model.named_modules():
            if isinstance(layer, cls.tuner_layer_cls) and adapter_name in layer.r:
                for part in layer.tensor_names:
                    if f"{name}.{part}.{adapter_name}" not in result:
                        raise UserError(
                            f"{layer.layer_name}: the {cls.title} adapter lacks the tensor {name}.{part}; "
                            "the file is incomplete or belongs to another method"
                        )
        return result

    def disable_adapter_layers(self) -> None:
        """Raises UserError: a replaced layer has no disabled state."""
        self._no_dense_weight("disabled")

    def unload(self) -> NoReturn:
        """Raises UserError: the dense weights are gone."""
        self._no_dense_weight("unloaded")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuses batches of several adapters, which PEFT takes in silence where a tuner says nothing."""
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                f"adapter_names must be left out: {self.title} replaces layers, so one adapter computes a batch; "
                "choose it by set_adapter"
            )
        yield

    def _no_dense_weight(self, what: str) -> NoReturn:
        first = next(iter(self.targeted_module_names), "the model")
        raise UserError(
            f"{first}: {self.title} replaces the layer and keeps no dense weight, so it cannot be {what}; "
            "load the dense model again"
        )

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        # All layers are checked before the first one changes, so that an error leaves the model unchanged.
        for layer in self.model.modules():
            if isinstance(layer, ReplacedLinear):
                layer.check_mergeable()


def _dense_targets(model: nn.Module, replaced: set[str], wanted: str = "auto") -> set[str]:
    """The automatic targets, or all linear layers, that no adapter has replaced; may be empty if some are."""
    if not replaced:
        found = set(target_modules(model, wanted))
        warn_about_stacks(model, "remain dense")
        return found
    inside = tuple(name + "." for name in replaced)
    try:
        return {name for name in target_modules(model, wanted) if not (name + ".").startswith(inside)}
    except UserError:
        return set()


class CoLAModel(ReplacingTuner):
    """CoLA's tuner (arXiv 2502.10940)."""

    prefix = "cola_"
    title = "CoLA"
    tuner_layer_cls = CoLALinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        if config.checkpoint_activations:
            keep_only_bottlenecks(model)


class SLTrainModel(ReplacingTuner):
    """SLTrain's tuner (arXiv 2406.02214)."""

    prefix = "sltrain_"
    title = "SLTrain"
    tuner_layer_cls = SLTrainLinear


class StructuredModel(ReplacingTuner):
    """The tuner of structured feed-forwards (arXiv 2406.16450)."""

    prefix = "structured_"
    title = "Structured"
    tuner_layer_cls = StructuredLinear


class SSTModel(ReplacingTuner):
    """SST's tuner (arXiv 2405.15481)."""

    prefix = "sst_"
    title = "SST"
    tuner_layer_cls = SSTLinear


def keep_only_bottlenecks(model: nn.Module) -> None:
    """Turns on CoLA-M: each block saves its input and the r-wide products A x, and recomputes the rest.

    This is transformers' activation checkpointing with a selective policy, so it works for every architecture that
    supports checkpointing, and `activation_checkpointing_disable()` turns it off.

    Raises:
        UserError: the model does not support activation checkpointing.
    """
    context = partial(create_selective_checkpoint_contexts, SAVED_BY_COLA_M)
    if not enable_checkpointing(model, partial(checkpoint, use_reentrant=False, context_fn=context)):
        raise UserError(
            "checkpoint_activations needs a transformers model that supports activation checkpointing, "
            f"got {type(model).__name__}"
        )


register_with_peft("cola", CoLAConfig, CoLAModel)
register_with_peft("sltrain", SLTrainConfig, SLTrainModel)
register_with_peft("structured", StructuredConfig, StructuredModel)
register_with_peft("sst", SSTConfig, SSTModel)
