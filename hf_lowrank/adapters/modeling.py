"""A causal language model with adapters in place of linear layers, whose checkpoints are self-contained."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters.configuration import LowRankConfig
from hf_lowrank.adapters.dense import PREFIX, lora_dense_weight
from hf_lowrank.adapters.eight_bit import EightBitLinear, eight_bit_layers, keep_in_eight_bits, train_weights
from hf_lowrank.adapters.guide import add_guides, drop_guides
from hf_lowrank.adapters.layers import ReplacedLinear, check_plain, check_rank, dense_linear, linear_shape
from hf_lowrank.adapters.methods import AdapterSettings, ReLoraSettings
from hf_lowrank.adapters.norms import fold_scaling, scale_norms
from hf_lowrank.adapters.relora import dense_weights, reinitialise
from hf_lowrank.compat import exclude_from_ddp, targets_unchanged
from hf_lowrank.errors import LowRankWarning, UserError
from hf_lowrank.methods import dense_model
from hf_lowrank.targets import target_modules, warn_about_stacks

PASSED_BY_NAME = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels")


def _of_base_model(name: str) -> Any:
    """A method that calls the base model's method `name`."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.lm, name)(*args, **kwargs)

    return call


class LowRankForCausalLM(PreTrainedModel, GenerationMixin):
    """The causal language model of `config.base_config` with the adapter of `config.adapter_config` on its targets.

    Everything outside the targets (embeddings, norms, head, biases) trains. Replaced layers keep no dense weight of a
    target; LoRA keeps it frozen (ReLoRA merges into it). The dense model is built and initialised first, so that
    everything else starts as in the dense model of the same seed. With `config.layernorm_scaling` the norms are
    scaled, and the layers may stay dense; with `config.eight_bit_modules` some keep their weight in eight bits.

    Raises:
        UserError: the targets match nothing, a rank does not fit, or a checkpoint lacks a tensor or has an unexpected
            one; names the module.
    """

    config_class = LowRankConfig
    base_model_prefix = PREFIX
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LowRankConfig) -> None:
        super().__init__(config)
        self.lm = AutoModelForCausalLM.from_config(config.base_config)
        config.base_config = self.lm.config
        if config.layernorm_scaling:
            scale_norms(self.lm)
        if config.adapter_config is not None or not (config.layernorm_scaling or config.eight_bit_modules):
            adapter = config.peft_config()
            inject(self.lm, adapter)
            if getattr(adapter, "fan_in_fan_out", False):
                config.adapter_config["fan_in_fan_out"] = True  # needed to read the tensors without the model
        if config.eight_bit_modules:
            keep_in_eight_bits(self.lm, config.eight_bit_modules)
        if config.guided:
            add_guides(self.lm)
        self.post_init()
        # Every rank has the same support, indices and codes; DDP would otherwise broadcast it in each forward pass.
        buffers = (name for name, _ in self.named_buffers())
        own = (".sltrain_support.", ".sst_index.", ".placement.", ".codes.", ".grid.")
        guides = (name for name, _ in self.named_parameters() if name.endswith(".guide"))
        without_values = (f"{name}.weight" for name in eight_bit_layers(self))
        exclude_from_ddp(
            self, [*(n for n in buffers if any(part in f"{n}." for part in own)), *guides, *without_values]
        )

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any module; the weights of a training whose guides are gone drop the guides here, too."""
        if self.config.guided and not any(name.endswith(".guide") for name in state_dict):
            drop_guides(self)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def init_weights(self) -> None:
        """Only ties weights: the base model and the adapters are already initialised."""
        self.tie_weights(recompute_mapping=False)

    def initialize_weights(self) -> None:
        """Computes what a loaded model needs and no checkpoint holds: buffers that follow from the configuration.

        The base model does it. For this class, which is not its own, transformers would skip modules without tensors,
        some of which fill the buffers of others. An architecture may initialise a linear layer from the module around
        it, so replaced layers have a weight in the meantime, on the meta device.
        """
        layers: dict[str, Any] = {**target_layers(self), **eight_bit_layers(self.lm)}
        weightless = {name: layer for name, layer in layers.items() if not isinstance(layer, LoraLayer)}
        try:
            for name, layer in weightless.items():
                shell = layer.base_layer if isinstance(layer, ReplacedLinear) else layer
                weight = torch.empty(shell.out_features, shell.in_features, device="meta")
                self.lm.set_submodule(name, dense_linear(weight, shell.bias, shell.was_conv1d))
            self.lm.initialize_weights()
        finally:
            for name, layer in weightless.items():
                self.lm.set_submodule(name, layer)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass, with its arguments and outputs."""
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels)
        named = {name: value for name, value in zip(PASSED_BY_NAME, given, strict=True) if value is not None}
        return self.lm(**named, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generation, with its cache and preparation of inputs."""
        self.lm.generation_config = self.generation_config
        return self.lm.generate(*args, **kwargs)

    prepare_inputs_for_generation = _of_base_model("prepare_inputs_for_generation")
    get_input_embeddings = _of_base_model("get_input_embeddings")
    set_input_embeddings = _of_base_model("set_input_embeddings")
    get_output_embeddings = _of_base_model("get_output_embeddings")
    set_output_embeddings = _of_base_model("set_output_embeddings")
    resize_token_embeddings = _of_base_model("resize_token_embeddings")  # updates copies of the vocabulary size
    get_decoder = _of_base_model("get_decoder")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a missing or unexpected tensor or one of the wrong shape is an error."""
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("ignore_mismatched_sizes", True)  # reported below, by name
        source = pretrained_model_name_or_path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LowRankWarning)  # they were given when it was trained
            loaded: Any = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        _check_complete(source, model, info)
        freeze_dense_weights(model.lm)
        return (model, info) if with_info else model

    @classmethod
    def from_dense(cls, model: PreTrainedModel, adapter_config: PeftConfig | dict[str, Any]) -> LowRankForCausalLM:
        """A new adapted model that starts from `model`'s weights.

        CoLA's and SLTrain's factors come from each dense weight's truncated SVD, SLTrain's values from the residual.
        LoRA is added to the dense weights and leaves the function unchanged.
        """
        config = LowRankConfig(base_config=copy.deepcopy(model.config), adapter_config=adapter_config)
        with torch.device("meta"):
            adapted = cls(copy.deepcopy(config))
        start = config.peft_config()
        if not isinstance(start, LoraConfig):
            start.init = "svd"  # type: ignore[attr-defined]
        lm = copy.deepcopy(model)
        inject(lm, start)
        adapted.lm = lm
        adapted.config.base_config = lm.config
        adapted.generation_config = copy.deepcopy(getattr(model, "generation_config", adapted.generation_config))
        adapted.post_init()
        return adapted.train(model.training)

    def to_dense(self, *, in_place: bool = False) -> PreTrainedModel:
        """An equivalent model of the base architecture.

        Args:
            in_place: build it from this model's own modules, one target after another, so that both never exist side
                by side; this model cannot be used any more. False: a new one.

        Raises:
            UserError: the adapter has no dense equivalent (CoLA).
        """
        layers: dict[str, Any] = {**target_layers(self), **eight_bit_layers(self.lm)}
        for name, layer in layers.items():
            if isinstance(layer, ReplacedLinear) and layer.dense_weight_kind != "exact":
                raise UserError(
                    f"{name}: {layer.title} has no dense equivalent: its non-linearity between the factors cannot be "
                    "merged; load the model itself after `import hf_lowrank`"
                )
        shells = {id(layer): nn.Identity() for layer in layers.values()}
        dense = self.lm if in_place else copy.deepcopy(self.lm, memo=shells)
        for name in list(layers):
            parent, _, child = name.rpartition(".")
            setattr(dense.get_submodule(parent), child, _dense_layer(layers.pop(name)))
        if hasattr(dense, "peft_config"):
            del dense.peft_config
        fold_scaling(dense)
        dense.generation_config = copy.deepcopy(self.generation_config)
        dense.config.architectures = [type(dense).__name__]
        dense.requires_grad_(True)
        return dense


def inject(lm: nn.Module, adapter: PeftConfig) -> None:
    """Adds the adapter to `lm` in place, initialised from its seed, and makes the rest trainable.

    Does not advance torch's global generator.
    """
    with torch.random.fork_rng(devices=()):
        if isinstance(adapter, LoraConfig):
            wanted = adapter.target_modules
            patterns = "auto" if wanted is None else wanted if isinstance(wanted, str) else sorted(wanted)
            layers = target_modules(lm, patterns)
            if patterns == "auto":
                warn_about_stacks(lm, "remain dense")
            for name, layer in layers.items():
                check_plain(name, layer)
                check_rank(name, adapter.r, *linear_shape(layer))
            adapter.target_modules = sorted(layers)
            adapter.fan_in_fan_out = any(isinstance(layer, Conv1D) for layer in layers.values())
        with targets_unchanged():
            inject_adapter_in_model(adapter, lm)
    if isinstance(adapter, LoraConfig):
        reinitialise(lm, seed=0, step=0)
    for parameter in lm.parameters():
        parameter.requires_grad_(True)
    freeze_dense_weights(lm)


def freeze_dense_weights(lm: nn.Module) -> None:
    """Freezes the base weights of the LoRA layers, whose biases train, and what other layers keep frozen."""
    for layer in lm.modules():
        if isinstance(layer, LoraLayer):
            layer.get_base_layer().weight.requires_grad_(False)
        elif isinstance(layer, ReplacedLinear):
            for name in layer.frozen_names:
                getattr(layer, name).requires_grad_(False)


def target_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The adapted layers by their name in the dense model, in module order."""
    lm = model.lm if isinstance(model, LowRankForCausalLM) else model
    return {name: layer for name, layer in lm.named_modules() if isinstance(layer, BaseTunerLayer)}


@torch.no_grad()
def dense_weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The weights of linear modules by their name in the dense model: of adapted layers (out, in), else as stored."""
    lm = model.lm if isinstance(model, LowRankForCausalLM) else model
    found = {}
    for name in names:
        layer: Any = lm.get_submodule(name)
        if isinstance(layer, BaseTunerLayer):
            found[name] = layer.dense_weight() if isinstance(layer, ReplacedLinear) else lora_dense_weight(layer)
        elif isinstance(layer, EightBitLinear):
            found[name] = layer.dense_weight()
        else:
            found[name] = layer.weight.detach()
    return found


@torch.no_grad()
def _dense_layer(layer: Any) -> nn.Module:
    if isinstance(layer, ReplacedLinear):
        shell = layer.base_layer
        weight, bias, as_conv1d = layer.dense_weight().to(shell.placement.dtype), shell.bias, shell.was_conv1d
    elif isinstance(layer, EightBitLinear):
        weight, bias, as_conv1d = layer.dense_weight(), layer.bias, layer.was_conv1d
    else:
        base = layer.get_base_layer()
        weight, bias, as_conv1d = lora_dense_weight(layer), base.bias, isinstance(base, Conv1D)
    return dense_linear(weight, None if bias is None else nn.Parameter(bias.detach().clone()), as_conv1d)


def _check_complete(source: Any, model: LowRankForCausalLM, info: dict[str, Any]) -> None:
    prefix = f"{os.fspath(source)}: " if source is not None else ""
    kind = "eight-bit" if model.config.eight_bit_modules else "layernorm_scaling"
    method = (model.config.adapter_config or {}).get("peft_type", kind)
    for problem, keys in (
        ("lacks the tensor", info["missing_keys"]),
        ("has an unexpected tensor,", info["unexpected_keys"]),
    ):
        if keys:
            first, *rest = sorted(keys)
            more = f" and {len(rest)} more" if rest else ""
            raise UserError(
                f"{prefix}a {method} checkpoint of {type(model.lm).__name__} {problem} {first}{more}; "
                "the file is incomplete or belongs to another method"
            )
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise UserError(f"{prefix}{name} has shape {tuple(found)}, the config requires {tuple(expected)}")


def build_adapted(config: PreTrainedConfig, settings: AdapterSettings, seed: int) -> LowRankForCausalLM:
    """The adapted model, from scratch. Whatever is not a target starts as in the dense model of the same seed.

    Raises:
        UserError: the targets match nothing, or the rank does not fit one of them.
    """
    guided = getattr(settings, "guide_share", 0) > 0
    return _model_of(config, adapter_config=settings.adapter_config(seed), guided=guided)


def _model_of(config: PreTrainedConfig, **own: Any) -> LowRankForCausalLM:
    """The model of an architecture, or of a recipe's `LowRankConfig` with options of the model, and of `own`."""
    if isinstance(config, LowRankConfig):
        own |= {"base_config": config.base_config, "layernorm_scaling": config.layernorm_scaling}
    else:
        own["base_config"] = config
    return LowRankForCausalLM(LowRankConfig(**own))


def build_relora(config: PreTrainedConfig, settings: ReLoraSettings, seed: int) -> LowRankForCausalLM:
    """`build_adapted` with LoRA's factors drawn from the seed; the dense weights train during a warm start."""
    model = build_adapted(config, settings, seed)
    reinitialise(model, seed=settings.seed_or(seed), step=0)
    if settings.warm_start_steps:
        for weight in dense_weights(model):
            weight.requires_grad_(True)
    return model


def build_with_weight_dtype(config: PreTrainedConfig, settings: Any, seed: int) -> PreTrainedModel:
    """The dense model, whose target modules keep their weight as `settings.weight_dtype` says.

    Raises:
        UserError: the targets match nothing, or one shares its weight with another layer.
    """
    if settings.weight_dtype == "parameter":
        return dense_model(config, settings, seed)
    model = _model_of(config, eight_bit_modules=settings.target_modules)
    train_weights(model)
    return model


AutoModelForCausalLM.register(LowRankConfig, LowRankForCausalLM)
