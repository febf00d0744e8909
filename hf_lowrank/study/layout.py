"""A study's runs and trials, and where each of them is on disk."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_lowrank.claims.results import LEARNING_RATE, value_text
from hf_lowrank.errors import UserError
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.study.ranges import Values
from hf_lowrank.study.spec import StudyFile, StudySettings
from hf_lowrank.training.recipe import Recipe, load_recipe
from hf_lowrank.training.start import is_finished


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The run directory of a member's run or trial."""

    member: str
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True, kw_only=True)
class Run(Folder):
    """One run of a member.

    Attributes:
        index: its number among the member's runs; runs of equal index are compared with each other.
        seed: of the recipe, or of the runs that an external one is compared with.
    """

    index: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ExternalRun(Run):
    """Checkpoints that were trained elsewhere, in the folder or Hub repository `source`.

    The run directory holds links to them and their measurements.
    """

    source: str


@dataclass(frozen=True, kw_only=True)
class Trial(Folder):
    """A run of the sweep, which tries `values`, given by dotted recipe keys.

    Attributes:
        extension: whether it is one step beyond an edge of the member's sweep.
    """

    values: Values
    extension: bool = False


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study that has been checked.

    Attributes:
        directory: where everything is written.
        runs: by member, then seed.
        trials: by member, then value; without those one step beyond an edge.
        winners: the values that the sweep chose, by member; empty before the sweep.
        trajectories: the checkpoints of external runs, by run name.
        skipped: stages that cannot run, with the reason.
    """

    file: StudyFile
    directory: Path
    runs: Sequence[Run]
    trials: Sequence[Trial]
    winners: Mapping[str, Values] = field(default_factory=dict)
    trajectories: Mapping[str, Trajectory] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> StudySettings:
        return self.file.settings

    @property
    def waiting(self) -> list[str]:
        """Members whose sweep has not chosen yet."""
        return sorted({trial.member for trial in self.trials} - set(self.winners))

    @property
    def own_runs(self) -> list[Run]:
        """The runs that are trained here."""
        return [run for run in self.runs if not isinstance(run, ExternalRun)]

    @property
    def external_runs(self) -> list[ExternalRun]:
        return [run for run in self.runs if isinstance(run, ExternalRun)]

    def runs_of(self, member: str) -> list[Run]:
        return [run for run in self.runs if run.member == member]

    def baseline_of(self, run: Run) -> Run:
        """The baseline run that `run` is compared with: the one of equal index, or the only one."""
        runs = self.runs_of(self.settings.baseline)
        return runs[0] if len(runs) == 1 else runs[run.index]

    def methods_of(self, runs: Iterable[Run]) -> list[str]:
        """Each run's method, as its measurements name it."""
        runs = list(runs)
        methods = {}
        for run in {run.member: run for run in runs}.values():
            given = self.settings.members[run.member].method or run.member
            methods[run.member] = given if isinstance(run, ExternalRun) else self.recipe(run).method.name
        return [methods[run.member] for run in runs]

    def trained_runs(self) -> list[Run]:
        """The runs whose checkpoints are all there."""
        return [run for run in self.runs if isinstance(run, ExternalRun) or is_finished(run.folder)]

    @property
    def reference_run(self) -> Run | None:
        """A run that is trained here, of the baseline if possible; external runs take its tokenizer and sequences."""
        ours = sorted(self.own_runs, key=lambda run: run.member != self.settings.baseline)
        return ours[0] if ours else None

    def recipe(self, run: Run | Trial) -> Recipe:
        """The resolved recipe of a run or trial that is trained here.

        Raises:
            UserError: names study file, member, and the recipe file or the override that is wrong.
        """
        path, overrides, seed = self.recipe_arguments(run)
        try:
            return load_recipe(path, overrides, seed, folder=self.file.path.parent)
        except UserError as error:
            swept = [f"--set {override}" for override in as_overrides(run.values)] if isinstance(run, Trial) else []
            source = "sweep: " if any(override in str(error) for override in swept) else "set: "
            raise self.file.fault(f"members.{run.member}", str(error).replace("--set ", source)) from None

    def recipe_arguments(self, run: Run | Trial) -> tuple[str, list[str], int]:
        """(recipe file, overrides, seed) of a run or trial that is trained here."""
        member, sweep = self.settings.members[run.member], self.settings.sweep
        overrides, recipe = [*self.settings.overrides, *member.overrides], member.recipe or ""
        if isinstance(run, Trial):
            assert sweep is not None
            length = {} if sweep.steps is None else dict.fromkeys(LENGTH, sweep.steps)
            return recipe, [*overrides, *as_overrides(length), *sweep.overrides, *as_overrides(run.values)], sweep.seed
        values = member.values or self.winners.get(run.member, {})
        return recipe, [*overrides, *as_overrides(values)], run.seed


# A trial is evaluated and saved at its end only.
LENGTH = ("training.max_steps", "training.save_steps", "training.eval_steps")


def as_overrides(values: Values) -> list[str]:
    return [f"{key}={value!r}" for key, value in values.items()]


def planned_runs(file: StudyFile, directory: Path) -> list[Run]:
    """The runs that a study file asks for."""
    seeds, folder = file.settings.seeds, directory / "runs"
    found: list[Run] = []
    for name, member in file.settings.members.items():
        for index, seed in enumerate(seeds if member.runs is None else ()):
            found.append(Run(member=name, index=index, seed=seed, folder=folder / f"{name}-seed{seed}"))
        for index, source in enumerate(member.runs or ()):
            seed = seeds[index] if index < len(seeds) else index
            run = folder / f"{name}-{index}"
            found.append(ExternalRun(member=name, index=index, seed=seed, folder=run, source=source))
    return found


def planned_trials(file: StudyFile, directory: Path) -> list[Trial]:
    """The trials of the sweep that a study file asks for."""
    sweep = file.settings.sweep
    if sweep is None:
        return []
    return [
        Trial(member=name, values=values, folder=trial_folder(directory, name, values))
        for name, member in file.settings.members.items()
        if member.is_swept
        for values in sweep.values_of(name, member)
    ]


def trial_folder(directory: Path, member: str, values: Values) -> Path:
    """Named after the values, e.g. `galore-lr0.003-scale0.25`."""
    names = {key: "lr" if key == LEARNING_RATE else key.rpartition(".")[2] for key in values}
    parts = [re.sub(r"[^\w.+-]", "_", f"{names[key]}{value_text(value)}") for key, value in values.items()]
    return directory / "sweep" / "-".join([member, *parts])
