"""What is wrong with a study, found before anything of it runs: each fault one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_lowrank.downstream.prediction import FEWEST_RUNS
from hf_lowrank.errors import UserError, nearest
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.layout import EVALUATION_SET, MEASUREMENTS, SCORES
from hf_lowrank.runs.measure_settings import resolve_settings
from hf_lowrank.runs.selection import choose_steps
from hf_lowrank.study.layout import Attempt, Run, Study, attempts_of, is_swept, member_recipe, runs_of
from hf_lowrank.study.members import check_members
from hf_lowrank.study.spec import STAGES, StudyFile
from hf_lowrank.study.sweep import chosen_rates
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
        raise UserError(f"{file.path}: stage sweep needs a sweep block with learning_rate; there is none")
    return [stage for stage in STAGES if stage in names], True


def prepare(file: StudyFile, directory: Path, stages: Sequence[str], *, named: bool = False) -> Study:
    """The study with everything that it names looked at; nothing is written.

    Args:
        file: the study file.
        directory: the study's own.
        stages: what is to run.
        named: whether the stages were asked for by name; then one that cannot run is an error, not left out.

    Raises:
        UserError: the first fault.
    """
    runs, attempts = runs_of(file, directory), attempts_of(file, directory)
    _check_names(file, [*runs, *attempts])
    rates = chosen_rates(file, directory)
    recipes = _recipes(file, rates)
    strangers = check_members(file, runs, recipes)
    study = Study(file=file, directory=directory, runs=runs, attempts=attempts, rates=rates, strangers=strangers)
    _check_baseline_runs(study)
    _check_keywords(study, stages)
    _check_steps(study, recipes, stages)
    _check_folders(study, stages)
    _check_inputs(study, stages)
    _check_texts(study, recipes, stages, named)
    if len(runs) < FEWEST_RUNS:
        study.left_out["predict"] = f"it needs at least {FEWEST_RUNS} runs, there are {len(runs)}"
    return study


def _check_names(file: StudyFile, runs: Sequence[Run | Attempt]) -> None:
    seen: dict[str, Run | Attempt] = {}
    for run in runs:
        # Some file systems take upper and lower case for the same.
        key = str(run.folder).lower()
        if key not in seen:
            seen[key] = run
            continue
        other = seen[key]
        if isinstance(run, Attempt) and run.member == other.member:
            raise file.fault("sweep.learning_rate", f"rates must differ, {run.learning_rate:g} is there twice")
        raise file.fault(
            f"members.{run.member}", f"and members.{other.member} would both have a run {run.name}; rename one of them"
        )


def _recipes(file: StudyFile, rates: dict[str, float]) -> dict[str, Recipe]:
    """Each trained member's recipe; before the sweep with its first rate."""
    settings = file.settings
    found: dict[str, Recipe] = {}
    for name, member in settings.members.items():
        if member.recipe is None:
            continue
        overrides = [*settings.overrides, *member.overrides]
        rate = member.learning_rate or rates.get(name)
        if rate is None and settings.sweep is not None:
            rate = settings.sweep.learning_rate[0]
        if rate is not None:
            overrides.append(f"training.learning_rate={rate!r}")
        found[name] = member_recipe(file, name, member.recipe, overrides, settings.seeds[0])
        if settings.sweep is not None and is_swept(member):
            swept = [*overrides[:-1], *settings.sweep.overrides, overrides[-1]]
            member_recipe(file, name, member.recipe, swept, settings.sweep.seed)
    return found


def _check_baseline_runs(study: Study) -> None:
    baseline = study.of(study.settings.baseline)
    for member in study.settings.members:
        count = len(study.of(member))
        if 1 < len(baseline) < count:
            raise study.file.fault(
                "baseline",
                f"must have one run or as many as each member, {study.settings.baseline} has {len(baseline)} and "
                f"{member} has {count}",
            )


def _check_keywords(study: Study, stages: Sequence[str]) -> None:
    settings, fault = study.settings, study.file.fault
    if "measure" in stages:
        try:
            METRICS.select(settings.measure.metrics)
        except UserError as error:
            raise fault("measure.metrics", f"is wrong: {error}") from None
        try:
            resolve_settings(settings.measure.preset, settings.measure.settings)
        except UserError as error:
            key = "preset" if "preset" in str(error) else "settings"
            raise fault(f"measure.{key}", f"is wrong: {error}") from None
        for key, given in (
            ("measure.evaluation_set", settings.measure.evaluation_set),
            ("evaluation_text", settings.evaluation_text),
        ):
            if given is not None and not Path(given).exists():
                raise fault(key, f"must be a file that is there, got {given!r}")
    if "evaluate" in stages:
        from hf_lowrank.downstream.catalogue import expand_tasks, wanted_tasks

        try:
            problems = expand_tasks(wanted_tasks(settings.evaluate.tasks))[1]
        except UserError as error:
            problems = [str(error)]
        if problems:
            raise fault("evaluate.tasks", f"is wrong: {problems[0]}")
    if "predict" in stages:
        try:
            METRICS.select(settings.predict.metrics)
        except UserError as error:
            raise fault("predict.metrics", f"is wrong: {error}") from None


def saved_steps(recipe: Recipe) -> list[int] | None:
    """The steps at which a training by `recipe` saves, where the recipe says so."""
    args = recipe.arguments(recipe.path.parent)
    if args.max_steps < 1:
        return None
    every = args.save_steps if args.save_steps >= 1 else int(args.max_steps * args.save_steps)
    if args.save_strategy == "no":
        return [0, args.max_steps]
    if args.save_strategy != "steps" or every < 1:
        return None
    return sorted({*range(0, args.max_steps + 1, int(every)), args.max_steps})


def _check_steps(study: Study, recipes: dict[str, Recipe], stages: Sequence[str]) -> None:
    wanted = []
    if "measure" in stages:
        wanted += [("measure.steps", study.settings.measure.steps), ("measure.pairs", study.settings.measure.pairs)]
    if "evaluate" in stages:
        wanted += [("evaluate.steps", study.settings.evaluate.steps)]
    available = {name: saved_steps(recipe) for name, recipe in recipes.items()}
    available |= {run.member: study.strangers[run.name].steps for run in study.runs if run.source is not None}
    for key, steps in wanted:
        for member, there in available.items():
            if steps is None or there is None:
                continue
            try:
                choose_steps(there, steps, "all")
            except UserError as error:
                raise study.file.fault(key, f"does not fit {member}: {error}") from None


def _check_folders(study: Study, stages: Sequence[str]) -> None:
    """Run directories that are there must have been begun by these very recipes."""
    if study.directory.exists() and not study.directory.is_dir():
        raise UserError(f"{study.directory}: --output must be a folder, this is a file")
    for attempt in study.attempts if "sweep" in stages else ():
        if attempt.folder.exists():
            check_belongs(attempt.folder, study.recipe(attempt))
    waiting = {attempt.member for attempt in study.attempts} - set(study.rates)
    for run in study.runs:
        if run.source is None and run.folder.exists() and run.member not in waiting:
            check_belongs(run.folder, study.recipe(run))


def _check_inputs(study: Study, stages: Sequence[str]) -> None:
    """A stage must find what earlier ones write, unless these run too."""
    waiting = sorted({attempt.member for attempt in study.attempts} - set(study.rates))
    if waiting and "sweep" not in stages and "train" in stages:
        raise UserError(
            f"{study.directory}: stage train needs the sweep's rate of {waiting[0]}; add sweep to --stages"
        )
    for stage in ("measure", "evaluate", "predict", "claims", "report"):
        if stage in stages and "train" not in stages and not any(study.is_trained(run) for run in study.runs):
            raise UserError(f"{study.directory}: stage {stage} needs runs that are trained; add train to --stages")
    needs = {
        "predict": (("measure", MEASUREMENTS), ("evaluate", SCORES)),
        "claims": (("measure", MEASUREMENTS),),
    }
    for stage, inputs in needs.items():
        for earlier, file in inputs:
            there = any((run.folder / file).is_file() for run in study.runs)
            if stage in stages and earlier not in stages and not there:
                raise UserError(f"{study.directory}: stage {stage} needs {file} of a run; add {earlier} to --stages")


def _check_texts(study: Study, recipes: dict[str, Recipe], stages: Sequence[str], named: bool) -> None:
    """Losses need sequences; the offline tasks need held-out text."""
    settings = study.settings
    if "measure" in stages and not recipes and not (settings.evaluation_text or settings.measure.evaluation_set):
        for run in study.runs:
            if study.strangers[run.name].extra(EVALUATION_SET) is None:
                raise study.file.fault(
                    "evaluation_text",
                    f"must name a text to measure losses on: no member is trained here, and {run.source} brings no "
                    f"{EVALUATION_SET}",
                )
    if "evaluate" not in stages:
        return
    from hf_lowrank.downstream.catalogue import OFFLINE, expand_tasks, wanted_tasks

    offline = set(expand_tasks(wanted_tasks(settings.evaluate.tasks))[0]) & set(OFFLINE)
    blocks = [recipe.data.source for recipe in recipes.values()]
    blocks += [(t.run.recipe or {}).get("data", {}).get("source") for t in study.strangers.values()]
    if offline and not {"python-library", "files"} & set(blocks):
        message = f"{sorted(offline)[0]} is made from held-out text, which no member has (data.source is none or hub)"
        if named or settings.evaluate.tasks is not None:
            raise study.file.fault("evaluate.tasks", f"{message}; name other tasks, as lowrank_paper")
        study.left_out["evaluate"] = f"{message}; evaluate.tasks can name others"
