"""Dense weights of adapted layers: from a layer, or from the tensors of a checkpoint without building the model."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from hf_lowrank.adapters.configuration import adapter_from_dict
from hf_lowrank.adapters.eight_bit import decoded
from hf_lowrank.adapters.functional import sltrain_weight, structured_product
from hf_lowrank.errors import UserError

# The base model's attribute in LowRankForCausalLM, and the first part of its tensors' names.
PREFIX = "lm"
ADAPTER = "default"


@torch.no_grad()
def lora_dense_weight(layer: Any, adapter: str = ADAPTER) -> Tensor:
    """W + (α/r) B A of a LoRA layer, (out, in), summed in float32 and rounded once to W's dtype."""
    weight = layer.get_base_layer().weight
    weight = weight.T if layer.fan_in_fan_out else weight
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return merged(weight, A, B, layer.scaling[adapter])


def merged(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """weight + scaling · B A, summed in float32 at least and rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=scaling).to(weight.dtype)


def dense_weight_kind(adapter_config: dict[str, Any] | None) -> Literal["exact", "surrogate"]:
    """Whether the dense weight is equivalent to the layer ("exact") or only a stand-in ("surrogate": CoLA)."""
    if adapter_config is None:
        return "exact"
    config: Any = adapter_from_dict(adapter_config)
    return "surrogate" if getattr(config, "bottleneck_act", "linear") != "linear" else "exact"


def low_rank_factors_from_tensors(
    module: str, get_tensor: Callable[[str], Tensor], adapter_config: dict[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """B (out, r), A (r, in) and the scale of their product, read from a checkpoint of `LowRankForCausalLM`.

    For LoRA that product is the update of the frozen weight, for SLTrain the low-rank part of the weight.

    Args:
        module: dotted name in the dense model, e.g. `model.layers.0.self_attn.q_proj`.
        get_tensor: reads one tensor by its name; raises KeyError if it is missing.
        adapter_config: `LowRankConfig.adapter_config`.

    Raises:
        UserError: a tensor of the module is missing.
    """
    kind = adapter_config["peft_type"]
    ending = f"{ADAPTER}.weight" if kind == "LORA" else ADAPTER
    A, B = (_read(module, f"{kind.lower()}_{factor}.{ending}", get_tensor, kind) for factor in "AB")
    return B, A, _scaling(module, A.shape[0], adapter_config)


def dense_weight_from_tensors(
    module: str, get_tensor: Callable[[str], Tensor], adapter_config: dict[str, Any]
) -> Tensor:
    """The dense weight (out, in), float32, of an adapted module; see `low_rank_factors_from_tensors`."""
    kind = adapter_config["peft_type"]
    if kind == "SST":
        A, B, S, U, V, index = (
            _read(module, f"sst_{key}.{ADAPTER}", get_tensor, kind) for key in ("A", "B", "S", "U", "V", "index")
        )
        U, V = U.float().index_copy(1, index.long(), B.float()), V.float().index_copy(0, index.long(), A.float())
        return (U * S.float()) @ V
    B, A, scaling = low_rank_factors_from_tensors(module, get_tensor, adapter_config)
    B, A = B.float(), A.float()
    if kind == "COLA":
        return B @ A
    if kind == "STRUCTURED":
        return structured_product(torch.eye(A.shape[-1] * math.prod(A.shape[:-2])), A, B).T
    if kind == "SLTRAIN":
        values = _read(module, f"sltrain_values.{ADAPTER}", get_tensor, kind).float()
        support = _read(module, f"sltrain_support.{ADAPTER}", get_tensor, kind)
        return sltrain_weight(A, B, values, support, scaling)
    weight = _read(module, "base_layer.weight", get_tensor, kind).float()
    shape = (B.shape[0], A.shape[1])
    if weight.shape != shape or (shape[0] == shape[1] and adapter_config.get("fan_in_fan_out", False)):
        weight = weight.T
    return merged(weight, A, B, scaling)


def eight_bit_weight_from_tensors(module: str, get_tensor: Callable[[str], Tensor]) -> Tensor:
    """The dense weight (out, in), float32, of a module that keeps it in eight bits.

    Raises:
        UserError: a tensor of the module is missing.
    """
    codes, grid = (_read(module, name, get_tensor, "eight-bit") for name in ("codes", "grid"))
    return decoded(codes, grid, torch.float32)


def _read(module: str, name: str, get_tensor: Callable[[str], Tensor], kind: str) -> Tensor:
    full = f"{PREFIX}.{module}.{name}"
    try:
        return get_tensor(full)
    except KeyError:
        raise UserError(f"{module}: the {kind} checkpoint lacks the tensor {full}") from None


def _scaling(module: str, r: int, adapter_config: dict[str, Any]) -> float:
    if adapter_config["peft_type"] in ("COLA", "STRUCTURED"):
        return 1.0
    config: Any = adapter_from_dict(adapter_config)
    patterns = getattr(config, "alpha_pattern", None) or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config.lora_alpha)
    return alpha / (math.sqrt(r) if getattr(config, "use_rslora", False) else r)
