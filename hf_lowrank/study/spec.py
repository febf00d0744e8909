"""Study files: recipes, seeds, what is measured; one YAML file, validated once into typed objects."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hf_lowrank.claims.results import LEARNING_RATE
from hf_lowrank.errors import UserError, nearest
from hf_lowrank.storage.layers import Layers, read_layers, validated
from hf_lowrank.study.ranges import Values, check_ranges, grid, sample

STAGES = ("sweep", "train", "measure", "evaluate", "predict", "claims", "report")
"""The stages of a study, in order."""
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
Steps = int | str | list[int] | None
Names = str | list[str] | None


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class MemberSettings(_Block):
    """One of `members:`: a recipe to train by, or checkpoints that were trained elsewhere."""

    title: str | None = Field(
        None,
        min_length=1,
        description="its name in tables and pictures; default: the method's title or the member's name",
    )
    recipe: str | None = Field(None, description="a recipe file")
    learning_rate: float | None = Field(
        None, gt=0, description="overrides the recipe's; excludes the member from the sweep"
    )
    overrides: list[str] = Field(default_factory=list, alias="set", description="overrides, as in `train --set`")
    sweep: dict[str, Any] = Field(
        default_factory=dict,
        description="its own values and ranges in the sweep, by recipe key; null removes a key, "
        "or all of an extended study's",
    )
    runs: list[str] | None = Field(None, min_length=1, description="folders of checkpoints, or Hub repositories")
    processes: int = Field(
        1,
        ge=1,
        description="processes that train each of its runs together, as with `accelerate launch`; "
        "a step has the recipe's sequences from each of them",
    )
    revisions: str | None = Field(
        None, description="runs: pattern of the revisions that are checkpoints, e.g. 'step*'"
    )
    method: str | None = Field(None, description="runs: name of the method in tables; default: the member's name")

    @property
    def values(self) -> Values:
        """Its own value of each key that a sweep would choose."""
        return {} if self.learning_rate is None else {LEARNING_RATE: self.learning_rate}

    @property
    def is_swept(self) -> bool:
        return self.recipe is not None and not self.values

    @field_validator("sweep", mode="before")
    @classmethod
    def _none(cls, ranges: Any) -> Any:
        return {} if ranges is None else ranges

    @field_validator("sweep")
    @classmethod
    def _ranges(cls, ranges: dict[str, Any]) -> dict[str, Any]:
        check_ranges(ranges)
        return ranges

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.recipe is None) == (self.runs is None):
            raise ValueError("must have either recipe (a file to train by) or runs (existing checkpoints)")
        trained = ("title", "learning_rate", "overrides", "sweep", "processes")
        kind, others = ("recipe", ("revisions", "method")) if self.recipe else ("runs", trained)
        for key in others:
            if key in self.model_fields_set:
                raise ValueError(f"{'set' if key == 'overrides' else key} must be left out of a member with {kind}")
        return self


class SweepSettings(_Block):
    """`sweep:`: each member gets the values with the lowest final loss.

    Every member has the same number of trials: all combinations of its values, or a random sample of `trials`. A
    winner at an edge is followed by one trial one step beyond it, for each of its edges.
    """

    learning_rate: list[float] | None = Field(None, min_length=1, description="learning rates to try; short for over")
    over: dict[str, Any] = Field(
        default_factory=dict,
        description="values to try by recipe key: a list, {uniform: [low, high]} or {log_uniform: [low, high]}",
    )
    trials: int | None = Field(None, ge=1, description="trials per member, drawn at random; default: the whole grid")
    steps: int | None = Field(None, ge=1, description="length of every trial; default: the recipe's")
    seed: int = Field(1000, ge=0, lt=2**32, description="seed of every trial, and of the random sample")
    overrides: list[str] = Field(default_factory=list, alias="set", description="overrides of every trial")

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, rates: list[float] | None) -> list[float] | None:
        for rate in rates or []:
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"must be above 0, got {rate}")
        return rates

    @field_validator("over")
    @classmethod
    def _ranges(cls, over: dict[str, Any]) -> dict[str, Any]:
        check_ranges(over)
        return over

    @model_validator(mode="after")
    def _has_values(self) -> Self:
        if self.learning_rate is not None and LEARNING_RATE in self.over:
            raise ValueError(f"learning_rate must be left out, over has {LEARNING_RATE}")
        return self

    def ranges(self, member: MemberSettings) -> dict[str, Any]:
        """What is tried for a member, by recipe key."""
        shared = {} if self.learning_rate is None else {LEARNING_RATE: self.learning_rate}
        merged = {**shared, **self.over, **member.sweep}
        return {key: given for key, given in merged.items() if given is not None}

    def values_of(self, name: str, member: MemberSettings) -> list[Values]:
        """The recipe keys and values of each trial of a member; they depend on no other member.

        Raises:
            ValueError: there are not as many, to follow the member's name.
        """
        ranges = self.ranges(member)
        if not ranges:
            raise ValueError("has nothing to try")
        if self.trials is not None:
            try:
                return [*sample(ranges, self.trials, f"{self.seed} {name}")]
            except ValueError as error:
                raise ValueError(f"has {error}, fewer than sweep.trials ({self.trials})") from None
        for key, given in ranges.items():
            if not isinstance(given, list):
                raise ValueError(f"has a range, {key}: give sweep.trials, the number of trials to draw, or a list")
        return [*grid(ranges)]


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
    if "method" in layers.data and "members" not in layers.data:
        raise UserError(f"{layers.path}: must be a study, got a recipe; run it with hf-lowrank train")
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
    titles = {name: member.title or name for name, member in settings.members.items()}
    for name, title in titles.items():
        others = [other for other in titles if other != name and title in (other, titles[other])]
        if others and settings.members[name].title:
            raise study.fault(f"members.{name}.title", f"must differ from that of {others[0]}, got {title!r}")
    _check_sweep(study)
    return study


def _check_sweep(study: StudyFile) -> None:
    """Every member that is swept must have as many trials as the baseline, or as the first one."""
    members, sweep = study.settings.members, study.settings.sweep
    counts: dict[str, int] = {}
    for name, member in members.items():
        key = f"members.{name}.sweep"
        if member.sweep and (sweep is None or not member.is_swept):
            why = "there is no sweep block" if sweep is None else "learning_rate excludes it from the sweep"
            raise study.fault(key, f"must be left out; {why}")
        if sweep is None or not member.is_swept:
            continue
        try:
            counts[name] = len(sweep.values_of(name, member))
        except ValueError as error:
            raise study.fault(key if member.sweep else "sweep", f"of {name} {error}") from None
    reference = study.settings.baseline if study.settings.baseline in counts else next(iter(counts), "")
    for name, count in counts.items():
        if count != counts[reference]:
            raise study.fault(
                f"members.{name}.sweep" if members[name].sweep else "sweep",
                f"must give every member the same number of trials, {name} has {count} and {reference} has "
                f"{counts[reference]}; change its values, or set sweep.trials",
            )


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
