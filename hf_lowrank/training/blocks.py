"""The recipe's `model:` and `training:` blocks: fields of transformers' configurations and `TrainingArguments`."""

import ast
import copy
import dataclasses
import inspect
import math
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_lowrank.adapters.configuration import LowRankConfig
from hf_lowrank.errors import UserError, first_line, nearest
from hf_lowrank.runs.weights import MOST_LAYERS
from hf_lowrank.storage.layers import Layers
from hf_lowrank.training.kernels import ATTENTION

# The key of `model:` that is no field of the architecture's configuration.
SCALING = "layernorm_scaling"
SIZES = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"}

# Fields that a run sets itself, by what to do instead or why.
_RESERVED = {
    "give --output": ("output_dir",),
    "give seed at the top of the recipe": ("seed", "data_seed"),
    "a run resumes by itself": ("resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    "the data order depends on the seed alone": (
        "train_sampling_strategy",
        "ignore_data_skip",
        "auto_find_batch_size",
        "dataloader_drop_last",
    ),
    "the run has columns of its own": ("remove_unused_columns", "label_names", "length_column_name"),
    "the run computes the loss only": (
        "include_for_metrics",
        "prediction_loss_only",
        "batch_eval_metrics",
        "eval_do_concat_batches",
    ),
    "every checkpoint is measured": ("save_total_limit",),
    "a run must be able to resume": ("save_only_model",),
    "the last checkpoint is the result": ("load_best_model_at_end",),
    "a run saves at the end of its step and stops on SIGTERM by itself": ("enable_jit_checkpoint",),
    "a non-finite loss stops the run": ("logging_nan_inf_filter",),
    "bars appear in terminals only": ("disable_tqdm",),
    "publishing is a separate step": ("push_to_hub",),
    "a run always trains and evaluates": ("do_train", "do_eval"),
    "a run does not predict": ("do_predict",),
    "processes split the data only": ("parallelism_config",),
}
RESERVED = {key: reason for reason, keys in _RESERVED.items() for key in keys}
OPTIMIZER_KEYS = ("optim", "optim_args", "optim_target_modules")


def architectures() -> list[str]:
    """The causal architectures of transformers; without this package's own class, which is built around one."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name != LowRankConfig.model_type]


def checked_model(section: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """`section`, if its architecture and fields exist and are consistent; else a `UserError`."""
    architecture = section.get("architecture")
    if architecture not in architectures():
        hint = nearest(str(architecture), architectures())
        if hint.startswith("allowed"):
            hint = "allowed: any causal language model of transformers, e.g. llama, qwen3, gpt2"
        where = layers.origin("model.architecture")
        raise UserError(
            f"{where}: model.architecture must be a model_type of transformers, got {architecture!r}; {hint}"
        )
    config_class = CONFIG_MAPPING[architecture]
    allowed = {*_fields(config_class), SCALING, ATTENTION}
    unknown = [key for key in section if key != "architecture" and key not in allowed]
    if unknown:
        allowed |= _optional_fields(config_class)
    for key in unknown:
        if key not in allowed:
            known = nearest(str(key), {"architecture", *allowed})
            raise UserError(f"{layers.origin(f'model.{key}')}: unknown key {f'model.{key}'!r}; {known}")
    if not isinstance(section.get(SCALING, False), bool):
        where = layers.origin(f"model.{SCALING}")
        raise UserError(f"{where}: model.{SCALING} must be true or false, got {section[SCALING]!r}")
    for key in sorted(SIZES & set(section)):
        if isinstance(section[key], int) and section[key] < 1:
            where = layers.origin(f"model.{key}")
            raise UserError(f"{where}: model.{key} must be at least 1, got {section[key]!r}")
    try:
        blocks = getattr(build_config(section), "num_hidden_layers", 1)
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


def build_config(section: dict[str, Any], **defaults: Any) -> PreTrainedConfig:
    """The configuration that `section` describes, over `defaults`; without a key-value cache."""
    fields = {key: value for key, value in section.items() if key not in ("architecture", SCALING)}
    defaults = {"use_cache": False, **defaults}
    if "text_config" in CONFIG_MAPPING[section["architecture"]].sub_configs:  # which is what the model reads then
        fields["text_config"] = {**defaults, **(fields.get("text_config") or {})}
    config = AutoConfig.for_model(section["architecture"], **{**defaults, **fields})
    return LowRankConfig(base_config=config, layernorm_scaling=True) if section.get(SCALING) else config


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    names = {field.name for field in dataclasses.fields(config_class)}
    names |= {*config_class.attribute_map, *config_class.sub_configs}
    return names - {
        "transformers_version",
        "architectures",
        "return_dict",
        "is_encoder_decoder",
        "id2label",
        "label2id",
    }


def _optional_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """Fields that a configuration does not declare, but that its architecture reads where they are given.

    Those are the names in `getattr(config, "head_dim", default)`. A plain `config.name` does not count: of a field
    that is not declared it is computed from others, or belongs to the configuration of another part or head of the
    model. Nor does anything in a model whose text part has a configuration of its own.
    """
    if config_class.sub_configs:
        return set()
    code = inspect.getsource(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[config_class].__module__])
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3:
            owner, name = node.args[:2]
            if ast.unparse(owner) in ("config", "self.config") and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return {name for name in found if not name.startswith("_") and not hasattr(config_class, name)}


def checked_arguments(
    section: dict[str, Any], layers: Layers, *, own_optimizer: bool, own_scheduler: bool
) -> dict[str, Any]:
    """`section` with values converted to the types of their fields; a `UserError` for the first that does not fit.

    `own_optimizer` and `own_scheduler` say whether the method brings its own.
    """
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    # transformers documents true, but its annotation is older.
    hints = {**typing.get_type_hints(TrainingArguments), "fsdp": bool | str | None}
    result: dict[str, Any] = {}
    for key, value in section.items():
        where = layers.origin(f"training.{key}")
        if key in RESERVED:
            raise UserError(f"{where}: training.{key} must be left out; {RESERVED[key]}")
        if own_optimizer and key in OPTIMIZER_KEYS:
            raise UserError(f"{where}: training.{key} must be left out; the method brings its own optimizer")
        if own_scheduler and (key, value) == ("lr_scheduler_type", "linear"):
            raise UserError(f"{where}: training.{key} must be left out; the method brings its own schedule")
        if key not in fields:
            known = nearest(str(key), fields - set(RESERVED))
            known = known if known.startswith("did") else "allowed: any field of transformers.TrainingArguments"
            raise UserError(f"{where}: unknown key {f'training.{key}'!r}; {known}")
        result[key] = _fitted(key, value, hints[key], where)
    for key, rule, fits in RULES:
        if key in result and not fits(result[key]):
            where = layers.origin(f"training.{key}")
            raise UserError(f"{where}: training.{key} must be {rule}, got {result[key]!r}")
    if result.get("dataloader_persistent_workers") and not result.get("dataloader_num_workers"):
        where = layers.origin("training.dataloader_persistent_workers")
        raise UserError(
            f"{where}: training.dataloader_persistent_workers needs workers: set training.dataloader_num_workers"
        )
    try:
        args = build_arguments(result, seed=0, output_dir=layers.path.parent)
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()  # raises for a tracker that is not installed
        if not own_scheduler:
            _check_schedule(args)
        if not own_optimizer:
            _check_optimizer(args)
    except Exception as error:  # so do schedules, optimizers and trackers, with any type of error
        message = first_line(error)
        culprits = [
            key for key, value in result.items() if key in message or (isinstance(value, str) and value in message)
        ]
        if not culprits:
            raise UserError(f"{layers.path}: training: {message}") from None
        key = f"training.{culprits[0]}"
        raise UserError(f"{layers.origin(key)}: {key}: {message}") from None
    _check_accelerator(args.accelerator_config, layers)
    return result


RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("max_steps", "at least 1", lambda value: value >= 1),
    ("per_device_train_batch_size", "at least 1", lambda value: value >= 1),
    ("per_device_eval_batch_size", "at least 1", lambda value: value >= 1),
    ("gradient_accumulation_steps", "at least 1", lambda value: value >= 1),
    ("dataloader_num_workers", "at least 0", lambda value: value >= 0),
    ("weight_decay", "at least 0", lambda value: value >= 0),
    ("torch_compile_backend", "one that accelerate knows", lambda value: str(value).upper() in DynamoBackend.list()),
    ("num_train_epochs", "a number above 0", lambda value: 0 < value < math.inf),
    ("save_strategy", "steps, epoch or no, as every checkpoint counts", lambda value: value != "best"),
)


def _check_schedule(args: TrainingArguments) -> None:
    """Builds Trainer's schedule for a dummy optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = args.max_steps if args.max_steps > 0 else 1000
    given: Any = args.lr_scheduler_kwargs
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, copy.copy(given))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ValueError(
            f"lr_scheduler_kwargs do not fit lr_scheduler_type {kind}, got {given!r}: {first_line(error)}"
        ) from None


def _check_optimizer(args: TrainingArguments) -> None:
    """Builds Trainer's optimizer for a dummy parameter, where it needs no more than parameters."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    model: Any = torch.nn.Linear(2, 2, device="meta")
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not {"params", "model", "optimizer_dict"} & set(options):
            kind([parameter], **options)
    except Exception as error:
        name = getattr(args.optim, "value", args.optim)
        raise ValueError(f"optim {name} cannot be built: {first_line(error)}") from None


def _check_accelerator(config: Any, layers: Layers) -> None:
    """Refuses a second setting for what another field says."""
    twice = {
        "gradient_accumulation_kwargs.num_steps": (
            "num_steps" in (config.gradient_accumulation_kwargs or {}),
            "give training.gradient_accumulation_steps",
        ),
        "split_batches": (config.split_batches, "training.per_device_train_batch_size is that of each process"),
    }
    for key, (given, remedy) in twice.items():
        if given:
            where = layers.origin("training.accelerator_config")
            raise UserError(f"{where}: training.accelerator_config.{key} must be left out; {remedy}")


def build_arguments(section: dict[str, Any], *, seed: int, output_dir: str | Path) -> TrainingArguments:
    """The `TrainingArguments` of a run: the recipe's fields over this package's defaults."""
    defaults: dict[str, Any] = {
        "report_to": "none",
        # By this name a tracker finds a resumed run again.
        "run_name": Path(output_dir).absolute().name,
        "eval_strategy": "epoch" if section.get("save_strategy") == "epoch" else "steps",
        "eval_steps": section.get("save_steps"),
        "logging_steps": 10,
        # bf16 without an accelerator requires it.
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    own: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": seed,
        "disable_tqdm": True,
        # Trainer would replace a non-finite loss by the last mean, and continue.
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "include_for_metrics": ["loss"],
        "prediction_loss_only": False,
    }
    # TrainingArguments modifies the mappings that it is given.
    return TrainingArguments(**{**defaults, **copy.deepcopy(section), **own})


def _fitted(key: str, value: Any, hint: Any, where: str) -> Any:
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return value
    if value is False and key.endswith("_strategy"):
        value = "no"  # as YAML 1.1 reads it
    try:
        fitted = adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        expected = getattr(hint, "__name__", None) or str(hint)
        raise UserError(f"{where}: training.{key} must be {expected}, got {value!r}: {message}") from None
    # Enumerations stay the strings that the user wrote, and 50 stays 50 if the field is a float.
    return fitted if type(fitted) in (bool, int, float, str) and fitted != value else value
