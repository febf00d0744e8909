"""Recipes: one YAML file, validated once, at the start, into typed objects."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedConfig, TrainingArguments

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.methods import METHODS, Method, MethodSettings
from hf_lowrank.training import arguments, model_config
from hf_lowrank.training.yaml_files import Layers, read_layers

logger = logging.getLogger(__name__)

SECTIONS = ("name", "seed", "method", "model", "data", "training")
HUB_KEYS = ("dataset", "subset", "revision", "split", "held_out_split", "streaming", "shuffle_buffer")
FILES_KEYS = ("train_files", "held_out_files")


class DataSettings(BaseModel):
    """The recipe's `data:` block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Literal["python-library", "hub", "files"] = Field(description="where the text comes from")
    dataset: str | None = Field(None, description="hub: the dataset's id")
    subset: str | None = Field(None, description="hub: the dataset's configuration")
    revision: str | None = Field(None, description="hub: branch, tag or commit")
    split: str = Field("train", description="hub: the split to train on")
    held_out_split: str | None = Field(
        None, description="hub: the split to evaluate on; None takes a share, or the head of the stream"
    )
    text_column: str = Field("text", description="hub, .jsonl and .parquet: the column with the text")
    streaming: bool = Field(False, description="hub: read over the network as training goes on")
    shuffle_buffer: int = Field(
        0, ge=0, description="hub, streaming: documents in the shuffle buffer; 0 keeps the order"
    )
    train_files: list[str] | None = Field(None, description="files: .txt, .jsonl, .parquet; globs are allowed")
    held_out_files: list[str] | None = Field(None, description="files: None takes a share of the documents")
    held_out_share: float = Field(0.05, gt=0, lt=1, description="share of documents held out, by a hash of each")
    sequence_length: int = Field(ge=2, description="tokens a sequence")
    shape: Literal["packed", "documents"] = Field(
        "packed", description="documents joined and cut, or one document each, cut and padded"
    )
    tokenizer: str | None = Field(None, description="a Hub id or a folder; None trains one on the train part")
    vocabulary_size: int = Field(2048, ge=300, description="of the tokenizer that is trained")
    evaluation_sequences: int = Field(256, ge=1, description="held-out sequences written with the run")
    evaluation_sequences_in_training: int | None = Field(
        None, ge=1, description="how many of them, from the first, give the loss during training; None takes all"
    )

    @model_validator(mode="after")
    def _keys_fit_the_source(self) -> DataSettings:
        foreign = {"hub": FILES_KEYS, "files": HUB_KEYS, "python-library": (*HUB_KEYS, *FILES_KEYS, "text_column")}
        for key in foreign[self.source]:
            if key in self.model_fields_set:
                raise ValueError(f"data.{key} must be left out with data.source {self.source}")
        if self.source == "hub" and not self.dataset:
            raise ValueError("data.dataset must name a dataset with data.source hub, as allenai/c4")
        if self.source == "files" and not self.train_files:
            raise ValueError("data.train_files must name at least one file with data.source files")
        if self.streaming and self.tokenizer is None:
            raise ValueError(
                "data.tokenizer must be given with data.streaming: a stream cannot be read twice to train one"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated recipe.

    Attributes:
        name: names the run; the recipe's `name:`, else its folder and file, as `nano-galore`.
        seed: of the initial weights, the order of the data, and everything random in the method.
        method: the entry of the table of methods.
        settings: the method's own settings.
        model: `architecture` and fields of its configuration, as given.
        data: the corpus and its shape.
        training: fields of `TrainingArguments`, as given.
        path: the file it was read from, for messages.
    """

    name: str
    seed: int
    method: Method
    settings: MethodSettings
    model: dict[str, Any]
    data: DataSettings
    training: dict[str, Any]
    path: Path

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as plain data: what `recipe.yaml` in the run directory says."""
        return {
            "name": self.name,
            "seed": self.seed,
            "method": {"name": self.method.name, **self.settings.model_dump(mode="json")},
            "model": self.model,
            "data": self.data.model_dump(mode="json", exclude_unset=True),
            "training": self.training,
        }

    def config(self, **defaults: Any) -> PreTrainedConfig:
        """The model's configuration; `defaults` (as the vocabulary's size) give way to what the recipe says."""
        return model_config.build(self.model, **defaults)

    def arguments(self, output_dir: str | Path) -> TrainingArguments:
        """The run's `TrainingArguments`."""
        return arguments.build(self.training, seed=self.seed, output_dir=output_dir)


def load_recipe(
    path: str | Path, overrides: Iterable[str] = (), seed: int | None = None, *, folder: str | Path = ""
) -> Recipe:
    """Reads and validates a recipe; nothing is written.

    Args:
        path: a YAML file; `extends: other.yaml` in it lays it over another one, key by key.
        overrides: `key=value` with a dotted key and a YAML value, as `method.rank=32`.
        seed: overrides the recipe's seed.
        folder: where relative paths in `overrides` begin; the current folder unless told.

    Raises:
        UserError: one line that names the file, the key and what is allowed.
    """
    layers = read_layers(path, overrides, folder=Path(folder))
    if seed is not None:
        layers.lay({"seed": seed}, "--seed")
    return _resolve(layers)


def _resolve(layers: Layers) -> Recipe:
    data = layers.data
    for key in data:
        if key not in SECTIONS:
            raise UserError(f"{layers.origin(str(key))}: unknown key {str(key)!r}; {nearest(str(key), SECTIONS)}")
    sections = {key: _section(layers, key) for key in ("method", "model", "data", "training")}
    method, settings = _method(layers, sections["method"])
    try:
        data_settings = DataSettings.model_validate(sections["data"])
    except ValidationError as error:
        raise _translated(error, layers, "data", DataSettings) from None
    recipe = Recipe(
        name=_name(layers),
        seed=_seed(layers),
        method=method,
        settings=settings,
        model=model_config.checked(sections["model"], layers),
        data=data_settings,
        training=arguments.checked(sections["training"], layers, own_optimizer=method.build_optimizer is not None),
        path=layers.path,
    )
    if recipe.data.streaming and "max_steps" not in recipe.training:
        raise UserError(f"{layers.path}: training.max_steps must be given with data.streaming")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are said when it is built to be trained
        _check_buildable(recipe, layers)
    return recipe


def _section(layers: Layers, key: str) -> dict[str, Any]:
    if key not in layers.data:
        raise UserError(f"{layers.path}: {key} is missing; a recipe needs method, model, data and training")
    section = layers.data[key]
    if not isinstance(section, dict):
        raise UserError(f"{layers.origin(key)}: {key} must be a mapping of keys to values, got {section!r}")
    return dict(section)


def _name(layers: Layers) -> str:
    default = f"{layers.path.resolve().parent.name}-{layers.path.stem}"
    name = layers.data.get("name", default)
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise UserError(f"{layers.origin('name')}: name must be a file name without slashes, got {name!r}")
    return name


def _seed(layers: Layers) -> int:
    seed = layers.data.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"{layers.origin('seed')}: seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
    return seed


def _method(layers: Layers, section: dict[str, Any]) -> tuple[Method, MethodSettings]:
    name = section.pop("name", None)
    if not isinstance(name, str):
        raise UserError(
            f"{layers.origin('method.name')}: method.name must be one of {', '.join(METHODS)}, got {name!r}"
        )
    try:
        method = METHODS[name]
    except UserError as error:
        raise UserError(f"{layers.origin('method.name')}: method.name: {error}") from None
    try:
        return method, method.settings.model_validate(section)
    except ValidationError as error:
        raise _translated(error, layers, "method", method.settings) from None


def _translated(error: ValidationError, layers: Layers, section: str, model: type[BaseModel]) -> UserError:
    """The first of pydantic's complaints as one line of ours."""
    first = error.errors(include_url=False)[0]
    # A union's branches and a list's places follow the field's own name; the name is what the user wrote.
    key = ".".join([section, *[str(part) for part in first["loc"][:1]]])
    where = layers.origin(key)
    if first["type"] == "extra_forbidden":
        allowed = {*model.model_fields, "name"} if section == "method" else set(model.model_fields)
        return UserError(f"{where}: unknown key {key!r}; {nearest(str(first['loc'][0]), allowed)}")
    if first["type"] == "missing":
        return UserError(f"{layers.path}: {key} is missing")
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        # A complaint about several keys together begins with the one to change.
        return UserError(f"{layers.origin(message.split()[0])}: {message}")
    return UserError(f"{where}: {key}: {message[:1].lower()}{message[1:]}, got {first['input']!r}")


def _check_buildable(recipe: Recipe, layers: Layers) -> None:
    """Builds the model and its optimizer without memory, so that what cannot be built is known before anything is."""
    training_arguments = recipe.arguments(layers.path.parent)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = recipe.method.build_model(recipe.config(), recipe.settings, recipe.seed)
    except Exception as error:  # transformers raises whatever sizes that make no sense lead it to
        raise UserError(f"{layers.path}: model cannot be built: {first_line(error)}") from None
    try:
        if recipe.method.build_optimizer is not None:
            optimizer = recipe.method.build_optimizer(model, recipe.settings, training_arguments)
            if recipe.method.build_scheduler is not None and training_arguments.max_steps > 0:
                recipe.method.build_scheduler(
                    optimizer, recipe.settings, training_arguments, training_arguments.max_steps
                )
        recipe.method.callbacks(recipe.settings, training_arguments)
    except (ValueError, TypeError, ArithmeticError) as error:
        message = first_line(error)
        field = message.split()[0]
        if field in type(recipe.settings).model_fields:
            raise UserError(f"{layers.origin(f'method.{field}')}: method.{message}") from None
        raise UserError(f"{layers.path}: method: {message}") from None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
