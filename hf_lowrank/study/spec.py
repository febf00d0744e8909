"""Study files: recipes, seeds, what is measured; one YAML file, validated once into typed objects."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.storage.layers import Layers, read_layers, validated

STAGES = ("sweep", "train", "measure", "evaluate", "predict", "claims", "report")
LEARNING_RATE = "training.learning_rate"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
Steps = int | str | list[int] | None
Names = str | list[str] | None


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class MemberSettings(_Block):
    """One of `members:`: a recipe to train by, or checkpoints that were trained elsewhere."""

    recipe: str | None = Field(None, description="a recipe file")
    learning_rate: float | None = Field(
        None, gt=0, description="overrides the recipe's; excludes the member from the sweep"
    )
    overrides: list[str] = Field(default_factory=list, alias="set", description="overrides, as in `train --set`")
    runs: list[str] | None = Field(None, min_length=1, description="folders of checkpoints, or Hub repositories")
    revisions: str | None = Field(
        None, description="runs: pattern of the revisions that are checkpoints, e.g. 'step*'"
    )
    method: str | None = Field(None, description="runs: name of the method in tables; default: the member's name")

    @property
    def values(self) -> dict[str, float]:
        """Its own value of each key that a sweep would choose."""
        return {} if self.learning_rate is None else {LEARNING_RATE: self.learning_rate}

    @property
    def is_swept(self) -> bool:
        return self.recipe is not None and not self.values

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.recipe is None) == (self.runs is None):
            raise ValueError("must have either recipe (a file to train by) or runs (existing checkpoints)")
        kind, others = ("recipe", ("revisions", "method")) if self.recipe else ("runs", ("learning_rate", "overrides"))
        for key in others:
            if key in self.model_fields_set:
                raise ValueError(f"{'set' if key == 'overrides' else key} must be left out of a member with {kind}")
        return self


class SweepSettings(_Block):
    """`sweep:`: each member gets the learning rate with the lowest final loss."""

    learning_rate: list[float] = Field(min_length=1, description="the learning rates to try")
    seed: int = Field(1000, ge=0, lt=2**32, description="seed of every trial")
    overrides: list[str] = Field(default_factory=list, alias="set", description="overrides of every trial")

    def grid(self) -> list[dict[str, float]]:
        """The recipe keys and values of each trial."""
        return [{LEARNING_RATE: rate} for rate in self.learning_rate]

    def trial_name(self, values: Mapping[str, float]) -> str:
        """What the folder of a trial is called, after the member's name."""
        return f"lr{values[LEARNING_RATE]:g}"

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, rates: list[float]) -> list[float]:
        for rate in rates:
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"must be above 0, got {rate}")
        return rates


class MeasureSettings(_Block):
    """`measure:`: arguments of `hf_lowrank.measuring.measure`, and `pairs`."""

    metrics: Names = Field(None, description="metric ids, dimensions or groups")
    steps: Steps = Field(None, description="all, last, or step numbers")
    preset: str = Field("fast", description="fast or paper")
    settings: dict[str, Any] | str | None = Field(
        None, description="overrides of the preset, as a mapping or a YAML file"
    )
    device: str | None = Field(None, description="where models are evaluated")
    evaluation_set: str | None = Field(None, description="sequences or a text for all runs; default: each run's own")
    pairs: Steps = Field(
        None, description="steps at which method_barrier is measured between every two members of equal seed"
    )


class EvaluateSettings(_Block):
    """`evaluate:`: arguments of `hf_lowrank.downstream.evaluate`."""

    tasks: Names = Field(None, description="lm-eval tasks or groups")
    steps: Steps = Field(None, description="all, last, or step numbers")
    limit: int | None = Field(None, ge=1, description="at most this many items per task")
    batch_size: int | None = Field(None, ge=1, description="requests per batch")
    device: str | None = Field(None, description="where models are evaluated")


class PredictSettings(_Block):
    """`predict:`: arguments of `hf_lowrank.downstream.predict`."""

    tasks: Names = Field(None, description="tasks whose mean score is predicted")
    metrics: Names = Field(None, description="candidate metrics")
    permutations: int = Field(199, ge=1, description="permutations of the test")
    seed: int = Field(0, ge=0, description="seed of the permutations")


class StudySettings(_Block):
    """A whole study file."""

    name: str = Field(description="names the directory: runs/NAME unless --output is given")
    baseline: str = Field(description="the member that all others are compared with")
    members: dict[str, MemberSettings] = Field(
        min_length=1, description="name: recipe, or name: {recipe: …} or {runs: …}"
    )
    seeds: list[int] = Field([0], min_length=1, description="each recipe is trained once per seed")
    overrides: list[str] = Field(default_factory=list, alias="set", description="overrides of every recipe")
    sweep: SweepSettings | None = None
    measure: MeasureSettings = MeasureSettings.model_validate({})
    evaluate: EvaluateSettings = EvaluateSettings.model_validate({})
    predict: PredictSettings = PredictSettings.model_validate({})
    evaluation_text: str | None = Field(
        None,
        description="text to measure losses on, if no member is trained here and none has held-out sequences",
    )
    stages: list[Literal[STAGES]] | None = Field(None, description="stages to run")  # type: ignore[valid-type]
    jobs: int | None = Field(None, ge=1, description="units in parallel; default: one per accelerator, else one")
    threads: int | None = Field(None, ge=1, description="CPU threads per unit; default: the cores divided by jobs")

    @field_validator("members", mode="before")
    @classmethod
    def _short_form(cls, members: Any) -> Any:
        if not isinstance(members, dict):
            return members
        return {name: {"recipe": member} if isinstance(member, str) else member for name, member in members.items()}

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"must be integers from 0 to 2**32 - 1, got {seed}")
            if seeds.count(seed) > 1:
                raise ValueError(f"duplicate seed {seed}")
        return seeds


@dataclass(frozen=True)
class StudyFile:
    """A validated study file: its contents, with absolute paths, and which file each key comes from."""

    settings: StudySettings
    layers: Layers

    @property
    def path(self) -> Path:
        return self.layers.path

    @contextmanager
    def blaming(self, key: str, what: str = "is wrong") -> Iterator[None]:
        """Raises the body's `UserError` as one about `key`."""
        try:
            yield
        except UserError as error:
            raise self.fault(key, f"{what}: {error}") from None

    def fault(self, key: str, message: str) -> UserError:
        """An error about `key`."""
        return UserError(f"{self.layers.origin(key)}: {key} {message}" if key else f"{self.path}: {message}")


def load_study(path: str | os.PathLike[str]) -> StudyFile:
    """Reads and validates a study file by itself; `checks.prepare` checks what it refers to.

    `extends: other.yaml` lays it over another study, key by key; relative paths start at the file that contains them.

    Raises:
        UserError: one line that names the file, the key and what is allowed.
    """
    layers = read_layers(Path(path), what="study", resolve_paths=_resolve_paths)
    settings = validated(StudySettings, layers.data, layers)
    study = StudyFile(settings, layers)
    if not NAME.fullmatch(settings.name):
        raise study.fault("name", f"must be a file name of letters, digits, - and _, got {settings.name!r}")
    for name in settings.members:
        if not NAME.fullmatch(name):
            raise study.fault(f"members.{name}", "must be a folder name of letters, digits, -, _ and .")
    if settings.baseline not in settings.members:
        known = nearest(settings.baseline, settings.members)
        raise study.fault("baseline", f"must be one of the members, got {settings.baseline!r}; {known}")
    return study


def _resolve_paths(layer: dict[str, Any], folder: Path) -> None:
    """Makes a layer's paths absolute; values of the wrong type are left to validation."""

    def absolute(path: Any) -> Any:
        return str((folder / Path(path).expanduser()).absolute()) if isinstance(path, str) else path

    members = layer["members"] if isinstance(layer.get("members"), dict) else {}
    for name, member in members.items():
        if isinstance(member, str):
            members[name] = absolute(member)
        elif isinstance(member, dict):
            if "recipe" in member:
                member["recipe"] = absolute(member["recipe"])
            if isinstance(member.get("runs"), list):
                # A repository and a relative path look alike; an existing folder decides.
                member["runs"] = [
                    absolute(run) if isinstance(run, str) and os.path.isdir(absolute(run)) else run
                    for run in member["runs"]
                ]
    measure = layer.get("measure")
    if isinstance(measure, dict):
        measure.update({key: absolute(measure[key]) for key in ("settings", "evaluation_set") if key in measure})
    if "evaluation_text" in layer:
        layer["evaluation_text"] = absolute(layer["evaluation_text"])
