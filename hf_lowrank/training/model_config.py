"""The recipe's `model:` block: an architecture of transformers and fields of its configuration."""

import dataclasses
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.runs.weights import MOST_LAYERS
from hf_lowrank.storage.layers import Layers

SIZES = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"}


def checked(section: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """`section`, if its architecture and fields exist and are consistent; else a `UserError`."""
    architecture = section.get("architecture")
    if not isinstance(architecture, str) or architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = nearest(str(architecture), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if hint.startswith("allowed"):
            hint = "allowed: any causal language model of transformers, e.g. llama, qwen3, gpt2"
        where = layers.origin("model.architecture")
        raise UserError(
            f"{where}: model.architecture must be a model_type of transformers, got {architecture!r}; {hint}"
        )
    config_class = CONFIG_MAPPING[architecture]
    allowed = _fields(config_class)
    for key in section:
        if key != "architecture" and key not in allowed:
            known = nearest(str(key), {"architecture", *allowed})
            raise UserError(f"{layers.origin(f'model.{key}')}: unknown key {f'model.{key}'!r}; {known}")
    for key in sorted(SIZES & set(section)):
        if isinstance(section[key], int) and section[key] < 1:
            where = layers.origin(f"model.{key}")
            raise UserError(f"{where}: model.{key} must be at least 1, got {section[key]!r}")
    try:
        blocks = getattr(build(section), "num_hidden_layers", 1)
    except Exception as error:  # transformers raises any type of error for inconsistent sizes
        # The last line of a strict dataclass's error says what was expected and what was given.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        field = next((key for key in section if f"'{key}'" in str(error)), None)
        if field is None:
            raise UserError(f"{layers.path}: model: {reason}") from None
        raise UserError(f"{layers.origin(f'model.{field}')}: model.{field}: {reason}") from None
    if not isinstance(blocks, int) or not 0 <= blocks <= MOST_LAYERS:
        raise UserError(f"{layers.path}: model.num_hidden_layers must be at most {MOST_LAYERS}, got {blocks!r}")
    return section


def build(section: dict[str, Any], **defaults: Any) -> PreTrainedConfig:
    """The configuration that `section` describes, over `defaults`; without a key-value cache."""
    fields = {key: value for key, value in section.items() if key != "architecture"}
    return AutoConfig.for_model(section["architecture"], **{"use_cache": False, **defaults, **fields})


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    return names - {
        "transformers_version",
        "architectures",
        "return_dict",
        "is_encoder_decoder",
        "id2label",
        "label2id",
    }
