"""CoLA and SLTrain as PEFT tuners: the layers they replace and the operations they support."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NoReturn

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters.configs import CoLAConfig, ReplacingConfig, SLTrainConfig
from hf_lowrank.adapters.functional import SAVED_BY_COLA_M
from hf_lowrank.adapters.layers import CoLALinear, ReplacedLinear, SLTrainLinear
from hf_lowrank.compat import enable_checkpointing, register_with_peft
from hf_lowrank.errors import UserError
from hf_lowrank.targets import LINEAR_TYPES, target_modules, warn_about_stacks


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
        if peft_config.target_modules is None or peft_config.target_modules == "auto":
            inside = tuple(name + "." for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer))
            replaced = {name.removesuffix(".") for name in inside}
            fresh = {name for name in _auto(model, bool(inside)) if not (name + ".").startswith(inside)}
            peft_config.target_modules = fresh | replaced
        elif peft_config.target_modules != "all-linear":
            _check_each_matches(peft_config, model)

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
                for part in layer.tensor_names():
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
            if isinstance(layer, ReplacedLinear) and layer.dense_weight_kind != "exact":
                raise UserError(
                    f"{layer.layer_name}: {layer.title} cannot be merged: its non-linearity between the factors has "
                    "no dense equivalent; save the adapter or the LowRankForCausalLM instead"
                )


def _auto(model: nn.Module, adapted: bool) -> Sequence[str]:
    try:
        found = list(target_modules(model))
        if not adapted:
            warn_about_stacks(model, "remain dense")
        return found
    except UserError:
        if adapted:
            return []
        raise


def _check_each_matches(config: ReplacingConfig, model: nn.Module) -> None:
    """Each name must match a module: a misspelt one would silently leave its layers dense."""
    wanted = config.target_modules
    if not wanted:
        raise UserError("target_modules must name at least one module, got an empty list")
    inside = tuple(name + "." for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer))
    if not inside:
        target_modules(model, wanted if isinstance(wanted, str) else sorted(wanted))


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
