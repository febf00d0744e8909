"""Study files: which recipes, which seeds, what is measured; validated once, at the start, into typed objects."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.training.yaml_files import Layers, read_layers

STAGES = ("sweep", "train", "measure", "evaluate", "predict", "claims", "report")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
Steps = int | str | list[int] | None
Names = str | list[str] | None


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class MemberSettings(_Block):
    """One of `members:`: a recipe to train by, or checkpoints that others trained."""

    recipe: str | None = Field(default=None, description="a recipe file")
    learning_rate: float | None = Field(
        default=None, gt=0, description="of the recipe; a member with one is not swept"
    )
    overrides: list[str] = Field(default_factory=list, alias="set", description="overrides, as `train --set`")
    runs: list[str] | None = Field(
        default=None, min_length=1, description="folders of checkpoints, or Hub repositories"
    )
    revisions: str | None = Field(default=None, description="runs: which revisions are checkpoints, as 'step*'")
    method: str | None = Field(
        default=None, description="runs: what tables call the method; the member's name unless told"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> MemberSettings:
        if (self.recipe is None) == (self.runs is None):
            raise ValueError("must have either recipe (a file to train by) or runs (checkpoints that are there)")
        own = ("learning_rate", "overrides") if self.runs is not None else ("revisions", "method")
        for key in own:
            if key in self.model_fields_set:
                kind = "runs" if self.runs is not None else "recipe"
                raise ValueError(f"{'set' if key == 'overrides' else key} must be left out of a member with {kind}")
        return self


class SweepSettings(_Block):
    """`sweep:`: each member's learning rate is the one of the lowest final loss."""

    learning_rate: list[float] = Field(min_length=1, description="the rates to try")
    seed: int = Field(default=1000, ge=0, lt=2**32, description="of every run of the sweep")
    overrides: list[str] = Field(default_factory=list, alias="set", description="overrides of every run of the sweep")

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, rates: list[float]) -> list[float]:
        for rate in rates:
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"rates must be above 0, got {rate}")
        return rates


class MeasureSettings(_Block):
    """`measure:`: keywords of `hf_lowrank.measuring.measure`, and `pairs`."""

    metrics: Names = Field(default=None, description="ids, dimensions or groups")
    steps: Steps = Field(default=None, description="all, last, or numbers")
    preset: str = Field(default="fast", description="fast or paper")
    settings: dict[str, Any] | str | None = Field(
        default=None, description="over the preset's, as a mapping or a YAML file"
    )
    device: str | None = Field(default=None, description="where models are evaluated")
    evaluation_set: str | None = Field(
        default=None, description="sequences or a text for all runs; None: each run's own"
    )
    pairs: Steps = Field(default=None, description="steps of method_barrier between every two members of equal seed")


class EvaluateSettings(_Block):
    """`evaluate:`: keywords of `hf_lowrank.downstream.evaluate`."""

    tasks: Names = Field(default=None, description="lm-eval tasks or groups")
    steps: Steps = Field(default=None, description="all, last, or numbers")
    limit: int | None = Field(default=None, ge=1, description="items of each task")
    batch_size: int | None = Field(default=None, ge=1, description="requests at once")
    device: str | None = Field(default=None, description="where models are evaluated")


class PredictSettings(_Block):
    """`predict:`: keywords of `hf_lowrank.downstream.predict`."""

    tasks: Names = Field(default=None, description="tasks whose mean score is predicted")
    metrics: Names = Field(default=None, description="metrics that may help")
    permutations: int = Field(default=199, ge=1, description="of the permutation test")
    seed: int = Field(default=0, ge=0, description="of bootstrap and permutations")


class StudySettings(_Block):
    """The whole file."""

    name: str = Field(description="names the folder: runs/NAME unless --output")
    baseline: str = Field(description="the member that the others are compared with")
    members: dict[str, MemberSettings] = Field(min_length=1, description="name: recipe, or {recipe: …} or {runs: …}")
    seeds: list[int] = Field(default=[0], min_length=1, description="one run of each recipe for each")
    overrides: list[str] = Field(default_factory=list, alias="set", description="overrides of every recipe")
    sweep: SweepSettings | None = None
    measure: MeasureSettings = MeasureSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    predict: PredictSettings = PredictSettings()
    evaluation_text: str | None = Field(
        None, description="a text for the losses, where no member is trained here and none brings sequences"
    )
    stages: list[Literal[STAGES]] | None = Field(default=None, description="what runs unless --stages")  # type: ignore[valid-type]
    jobs: int | None = Field(default=None, ge=1, description="units side by side; None: one an accelerator, else one")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of each; None: the cores, shared out")

    @field_validator("members", mode="before")
    @classmethod
    def _short_form(cls, members: Any) -> Any:
        if not isinstance(members, dict):
            return members
        return {name: {"recipe": member} if isinstance(member, str) else member for name, member in members.items()}

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"seeds must be integers from 0 to 2**32 - 1, got {seed}")
            if seeds.count(seed) > 1:
                raise ValueError(f"seeds must differ, {seed} is there twice: two runs would have one name")
        return seeds


@dataclass(frozen=True)
class StudyFile:
    """A validated study file.

    Attributes:
        settings: what it says, paths absolute.
        layers: which file said what, for messages.
    """

    settings: StudySettings
    layers: Layers

    @property
    def path(self) -> Path:
        return self.layers.path

    def folder(self, key: str) -> Path:
        """The folder of the file that said `key`: where its relative paths begin."""
        return Path(self.layers.origin(key)).parent

    def fault(self, key: str, message: str) -> UserError:
        """An error about `key`."""
        return UserError(f"{self.layers.origin(key)}: {key} {message}" if key else f"{self.path}: {message}")


def load_study(path: str | os.PathLike[str]) -> StudyFile:
    """Reads and validates a study file by itself; what it names is looked at by `checks.prepare`.

    `extends: other.yaml` lays it over another study, key by key; paths count from the file that names them.

    Raises:
        UserError: one line that names the file, the key and what is allowed.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file}: there is no such study file")
    layers = read_layers(file)
    try:
        settings = StudySettings.model_validate(layers.data)
    except ValidationError as error:
        raise _translated(error, layers) from None
    study = StudyFile(settings, layers)
    if not NAME.fullmatch(settings.name):
        raise study.fault("name", f"must be a file name of letters, digits, - and _, got {settings.name!r}")
    for name in settings.members:
        if not NAME.fullmatch(name):
            raise study.fault(f"members.{name}", "must be named by letters, digits, -, _ and ., as a folder is")
    if settings.baseline not in settings.members:
        known = nearest(settings.baseline, settings.members)
        raise study.fault("baseline", f"must be one of the members, got {settings.baseline!r}; {known}")
    return StudyFile(_with_absolute_paths(study), layers)


def _with_absolute_paths(study: StudyFile) -> StudySettings:
    settings = study.settings

    def absolute(key: str, path: str) -> str:
        return str((study.folder(key) / Path(path).expanduser()).absolute())

    members = {}
    for name, member in settings.members.items():
        key = f"members.{name}"
        changes: dict[str, Any] = {}
        if member.recipe is not None:
            changes["recipe"] = absolute(f"{key}.recipe", member.recipe)
        if member.runs is not None:
            # A repository and a relative path look alike; what is on disk decides.
            local = {run: absolute(f"{key}.runs", run) for run in member.runs}
            changes["runs"] = [path if Path(path).is_dir() else run for run, path in local.items()]
        members[name] = member.model_copy(update=changes)
    update: dict[str, Any] = {"members": members}
    if isinstance(settings.measure.settings, str):
        file = absolute("measure.settings", settings.measure.settings)
        update["measure"] = settings.measure.model_copy(update={"settings": file})
    if settings.measure.evaluation_set is not None:
        given = absolute("measure.evaluation_set", settings.measure.evaluation_set)
        update["measure"] = update.get("measure", settings.measure).model_copy(update={"evaluation_set": given})
    if settings.evaluation_text is not None:
        update["evaluation_text"] = absolute("evaluation_text", settings.evaluation_text)
    return settings.model_copy(update=update)


def _translated(error: ValidationError, layers: Layers) -> UserError:
    """The first of pydantic's complaints as one line of ours."""
    first = error.errors(include_url=False)[0]
    path: list[str] = []
    model: type[BaseModel] | None = StudySettings
    # A union's branches follow the field's own name; the fields are what the user wrote.
    for part in first["loc"]:
        names = _names(model)
        inner = _inner(model, str(part))
        if model is None and not (path and path[0] == "members" and len(path) == 1):
            break
        path.append(str(part))
        if path[:-1] == ["members"]:
            model = MemberSettings
            continue
        if part not in names:
            break
        model = inner
    key = ".".join(path)
    where = layers.origin(key) if key else str(layers.path)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return UserError(f"{where}: unknown key {key!r}; {nearest(path[-1], _allowed(path[:-1]))}")
    if first["type"] == "missing":
        return UserError(f"{layers.path}: {key} is missing")
    if first["type"] == "value_error":
        between = " " if message.startswith("must") else ": "
        return UserError(f"{where}: {key}{between}{message}")
    return UserError(f"{where}: {key}: {message[:1].lower()}{message[1:]}, got {first['input']!r}")


def _inner(model: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """The block that a key of the study opens."""
    blocks: dict[str, type[BaseModel]] = {
        "sweep": SweepSettings,
        "measure": MeasureSettings,
        "evaluate": EvaluateSettings,
        "predict": PredictSettings,
    }
    return blocks.get(name) if model is StudySettings else None


def _names(model: type[BaseModel] | None) -> set[str]:
    """The keys of a block, as they are written."""
    return set() if model is None else {field.alias or name for name, field in model.model_fields.items()}


def _allowed(path: list[str]) -> set[str]:
    """The keys that may stand below `path`."""
    if path[:1] == ["members"]:
        return _names(MemberSettings)
    return _names(_inner(StudySettings, path[0]) if path else StudySettings)
