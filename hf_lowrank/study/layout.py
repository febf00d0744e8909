"""A study's runs and where everything of it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.study.spec import MemberSettings, StudyFile, StudySettings
from hf_lowrank.training.recipe import Recipe, load_recipe
from hf_lowrank.training.start import is_finished


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the study.

    Attributes:
        member: whose it is.
        place: its number among the member's runs; runs of equal place are compared with each other.
        folder: its run directory. A stranger's holds links to its checkpoints, and what was measured on them.
        seed: of the recipe; None for a stranger.
        source: a stranger's folder or repository; None for what is trained here.
    """

    member: str
    place: int
    folder: Path
    seed: int | None = None
    source: str | None = None

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A run of the sweep."""

    member: str
    learning_rate: float
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study whose every part has been looked at.

    Attributes:
        file: the study file.
        directory: where all of it goes.
        runs: by member, then seed.
        attempts: runs of the sweep, by member, then rate.
        rates: the learning rates that the sweep chose, by member; empty before.
        strangers: the trajectories of `runs` that are not trained here, by the run's name.
        left_out: stages that cannot run, with the reason.
    """

    file: StudyFile
    directory: Path
    runs: Sequence[Run]
    attempts: Sequence[Attempt]
    rates: dict[str, float] = field(default_factory=dict)
    strangers: dict[str, Trajectory] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> StudySettings:
        return self.file.settings

    def of(self, member: str) -> list[Run]:
        """The runs of a member."""
        return [run for run in self.runs if run.member == member]

    def baseline_of(self, run: Run) -> Run:
        """The baseline's run that `run` is compared with: of its place, or the only one."""
        runs = self.of(self.settings.baseline)
        return runs[0] if len(runs) == 1 else runs[run.place]

    def recipe(self, run: Run | Attempt) -> Recipe:
        """The resolved recipe of a run that is trained here."""
        path, overrides, seed = self.recipe_arguments(run)
        return member_recipe(self.file, run.member, path, overrides, seed)

    def recipe_arguments(self, run: Run | Attempt) -> tuple[str, list[str], int]:
        """(recipe file, overrides, seed) of a run that is trained here."""
        settings = self.settings
        member = settings.members[run.member]
        overrides = [*settings.overrides, *member.overrides]
        if isinstance(run, Attempt):
            sweep: Any = settings.sweep
            overrides += [*sweep.overrides, rate_override(run.learning_rate)]
            return member.recipe or "", overrides, sweep.seed
        rate = member.learning_rate or self.rates.get(run.member)
        overrides += [rate_override(rate)] if rate is not None else []
        return member.recipe or "", overrides, run.seed or 0

    def is_trained(self, run: Run) -> bool:
        """Whether the run's checkpoints are there, all of them."""
        return run.source is not None or is_finished(run.folder)

    def method(self, run: Run) -> str:
        """What tables call a stranger's method."""
        return self.settings.members[run.member].method or run.member

    @property
    def first_trained(self) -> Run | None:
        """A run that is trained here: the baseline's where there is one."""
        ours = [run for run in self.runs if run.source is None]
        return next((run for run in ours if run.member == self.settings.baseline), ours[0] if ours else None)

    def with_rates(self, rates: dict[str, float]) -> Study:
        """The study after its sweep."""
        return replace(self, rates=rates)


def rate_override(rate: float) -> str:
    return f"training.learning_rate={rate!r}"


def member_recipe(file: StudyFile, member: str, path: str, overrides: list[str], seed: int) -> Recipe:
    """A member's recipe with overrides.

    Raises:
        UserError: names study file, member, and the recipe file or the override that is wrong.
    """
    try:
        return load_recipe(path, overrides, seed, folder=file.path.parent)
    except UserError as error:
        raise file.fault(f"members.{member}", str(error).replace("--set ", "set: ")) from None


def runs_of(file: StudyFile, directory: Path) -> list[Run]:
    """The runs that the file asks for."""
    found: list[Run] = []
    for name, member in file.settings.members.items():
        folder = directory / "runs"
        if member.runs is not None:
            found += [
                Run(member=name, place=place, folder=folder / f"{name}-{place}", source=source)
                for place, source in enumerate(member.runs)
            ]
        else:
            found += [
                Run(member=name, place=place, folder=folder / f"{name}-seed{seed}", seed=seed)
                for place, seed in enumerate(file.settings.seeds)
            ]
    return found


def attempts_of(file: StudyFile, directory: Path) -> list[Attempt]:
    """The runs of the sweep that the file asks for."""
    if file.settings.sweep is None:
        return []
    return [
        Attempt(member=name, learning_rate=rate, folder=directory / "sweep" / f"{name}-lr{rate:g}")
        for name, member in file.settings.members.items()
        if is_swept(member)
        for rate in file.settings.sweep.learning_rate
    ]


def is_swept(member: MemberSettings) -> bool:
    return member.recipe is not None and member.learning_rate is None
