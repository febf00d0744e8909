"""The table of stages: which units each has, what it reads, and what follows from it, e.g. the winners of a sweep."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_lowrank.claims.results import SWEEP, key_words, read_sweep, value_text
from hf_lowrank.downstream.prediction import too_few
from hf_lowrank.errors import UserError
from hf_lowrank.runs.checkpoints import last_resumable_checkpoint
from hf_lowrank.runs.layout import MEASUREMENTS, SCORES
from hf_lowrank.runs.run_files import read_trainer_state
from hf_lowrank.storage.checksums import sealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.study.layout import Run, Study, Trial, trial_folder
from hf_lowrank.study.members import FetchUnit, fetch_unit
from hf_lowrank.study.ranges import Values, edge_distances, one_step_beyond, order
from hf_lowrank.study.spec import StudyFile
from hf_lowrank.study.units import (
    ClaimsUnit,
    EvaluateUnit,
    MeasureUnit,
    PairsUnit,
    PredictUnit,
    ReportUnit,
    ResultUnit,
    TrainUnit,
    TrialUnit,
    Unit,
    failure_of,
    is_decided,
)
from hf_lowrank.training.start import is_finished

ALL = (TrialUnit, TrainUnit, FetchUnit, MeasureUnit, PairsUnit, EvaluateUnit, PredictUnit, ClaimsUnit, ReportUnit)
UNIT_TYPES: dict[str, type[Unit]] = {kind.__name__: kind for kind in ALL}


def final_loss(run: Path) -> float:
    """The held-out loss of a finished run at its end, nats per token; NaN for an unfinished run."""
    checkpoint = last_resumable_checkpoint(run) if is_finished(run) else None
    state = read_trainer_state(checkpoint) if checkpoint is not None else None
    losses = list(state.logged("eval_loss").values()) if state is not None else []
    return losses[-1] if losses else math.nan


def best_of(trials: Sequence[Trial]) -> tuple[list[float], Trial | None]:
    """The loss of each trial, NaN for one that failed, and the winner: the lowest loss, the first of equal ones."""
    losses = [final_loss(trial.folder) for trial in trials]
    finite = [(loss, index) for index, loss in enumerate(losses) if not math.isnan(loss)]
    return losses, trials[min(finite)[1]] if finite else None


def trials_by_member(study: Study) -> dict[str, list[Trial]]:
    """The trials of each member that the study file asks for, in the order of their values."""
    found: dict[str, list[Trial]] = {}
    for trial in sorted(study.trials, key=lambda trial: order(trial.values)):
        found.setdefault(trial.member, []).append(trial)
    return {name: found[name] for name in dict.fromkeys(trial.member for trial in study.trials)}


def extensions(study: Study) -> list[Trial]:
    """Trials one step beyond each edge at which a member's winner lies, once all of that member's trials have ended.

    They depend on the member's own trials alone. A step that its recipe does not allow is left out.
    """
    found: list[Trial] = []
    for member, trials in trials_by_member(study).items():
        if not all(is_decided(trial.folder) for trial in trials):
            continue
        _, winner = best_of(trials)
        moved = one_step_beyond([trial.values for trial in trials], winner.values) if winner is not None else []
        for values in moved:
            folder = trial_folder(study.directory, member, values)
            trial = Trial(member=member, values=values, folder=folder, extension=True)
            try:
                study.recipe(trial)
            except UserError:
                continue
            found.append(trial)
    return found


def choose(study: Study) -> list[dict[str, Any]]:
    """The rows of sweep.json: every trial, with each member's winner marked; of equal losses the lowest values."""
    rows: list[dict[str, Any]] = []
    further, sweep, members = extensions(study), study.settings.sweep, study.settings.members
    assert sweep is not None
    for member, planned in trials_by_member(study).items():
        trials = [*planned, *(trial for trial in further if trial.member == member)]
        trials.sort(key=lambda trial: order(trial.values))
        losses, winner = best_of(trials)
        for trial, loss in zip(trials, losses, strict=True):
            edges = edge_distances([other.values for other in trials], trial.values) if trial is winner else {}
            rows.append(
                {
                    "member": member,
                    "values": dict(trial.values),
                    "ranges": sweep.ranges(members[member]),
                    "loss": None if math.isnan(loss) else loss,
                    "failure": failure_of(trial.folder) if math.isnan(loss) else None,
                    "chosen": trial is winner,
                    "extension": trial.extension,
                    "edges": edges,
                    "run": trial.folder.relative_to(study.directory).as_posix(),
                }
            )
    return rows


def read_winners(file: StudyFile, directory: Path) -> dict[str, Values]:
    """Each member's chosen values according to sweep.json; empty without it.

    A choice from other values than those that the study asks for does not count.

    Raises:
        UserError: the file is damaged.
    """
    sweep, members = file.settings.sweep, file.settings.members
    if sweep is None:
        return {}
    try:
        rows = read_sweep(directory)
    except UserError as error:
        raise UserError(f"{error}, or remove it") from None
    chosen = {row.member: row.tried for row in rows if row.chosen}
    tried: dict[str, list[Values]] = {}
    for row in rows:
        if not row.extension:
            tried.setdefault(row.member, []).append(row.tried)
    winners: dict[str, Values] = {}
    for name in [name for name, member in members.items() if member.is_swept and name in chosen]:
        wanted = sweep.values_of(name, members[name])
        if sorted(map(order, wanted)) == sorted(map(order, tried.get(name, []))):
            winners[name] = {key: chosen[name][key] for key in wanted[0]}
    return winners


def unit_from(plain: dict[str, Any]) -> Unit:
    """The unit that `Unit.plain` wrote."""
    fields = dict(plain)
    return UNIT_TYPES[fields.pop("type")](**fields)


def trial_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    return [TrialUnit(name=trial.name, **_training(study, trial)) for trial in study.trials]


def extension_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    return [TrialUnit(name=trial.name, **_training(study, trial)) for trial in extensions(study)]


def train_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    waiting = study.waiting
    return [TrainUnit(name=run.name, waits=run.member in waiting, **_training(study, run)) for run in study.own_runs]


def _training(study: Study, run: Run | Trial) -> dict[str, Any]:
    arguments = dict(zip(("recipe", "overrides", "seed"), study.recipe_arguments(run), strict=True))
    processes = study.settings.members[run.member].processes
    return {**arguments, "folder": str(study.file.path.parent), "output": str(run.folder), "processes": processes}


def fetch_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    return [fetch_unit(study, run) for run in study.external_runs]


def measure_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    keywords = study.settings.measure.model_dump(mode="json", exclude={"pairs"})
    baselines = [study.baseline_of(run) for run in runs]
    folders = [[str(baseline.folder) if baseline in runs else None] for baseline in baselines]
    pairs = zip(runs, folders, strict=True)
    return [MeasureUnit(name=run.name, run=str(run.folder), baselines=own, keywords=keywords) for run, own in pairs]


def pair_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    """For each run its barriers to the later runs of its index: each pair once, each run written by one process."""
    settings, baseline = study.settings.measure, study.settings.baseline
    if settings.pairs is None:
        return []
    keywords = settings.model_dump(mode="json", exclude={"pairs"})
    keywords |= {"metrics": ["method_barrier"], "steps": settings.pairs}
    units: list[Unit] = []
    # Which run of a pair is written does not depend on the order of members; barriers to the baseline are measured
    # already.
    ordered = sorted(runs, key=lambda run: (run.member == baseline, run.member))
    for position, run in enumerate(ordered):
        others: list[str | None] = [
            str(other.folder)
            for other in ordered[position + 1 :]
            if other.index == run.index and other.member != run.member
        ]
        if others:
            units.append(PairsUnit(name=f"{run.name} pairs", run=str(run.folder), baselines=others, keywords=keywords))
    return units


def evaluate_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    keywords = study.settings.evaluate.model_dump(mode="json")
    return [EvaluateUnit(name=run.name, run=str(run.folder), keywords=keywords) for run in runs]


def predict_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    keywords = study.settings.predict.model_dump(mode="json")
    return [PredictUnit(**_result(study, runs, PredictUnit), members=_titles(study, runs), keywords=keywords)]


def claims_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    members = study.settings.members
    baseline = members[study.settings.baseline].title or study.settings.baseline
    given: dict[str, Any] = {
        "baseline": baseline,
        "members": _titles(study, runs),
        "seeds": [run.seed for run in runs],
    }
    return [ClaimsUnit(**_result(study, runs, ClaimsUnit), **given)]


def _titles(study: Study, runs: Sequence[Run]) -> list[str]:
    """The member of each run, by its title where it has one."""
    return [study.settings.members[run.member].title or run.member for run in runs]


def report_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    return [ReportUnit(**_result(study, runs, ReportUnit))]


def _result(study: Study, runs: Sequence[Run], kind: type[ResultUnit]) -> dict[str, Any]:
    return {"name": kind.stage, "runs": [str(run.folder) for run in runs], "output": str(study.directory)}


def choose_winners(study: Study) -> tuple[Study, list[str]]:
    """The study with the values that its sweep chose, and what to say about them."""
    rows = choose(study)
    write_text(study.directory / SWEEP, json.dumps([sealed(row) for row in rows], indent=1) + "\n")
    lines = [
        f"sweep: the best {key_words(key)} of {row['member']} is {value_text(row['values'][key])}, at the edge of the "
        "values tried; a better one may lie beyond"
        for row in rows
        for key, distance in row["edges"].items()
        if distance == 0
    ]
    return replace(study, winners=read_winners(study.file, study.directory)), lines


def too_few_runs(study: Study, runs: Sequence[Run]) -> str | None:
    """Why scores cannot be predicted, None if they can."""
    ready = [run for run in runs if all((run.folder / name).is_file() for name in (MEASUREMENTS, SCORES))]
    reason = too_few(study.methods_of(ready))
    return reason and f"{reason} with measurements and scores"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a study.

    Attributes:
        batches: functions that make its units from the study and the runs that are trained. The units of a batch run
            in parallel, batches one after another.
        reads: (file of a run, stage that writes it) of each input; without such a file the stage cannot run.
        uses_runs: whether it needs trained runs.
        obstacle: why it cannot run, asked when its turn comes; None if it can.
        finish: what follows from its outputs: a changed study, and lines to say.
    """

    batches: tuple[Callable[[Study, Sequence[Run]], list[Unit]], ...]
    reads: tuple[tuple[str, str], ...] = ()
    uses_runs: bool = True
    obstacle: Callable[[Study, Sequence[Run]], str | None] = lambda study, runs: None
    finish: Callable[[Study], tuple[Study, list[str]]] = lambda study: (study, [])


# In the order in which they run; `spec.STAGES` has the same names.
STAGE_TABLE = {
    "sweep": Stage(batches=(trial_units, extension_units), uses_runs=False, finish=choose_winners),
    "train": Stage(batches=(train_units,), uses_runs=False),
    "measure": Stage(batches=(fetch_units, measure_units, pair_units)),
    "evaluate": Stage(batches=(fetch_units, evaluate_units)),
    "predict": Stage(
        batches=(predict_units,), reads=((MEASUREMENTS, "measure"), (SCORES, "evaluate")), obstacle=too_few_runs
    ),
    "claims": Stage(batches=(claims_units,), reads=((MEASUREMENTS, "measure"),)),
    "report": Stage(batches=(report_units,)),
}
