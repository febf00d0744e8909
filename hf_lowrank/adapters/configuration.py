"""The config of a model that changes a base architecture: that architecture's config, and the changes."""

import dataclasses
from typing import Any, ClassVar

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from hf_lowrank.compat import attention_of, is_initialized, register_model
from hf_lowrank.errors import UserError

ADAPTERS = ("COLA", "SLTRAIN", "STRUCTURED", "SST", "LORA")

# Fields that record where an adapter came from.
PROVENANCE = ("peft_version", "base_model_name_or_path", "revision", "auto_mapping", "task_type", "runtime_config")


def adapter_to_dict(config: PeftConfig | dict[str, Any]) -> dict[str, Any]:
    """`peft_type` and the fields that differ from their defaults, ready for JSON.

    Raises:
        UserError: a `LowRankForCausalLM` does not support this type of adapter.
    """
    if isinstance(config, dict):
        config = adapter_from_dict(config)
    peft_type = _supported(getattr(config.peft_type, "value", config.peft_type))
    default = type(config)()
    kept: dict[str, Any] = {"peft_type": peft_type}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in (*PROVENANCE, "peft_type", "inference_mode") and value != getattr(default, field.name):
            kept[field.name] = sorted(value, key=str) if isinstance(value, set) else value
    return kept


def adapter_from_dict(entries: dict[str, Any]) -> PeftConfig:
    """The PEFT config that `entries` describe.

    Raises:
        UserError: an unknown type or key, or a value that is not allowed.
    """
    entries = dict(entries)
    peft_type = _supported(str(entries.pop("peft_type", None)).upper())
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    unknown = sorted(set(entries) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise UserError(f"adapter_config: unknown option {unknown[0]!r} of {cls.__name__}")
    try:
        return cls(**entries)
    except (TypeError, AttributeError, KeyError) as error:  # PEFT's own configs do not check types
        raise UserError(f"adapter_config: {' '.join(str(error).split())}") from None


def _supported(peft_type: object) -> str:
    name = str(peft_type)[:40]
    if name not in ADAPTERS:
        raise UserError(f"adapter_config: peft_type must be one of {', '.join(ADAPTERS)}, got {name!r}")
    return name


class LowRankConfig(PreTrainedConfig):
    """Config of `LowRankForCausalLM`.

    Attributes of the base config (`hidden_size`, `vocab_size`, …) can be read and set on it, too.

    Attributes:
        base_config: config of the dense architecture.
        adapter_config: `peft_type` (one of `ADAPTERS`) and the options of its PEFT config, or that config; None for
            dense layers, which only `layernorm_scaling` and `eight_bit_modules` allow.
        guided: whether the layers have guides, see `hf_lowrank.adapters.guide`; a training sets it.
        eight_bit_modules: which linear layers keep their weight in eight bits, as for `target_modules`; None for none.
        layernorm_scaling: whether the norms' outputs are scaled by depth, see `hf_lowrank.adapters.norms`.
    """

    model_type = "lowrank"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "base_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    base_config: Any = None
    adapter_config: Any = None
    layernorm_scaling: bool = False
    eight_bit_modules: Any = None
    guided: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.adapter_config is not None:
            self.adapter_config = adapter_to_dict(self.adapter_config)
        # transformers would set that of the base config to the one of this config.
        kwargs.setdefault("attn_implementation", attention_of(self.base_config))
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The base architecture's text config; caches, generation and resizing read and write it."""
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)

    def _get_generation_parameters(self) -> dict[str, Any]:
        """Those of the base config, which may declare some as fields (BART's `forced_eos_token_id`)."""
        return self.base_config._get_generation_parameters()

    def validate(self) -> None:
        """The base config's checks: those here would hold its fields against what any architecture may have."""
        if self.base_config is not None:
            self.base_config.validate()

    def peft_config(self) -> PeftConfig:
        """A new PEFT config of the adapter (PEFT modifies the one it gets).

        Raises:
            UserError: the adapter config is missing.
        """
        if self.adapter_config is None:
            raise UserError("LowRankConfig: adapter_config is missing; give base_config and adapter_config")
        return adapter_from_dict(self.adapter_config)

    def __getattr__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name.startswith("_") or not is_initialized(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return getattr(own["base_config"], name)
        except RuntimeError as error:  # of a field that has a value for each layer (Gemma 4's head_dim)
            raise AttributeError(str(error)) from error

    def __setattr__(self, name: str, value: Any) -> None:
        base = vars(self).get("base_config") if is_initialized(self) else None
        inherited = base is not None and not name.startswith("_") and name not in self.__dict__
        if inherited and not hasattr(type(self), name) and hasattr(base, name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)


AutoConfig.register("lowrank", LowRankConfig)
register_model(LowRankConfig, "hf_lowrank.adapters.modeling:LowRankForCausalLM")
