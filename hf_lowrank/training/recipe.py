"""Recipes: one YAML file, validated once, at the start, into typed objects."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedConfig, TrainingArguments

from hf_lowrank.errors import UserError, first_line, nearest
from hf_lowrank.methods import METHODS, Method, MethodSettings
from hf_lowrank.storage.layers import Layers, read_layers, validated
from hf_lowrank.training.blocks import build_arguments, build_config, checked_arguments, checked_model
from hf_lowrank.training.files import is_remote
from hf_lowrank.training.kernels import ATTENTION, check_kernels

SECTIONS = ("name", "seed", "method", "model", "data", "training")
HUB_KEYS = ("dataset", "subset", "revision", "split", "held_out_split", "streaming", "shuffle_buffer")
FILES_KEYS = ("train_files", "held_out_files")


class DataSettings(BaseModel):
    """The recipe's `data:` block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Literal["python-library", "hub", "files"] = Field(description="where the text comes from")
    dataset: str | None = Field(None, description="hub: the dataset id")
    subset: str | None = Field(None, description="hub: the dataset configuration")
    revision: str | None = Field(None, description="hub: branch, tag or commit")
    split: str = Field("train", description="hub: the training split")
    held_out_split: str | None = Field(
        None, description="hub: the held-out split; default: a share of the documents, or the head of the stream"
    )
    text_column: str = Field("text", description="hub and files with columns: the text column")
    streaming: bool = Field(False, description="hub: stream the dataset during training")
    shuffle_buffer: int = Field(
        0, ge=0, description="hub, streaming: documents in the shuffle buffer; 0 keeps the order"
    )
    train_files: list[str] | None = Field(
        None,
        description="files: text, JSON, CSV or Parquet, compressed or not; globs, folders and addresses (hf://, s3://)",
    )
    held_out_files: list[str] | None = Field(
        None, description="files: held-out files; default: a share of the documents"
    )
    held_out_share: float = Field(
        0.05, gt=0, lt=1, description="share of documents held out, chosen by a hash of each"
    )
    sequence_length: int = Field(ge=2, description="tokens per sequence")
    shape: Literal["packed", "packed_documents", "documents"] = Field(
        "packed",
        description="packed: documents concatenated and cut; packed_documents: the same for training, without "
        "attention across documents, and positions that restart at each; documents: one per sequence, truncated or "
        "padded, as packed_documents evaluates",
    )
    tokenizer: str | None = Field(None, description="a Hub id or a folder; default: trained on the training split")
    vocabulary_size: int = Field(2048, ge=300, description="vocabulary size of a trained tokenizer")
    evaluation_sequences: int = Field(256, ge=1, description="held-out sequences stored with the run")
    evaluation_sequences_in_training: int | None = Field(
        None, ge=1, description="how many of them (the first ones) give the loss during training; default: all"
    )

    @model_validator(mode="after")
    def _keys_fit_the_source(self) -> Self:
        foreign = {"hub": FILES_KEYS, "files": HUB_KEYS, "python-library": (*HUB_KEYS, *FILES_KEYS, "text_column")}
        for key in foreign[self.source]:
            if key in self.model_fields_set:
                raise ValueError(f"data.{key} must be left out with data.source {self.source}")
        if self.source == "hub" and not self.dataset:
            raise ValueError("data.dataset must name a dataset with data.source hub, e.g. allenai/c4")
        if self.source == "files" and not self.train_files:
            raise ValueError("data.train_files must name at least one file with data.source files")
        if self.held_out_split is not None and not _disjoint(self.split, self.held_out_split):
            raise ValueError(
                f"data.held_out_split must not be what data.split trains on, {self.split!r}, got "
                f"{self.held_out_split!r}; leave it out to hold out a share of the documents"
            )
        if self.streaming and self.tokenizer is None:
            raise ValueError(
                "data.tokenizer must be given with data.streaming: a stream cannot be read twice to train one"
            )
        return self


def is_packed(data: DataSettings, *, held_out: bool = False) -> bool:
    """Whether a training or held-out sequence may hold several documents."""
    return data.shape == "packed" or (data.shape == "packed_documents" and not held_out)


def _disjoint(one: str, other: str) -> bool:
    """False if two splits of a dataset, such as `train+test[:10%]`, share one that either takes as a whole."""
    parts = [
        [(name.strip(), bool(bracket)) for name, bracket, _ in (part.partition("[") for part in split.split("+"))]
        for split in (one, other)
    ]
    return not any(
        (name == same or "all" in (name, same)) and not (sliced and also_sliced)
        for name, sliced in parts[0]
        for same, also_sliced in parts[1]
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated recipe.

    Attributes:
        name: names the run; the recipe's `name:`, else its folder and file, e.g. `nano-galore`.
        seed: seeds the initial weights, the data order, and everything random in the method.
        model: `architecture` and fields of its configuration, as written.
        training: fields of `TrainingArguments`, as written.
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
        """The resolved recipe as plain data, as `recipe.yaml` in the run directory stores it."""
        return {
            "name": self.name,
            "seed": self.seed,
            "method": {"name": self.method.name, **self.settings.model_dump(mode="json")},
            "model": self.model,
            "data": self.data.model_dump(mode="json", exclude_unset=True),
            "training": self.training,
        }

    def config(self, **defaults: Any) -> PreTrainedConfig:
        """The model's configuration; `defaults`, e.g. the vocabulary size, apply where the recipe sets nothing."""
        return build_config(self.model, **defaults)

    def arguments(self, output_dir: str | Path) -> TrainingArguments:
        """The run's `TrainingArguments`."""
        return build_arguments(self.training, seed=self.seed, output_dir=output_dir)


def load_recipe(
    path: str | Path, overrides: Iterable[str] = (), seed: int | None = None, *, folder: str | Path = ""
) -> Recipe:
    """Reads and validates a recipe; nothing is written.

    Args:
        path: a YAML file; `extends: other.yaml` in it lays it over another one, key by key.
        overrides: `key=value` with a dotted key and a YAML value, e.g. `method.rank=32`.
        seed: overrides the recipe's seed.
        folder: the folder that relative paths in `overrides` are relative to; default: the current one.

    Raises:
        UserError: one line that names the file, the key and what is allowed.
    """
    layers = read_layers(path, overrides, what="recipe", resolve_paths=_resolve_paths, folder=Path(folder))
    if seed is not None:
        layers.lay({"seed": seed}, "--seed")
    return _resolve(layers)


def _resolve_paths(layer: dict[str, Any], folder: Path) -> None:
    """Makes the paths of a layer's `data:` block absolute."""
    section = layer.get("data")
    if not isinstance(section, dict):
        return
    for key in FILES_KEYS:
        names = section.get(key)
        if isinstance(names, str):
            names = [names]
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            section[key] = [
                name if is_remote(name) else str((folder / Path(name).expanduser()).absolute()) for name in names
            ]
    tokenizer = section.get("tokenizer")
    # A Hub id and a relative path look alike; an existing folder decides.
    if isinstance(tokenizer, str) and (folder / Path(tokenizer).expanduser()).is_dir():
        section["tokenizer"] = str((folder / Path(tokenizer).expanduser()).absolute())


def _resolve(layers: Layers) -> Recipe:
    if "members" in layers.data and "method" not in layers.data:
        raise UserError(f"{layers.path}: must be a recipe, got a study; run it with hf-lowrank study")
    for key in layers.data:
        if key not in SECTIONS:
            raise UserError(f"{layers.origin(str(key))}: unknown key {str(key)!r}; {nearest(str(key), SECTIONS)}")
    sections = {key: _section(layers, key) for key in ("method", "model", "data", "training")}
    method, settings = _method(layers, sections["method"])
    recipe = Recipe(
        name=_name(layers),
        seed=_seed(layers),
        method=method,
        settings=settings,
        model=checked_model(sections["model"], layers),
        data=validated(DataSettings, sections["data"], layers, "data"),
        training=checked_arguments(
            sections["training"],
            layers,
            own_optimizer=method.build_optimizer is not None and method.kind not in ("baseline", "control"),
            own_scheduler=method.build_scheduler is not None,
        ),
        path=layers.path,
    )
    args = recipe.arguments(layers.path.parent)
    check_kernels(recipe.model.get(ATTENTION), recipe.data.shape, args, layers.origin, here=False)
    if recipe.data.streaming and "max_steps" not in recipe.training:
        raise UserError(f"{layers.path}: training.max_steps must be given with data.streaming")
    for key in ("save_strategy", "eval_strategy", "logging_strategy"):
        if recipe.data.streaming and recipe.training.get(key) == "epoch":
            where = layers.origin(f"training.{key}")
            raise UserError(f"{where}: training.{key} must be steps or no with data.streaming, got 'epoch'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are shown when the model is built for training
        _check_buildable(recipe, args, layers)
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
    where = layers.origin("method.name")
    if not isinstance(name, str):
        raise UserError(f"{where}: method.name must be one of {', '.join(METHODS)}, got {name!r}")
    try:
        method = METHODS[name]
    except UserError as error:
        raise UserError(f"{where}: method.name: {error}") from None
    return method, validated(method.settings, section, layers, "method", also_allowed=("name",))


def _check_buildable(recipe: Recipe, args: TrainingArguments, layers: Layers) -> None:
    """Builds model and optimizer on the meta device, so that what cannot be built fails before anything starts."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = recipe.method.build_model(recipe.config(), recipe.settings, recipe.seed)
    except Exception as error:  # transformers raises any type of error for inconsistent sizes
        raise UserError(f"{layers.path}: model cannot be built: {first_line(error)}") from None
    try:
        optimizer = recipe.method.optimizer(model, recipe.settings, args)
        if optimizer is not None and recipe.method.build_scheduler is not None and args.max_steps > 0:
            recipe.method.build_scheduler(optimizer, recipe.settings, args, args.max_steps)
        recipe.method.callbacks(recipe.settings, args)
    except (ValueError, TypeError, ArithmeticError) as error:
        message = first_line(error)
        field = message.split()[0]
        if field.startswith("training."):
            raise UserError(f"{layers.origin(field)}: {message}") from None
        if field in type(recipe.settings).model_fields:
            raise UserError(f"{layers.origin(f'method.{field}')}: method.{message}") from None
        raise UserError(f"{layers.path}: method: {message}") from None
