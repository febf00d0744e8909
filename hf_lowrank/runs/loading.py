"""A checkpoint's model in float32; quantised weights are dequantised by their own library, or refused by name."""

import copy
import io
import re
from collections.abc import Iterable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_lowrank.runs.weights import quantization_of, skeleton

# Companions of activations and of the key-value cache, which no weight depends on.
_OF_ACTIVATIONS = re.compile(r"((in|out)put_(global_)?(scale|zero_point)|[kqv]_(scale|zero_point))$")


def load_in_float32(
    folder: str | Path, config: PreTrainedConfig, *, device_map: Any = None, revision: str = "main"
) -> PreTrainedModel:
    """The model of a checkpoint, in float32 and with all its weights; dequantised where they are quantised.

    Args:
        folder, config: a checkpoint or a repository, and its configuration, which says how its weights are quantised.
        device_map: as in transformers; None: on the CPU, whatever the library of the codes prefers.
        revision: of a repository.

    Raises:
        Exception: of any type: weights are missing; or the method of quantisation is unknown, its library is not
            installed or cannot dequantise, or it does not use all tensors of a quantised module.
    """
    options = {"revision": revision, "use_safetensors": True, "output_loading_info": True}
    if quantization_of(config) is None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map=device_map, **options
        )
        model, found = loaded
    else:
        model, found = _load_dequantized(folder, config, device_map, options)
    if found["missing_keys"]:  # transformers would use random weights instead
        raise ValueError(f"{min(found['missing_keys'])} is missing from its weights")
    return cast(PreTrainedModel, model)


def _load_dequantized(
    folder: str | Path, config: PreTrainedConfig, device_map: Any, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    from transformers.quantizers.auto import AutoQuantizationConfig

    quantization = quantization_of(config) or {}
    method = quantization.get("quant_method")
    if quantization.get("transform_config"):
        raise ValueError("its weights belong to transformed hidden states (transform_config)")
    bare = skeleton(Path(folder), _unquantized(config))
    # transformers dequantises all modules of compressed-tensors by one scheme, and multiplies in the scales' type. The
    # library knows the scheme of each, but no stacked experts.
    by_module = method == "compressed-tensors" and bare is not None and not _has_stacks(bare)
    given: Any = AutoQuantizationConfig.from_dict({**quantization, "dequantize": not by_module})
    place = {"device_map": {"": "cpu"} if device_map is None else device_map, "dtype": torch.float32}
    with redirect_stderr(io.StringIO()):  # the libraries' progress bars
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=given, **place, **options)
        model, found = loaded
        _check_all_is_used(found["unexpected_keys"], bare or model)
        if by_module and given.is_quantization_compressed:
            model.hf_quantizer.compressor.decompress_model(model)
        elif getattr(model, "is_quantized", False) and not by_module and method != "torchao":
            model = model.dequantize()
        model = _plain(model, bare, config, place)
    return model, found


def _has_stacks(model: nn.Module) -> bool:
    return any(parameter.dim() > 2 for parameter in model.parameters())


def _unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    del config.quantization_config
    return config


def _check_all_is_used(unexpected: Iterable[str], model: nn.Module) -> None:
    """Raises a ValueError about a tensor of a module with a weight, such as a scale or the order of its columns,
    without which the codes of that weight stand for something else. Other surplus tensors are as in any checkpoint."""
    modules = dict(model.named_modules())
    for name in sorted(unexpected):
        path, _, tensor = name.rpartition(".")
        if path in modules and hasattr(modules[path], "weight") and not _OF_ACTIVATIONS.fullmatch(tensor):
            raise ValueError(f"its tensor {name} is not used")


def _plain(
    model: PreTrainedModel, bare: nn.Module | None, config: PreTrainedConfig, place: dict[str, Any]
) -> PreTrainedModel:
    """A copy with torch's own tensors, and without what the library has left: scales, hooks, conversions for saving,
    and forward passes that quantise weights again once they are moved."""
    own = (bare or model).state_dict()
    weights = {name: _own_tensor(tensor) for name, tensor in model.state_dict().items() if name in own}
    for name, tensor in weights.items():
        if own[name].is_floating_point() and (not tensor.is_floating_point() or tensor.itemsize < 2):
            raise ValueError(f"{name} is not dequantised by its library")
    loaded: Any = type(model).from_pretrained(
        None, config=_unquantized(config), state_dict=weights, output_loading_info=True, **place
    )
    plain, found = loaded
    missing = sorted(found["missing_keys"]) or sorted(map(str, found["mismatched_keys"]))
    if missing:
        raise ValueError(f"{missing[0]} is not dequantised by its library")
    return cast(PreTrainedModel, plain)


def _own_tensor(tensor: Any) -> Tensor:
    own: Tensor = tensor if type(tensor) in (Tensor, nn.Parameter) else tensor.dequantize()
    return own
