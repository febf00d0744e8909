"""Checks of a study before anything runs: each problem is one line."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_lowrank.claims.results import value_words
from hf_lowrank.downstream.prediction import too_few
from hf_lowrank.errors import UserError, nearest
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.layout import EVALUATION_SET
from hf_lowrank.runs.measure_settings import resolve_settings
from hf_lowrank.runs.selection import choose_steps
from hf_lowrank.study.layout import Run, Study, Trial, planned_runs, planned_trials
from hf_lowrank.study.members import check_members
from hf_lowrank.study.spec import STAGES, StudyFile
from hf_lowrank.study.stages import STAGE_TABLE, read_winners
from hf_lowrank.training.recipe import Recipe
from hf_lowrank.training.start import check_belongs


def chosen_stages(file: StudyFile, wanted: str | Sequence[str] | None) -> tuple[list[str], bool]:
    """The stages to run, in order, and whether they were asked for by name.

    Raises:
        UserError: an unknown stage, or a sweep that the study does not have.
    """
    if wanted is None and file.settings.stages is not None:
        wanted = file.settings.stages
    if wanted is None:
        return [stage for stage in STAGES if stage != "sweep" or file.settings.sweep is not None], False
    parts = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    names = [part.strip() for part in parts if part.strip()]
    if not names:
        raise UserError(f"--stages must name some of {', '.join(STAGES)}, got {wanted!r}")
    for name in names:
        if name not in STAGES:
            raise UserError(f"--stages: unknown stage {name!r}; {nearest(name, STAGES)}")
    if "sweep" in names and file.settings.sweep is None:
        raise UserError(f"{file.path}: stage sweep needs a sweep block; there is none")
    return [stage for stage in STAGES if stage in names], True


def prepare(file: StudyFile, directory: Path, stages: Sequence[str], *, named: bool = False) -> Study:
    """The study whose `stages` will run, with everything that its file refers to checked; nothing is written.

    Stages that were asked for by name (`named`) must be able to run, others are skipped if they cannot.

    Raises:
        UserError: the first problem.
    """
    runs, trials = planned_runs(file, directory), planned_trials(file, directory)
    _check_names(file, [*runs, *trials])
    winners = read_winners(file, directory)
    study = Study(file=file, directory=directory, runs=runs, trials=trials, winners=winners)
    recipes = _recipes(study)
    study = replace(study, trajectories=check_members(file, runs, recipes))
    _check_baseline_runs(study)
    if "measure" in stages:
        _check_measure(study)
    if "predict" in stages:
        with file.blaming("predict.metrics"):
            METRICS.select(study.settings.predict.metrics)
    offline = _check_tasks(study) if "evaluate" in stages else set()
    _check_steps(study, recipes, stages)
    _check_folders(study, stages)
    _check_inputs(study, stages)
    if "measure" in stages:
        _check_sequences(study, recipes)
    reason = _lacking_text(study, recipes, offline)
    if reason is not None:
        if named or study.settings.evaluate.tasks is not None:
            raise file.fault("evaluate.tasks", f"{reason}; name other tasks, e.g. lowrank_paper")
        study.skipped["evaluate"] = f"{reason}; evaluate.tasks can name others"
    if (reason := too_few(study.methods_of(runs))) is not None:
        study.skipped["predict"] = reason
    return study


def _check_names(file: StudyFile, runs: Sequence[Run | Trial]) -> None:
    seen: dict[str, Run | Trial] = {}
    for run in runs:
        # Some file systems do not distinguish upper and lower case.
        other = seen.setdefault(str(run.folder).lower(), run)
        if other is run:
            continue
        if isinstance(run, Trial) and run.member == other.member:
            raise file.fault("sweep", f"of {run.member} must not repeat a trial, got {value_words(run.values)} twice")
        raise file.fault(
            f"members.{run.member}", f"and members.{other.member} would both have a run {run.name}; rename one of them"
        )


def _recipes(study: Study) -> dict[str, Recipe]:
    """The recipe of each member that is trained here; before the sweep with the values of its first trial."""
    for trial in study.trials:
        study.recipe(trial)
    first = {trial.member: trial for trial in reversed(study.trials)}
    assumed = replace(study, winners={name: trial.values for name, trial in first.items()} | dict(study.winners))
    recipes = {}
    for run in [run for run in study.own_runs if run.index == 0]:
        recipes[run.member] = assumed.recipe(run)
    return recipes


def _check_baseline_runs(study: Study) -> None:
    baseline = study.settings.baseline
    count = len(study.runs_of(baseline))
    for member in study.settings.members:
        others = len(study.runs_of(member))
        if 1 < count < others:
            raise study.file.fault(
                "baseline",
                f"must have one run or as many as each member, {baseline} has {count} and {member} has {others}",
            )


def _check_measure(study: Study) -> None:
    settings, fault = study.settings.measure, study.file.fault
    with study.file.blaming("measure.metrics"):
        METRICS.select(settings.metrics)
    try:
        resolve_settings(settings.preset, settings.settings)
    except UserError as error:
        key = "preset" if "preset" in str(error) else "settings"
        raise fault(f"measure.{key}", f"is wrong: {error}") from None
    texts = {"measure.evaluation_set": settings.evaluation_set, "evaluation_text": study.settings.evaluation_text}
    for key, given in texts.items():
        if given is not None and not Path(given).exists():
            raise fault(key, f"must be an existing file, got {given!r}")


def _check_tasks(study: Study) -> set[str]:
    """The wanted tasks that are made from held-out text."""
    from hf_lowrank.downstream.catalogue import OFFLINE, expand_tasks, wanted_tasks

    with study.file.blaming("evaluate.tasks"):
        known, problems = expand_tasks(wanted_tasks(study.settings.evaluate.tasks))
        if problems:
            raise UserError(problems[0])
    return set(known) & set(OFFLINE)


def saved_steps(recipe: Recipe) -> list[int] | None:
    """The steps at which training by `recipe` saves; None if the recipe does not determine them."""
    args = recipe.arguments(recipe.path.parent)
    if args.max_steps < 1:
        return None
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.max_steps * args.save_steps)
    if args.save_strategy == "no":
        return [0, args.max_steps]
    if args.save_strategy != "steps" or every < 1:
        return None
    return sorted({*range(0, args.max_steps + 1, int(every)), args.max_steps})


def _check_steps(study: Study, recipes: dict[str, Recipe], stages: Sequence[str]) -> None:
    settings = study.settings
    wanted = []
    if "measure" in stages:
        wanted += [("measure.steps", settings.measure.steps), ("measure.pairs", settings.measure.pairs)]
    if "evaluate" in stages:
        wanted += [("evaluate.steps", settings.evaluate.steps)]
    available = {name: saved_steps(recipe) for name, recipe in recipes.items()}
    available |= {run.member: study.trajectories[run.name].steps for run in study.external_runs}
    for key, steps in wanted:
        for member, saved in available.items():
            if steps is not None and saved is not None:
                with study.file.blaming(key, f"does not fit {member}"):
                    choose_steps(saved, steps, "all")


def _check_folders(study: Study, stages: Sequence[str]) -> None:
    """Existing run directories must have been started by these very recipes."""
    if study.directory.exists() and not study.directory.is_dir():
        raise UserError(f"{study.directory}: --output must be a folder, this is a file")
    waiting = study.waiting
    runs: list[Run | Trial] = list(study.trials) if "sweep" in stages else []
    for run in [*runs, *(run for run in study.own_runs if run.member not in waiting)]:
        if run.folder.exists():
            check_belongs(run.folder, study.recipe(run))


def _check_inputs(study: Study, stages: Sequence[str]) -> None:
    """A stage needs what earlier stages write, unless they run too."""
    if study.waiting and "sweep" not in stages and "train" in stages:
        raise UserError(
            f"{study.directory}: stage train needs the sweep's choice for {study.waiting[0]}; add sweep to --stages"
        )
    for name in stages:
        if STAGE_TABLE[name].uses_runs and "train" not in stages and not study.trained_runs():
            raise UserError(f"{study.directory}: stage {name} needs trained runs; add train to --stages")
    for name in stages:
        for file, writer in STAGE_TABLE[name].reads:
            if writer not in stages and not any((run.folder / file).is_file() for run in study.runs):
                raise UserError(f"{study.directory}: stage {name} needs {file} of a run; add {writer} to --stages")


def _check_sequences(study: Study, recipes: dict[str, Recipe]) -> None:
    """Losses need held-out sequences."""
    if recipes or study.settings.evaluation_text or study.settings.measure.evaluation_set:
        return
    for run in study.external_runs:
        if study.trajectories[run.name].extra(EVALUATION_SET) is None:
            raise study.file.fault(
                "evaluation_text",
                f"must name a text to measure losses on: no member is trained here, and {run.source} has no "
                f"{EVALUATION_SET}",
            )


def _lacking_text(study: Study, recipes: dict[str, Recipe], offline: set[str]) -> str | None:
    """Why the offline tasks cannot be made from any member's held-out text; None if they can or are not wanted."""
    sources = [recipe.data.source for recipe in recipes.values()]
    sources += [(known.run.recipe or {}).get("data", {}).get("source") for known in study.trajectories.values()]
    if not offline or {"python-library", "files"} & set(sources):
        return None
    return f"{sorted(offline)[0]} needs held-out text, which no member has (data.source is none or hub)"
