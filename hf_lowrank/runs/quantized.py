"""Checkpoints with quantised weights: dequantised by the library of their method, or refused with the reason."""

import copy
import io
import json
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_lowrank.runs.weights import quantization_of, skeleton

# Companions of activations and of the key-value cache, which no weight depends on.
_OF_ACTIVATIONS = re.compile(r"(.*\.)?((in|out)put_(global_)?(scale|zero_point)|[kqv]_(scale|zero_point))$")


def load_dequantized(
    folder: Path, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """The model of a quantised checkpoint with plain weights in float32, and transformers' loading information.

    Args:
        folder, config: a checkpoint and its configuration, which says how its weights are quantised.
        **options: of `from_pretrained`.

    Raises:
        Exception: of any type: the method is unknown, its library is not installed or cannot dequantise, or the
            checkpoint has tensors that it does not use.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    quantization = quantization_of(config) or {}
    if quantization.get("transform_config"):
        raise ValueError("its weights belong to transformed hidden states (transform_config)")
    by_module = _differs_between_modules(quantization)
    given = AutoQuantizationConfig.from_dict({**quantization, "dequantize": not by_module})
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        quantization_config=given,
        **options,
    )
    model, found = loaded
    unused = sorted(name for name in found["unexpected_keys"] if not _OF_ACTIVATIONS.fullmatch(name))
    if unused:  # a scale, a zero point or an order of columns, without which codes stand for something else
        raise ValueError(f"its tensor {unused[0]} is not used")
    if by_module:
        with redirect_stderr(io.StringIO()):  # progress bars
            model.hf_quantizer.compressor.decompress_model(model)
    if by_module or quantization.get("quant_method") == "torchao":
        model = _plain(model, folder, config)
    elif getattr(model, "is_quantized", False):
        model = model.dequantize().float()
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or type(parameter.data) is not torch.Tensor:
            raise ValueError(f"{name} is not dequantised by its library")
    return model, found


def _differs_between_modules(quantization: dict[str, Any]) -> bool:
    """Whether a checkpoint of compressed-tensors has several schemes. transformers dequantises every module by the
    first one; the library knows that of each."""
    if quantization.get("quant_method") != "compressed-tensors":
        return False
    schemes = [group.get("weights") for group in (quantization.get("config_groups") or {}).values()]
    return len({json.dumps(scheme, sort_keys=True, default=str) for scheme in schemes}) > 1


def _plain(model: PreTrainedModel, folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """A copy with torch's own tensors, and without what the library has left: scales, hooks, and forward passes that
    quantise weights again once they are moved."""
    config = copy.deepcopy(config)
    del config.quantization_config
    names = set((skeleton(folder, config) or model).state_dict())
    weights = {name: _own_tensor(tensor) for name, tensor in model.state_dict().items() if name in names}
    plain: PreTrainedModel = type(model).from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    return plain


def _own_tensor(tensor: Any) -> torch.Tensor:
    plain: torch.Tensor = tensor if type(tensor) in (torch.Tensor, torch.nn.Parameter) else tensor.dequantize()
    return plain
