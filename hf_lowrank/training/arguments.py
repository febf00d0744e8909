"""The recipe's `training:` block: fields of transformers' `TrainingArguments` under their own names."""

import copy
import dataclasses
import typing
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from transformers import TrainingArguments

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.storage.layers import Layers

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
}
RESERVED = {key: reason for reason, keys in _RESERVED.items() for key in keys}
OPTIMIZER_KEYS = ("optim", "optim_args", "optim_target_modules")


def checked(section: dict[str, Any], layers: Layers, *, own_optimizer: bool) -> dict[str, Any]:
    """`section` with values converted to the types of their fields; a `UserError` for the first that does not fit."""
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
        if key not in fields:
            known = nearest(str(key), fields - set(RESERVED))
            known = known if known.startswith("did") else "allowed: any field of transformers.TrainingArguments"
            raise UserError(f"{where}: unknown key {f'training.{key}'!r}; {known}")
        result[key] = _fitted(key, value, hints[key], where)
    if "max_steps" in result and result["max_steps"] < 1:
        raise UserError(
            f"{layers.origin('training.max_steps')}: training.max_steps must be at least 1, got {result['max_steps']}"
        )
    try:
        build(result, seed=0, output_dir=layers.path.parent)
    except (ValueError, TypeError, ImportError) as error:
        message = str(error).strip().splitlines()[0]
        culprits = [
            key for key, value in result.items() if key in message or (isinstance(value, str) and value in message)
        ]
        if not culprits:
            raise UserError(f"{layers.path}: training: {message}") from None
        key = f"training.{culprits[0]}"
        raise UserError(f"{layers.origin(key)}: {key}: {message}") from None
    return result


def build(section: dict[str, Any], *, seed: int, output_dir: str | Path) -> TrainingArguments:
    """The `TrainingArguments` of a run: the recipe's fields over this package's defaults."""
    defaults: dict[str, Any] = {
        "report_to": "none",
        "eval_strategy": "steps",
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
    try:
        fitted = adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        expected = getattr(hint, "__name__", None) or str(hint)
        raise UserError(f"{where}: training.{key} must be {expected}, got {value!r}: {message}") from None
    # Enumerations stay the strings that the user wrote, and 50 stays 50 if the field is a float.
    return fitted if type(fitted) in (bool, int, float, str) and fitted != value else value
