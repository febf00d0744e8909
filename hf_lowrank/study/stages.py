"""The table of stages: which units each has, what it reads, and what follows from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_lowrank.downstream.prediction import FEWEST_RUNS
from hf_lowrank.runs.layout import MEASUREMENTS, SCORES
from hf_lowrank.study.external import FetchUnit, fetch_unit
from hf_lowrank.study.layout import ExternalRun, Run, Study, Trial
from hf_lowrank.study.sweep import read_winners, write_sweep
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
)

UNIT_TYPES: dict[str, type[Unit]] = {
    kind.__name__: kind
    for kind in (
        TrialUnit,
        TrainUnit,
        FetchUnit,
        MeasureUnit,
        PairsUnit,
        EvaluateUnit,
        PredictUnit,
        ClaimsUnit,
        ReportUnit,
    )
}


def unit_from(plain: dict[str, Any]) -> Unit:
    """The unit that `Unit.plain` wrote."""
    fields = dict(plain)
    return UNIT_TYPES[fields.pop("type")](**fields)


def trial_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    return [TrialUnit(name=trial.name, **_training(study, trial)) for trial in study.trials]


def train_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    return [
        TrainUnit(name=run.name, waits=run.member in study.waiting, **_training(study, run))
        for run in study.runs
        if not isinstance(run, ExternalRun)
    ]


def _training(study: Study, run: Run | Trial) -> dict[str, Any]:
    recipe, overrides, seed = study.recipe_arguments(run)
    return {
        "recipe": recipe,
        "overrides": overrides,
        "seed": seed,
        "folder": str(study.file.path.parent),
        "output": str(run.folder),
    }


def fetch_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    return [fetch_unit(study, run) for run in study.runs if isinstance(run, ExternalRun)]


def measure_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    keywords = study.settings.measure.model_dump(mode="json", exclude={"pairs"})
    units: list[Unit] = []
    for run in runs:
        baseline = study.baseline_of(run)
        baselines = [str(baseline.folder) if baseline in runs else None]
        units.append(MeasureUnit(name=run.name, run=str(run.folder), baselines=baselines, keywords=keywords))
    return units


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
    return [PredictUnit(**_result(study, runs, PredictUnit), keywords=keywords)]


def claims_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    return [
        ClaimsUnit(
            **_result(study, runs, ClaimsUnit),
            baseline=study.settings.baseline,
            members=[run.member for run in runs],
            seeds=[run.seed for run in runs],
        )
    ]


def report_units(study: Study, runs: Sequence[Run]) -> list[Unit]:
    return [ReportUnit(**_result(study, runs, ReportUnit))]


def _result(study: Study, runs: Sequence[Run], kind: type[ResultUnit]) -> dict[str, Any]:
    return {"name": kind.stage, "runs": [str(run.folder) for run in runs], "output": str(study.directory)}


def choose_winners(study: Study) -> tuple[Study, list[str]]:
    """The study with the values that its sweep chose, and what to say about them."""
    rows = write_sweep(study)
    lines = [
        f"sweep: the best learning rate of {row['member']} is {row['learning_rate']:g}, at the edge of the grid; one "
        "beyond it may be better"
        for row in rows
        if row["at_edge"]
    ]
    return study.with_winners(read_winners(study.file, study.directory)), lines


def too_few_runs(study: Study, runs: Sequence[Run]) -> str | None:
    """Why scores cannot be predicted, None if they can."""
    ready = sum(all((run.folder / name).is_file() for name in (MEASUREMENTS, SCORES)) for run in runs)
    if ready >= FEWEST_RUNS:
        return None
    return f"it needs at least {FEWEST_RUNS} runs with measurements and scores, there are {ready}"


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
    "sweep": Stage(batches=(trial_units,), uses_runs=False, finish=choose_winners),
    "train": Stage(batches=(train_units,), uses_runs=False),
    "measure": Stage(batches=(fetch_units, measure_units, pair_units)),
    "evaluate": Stage(batches=(fetch_units, evaluate_units)),
    "predict": Stage(
        batches=(predict_units,), reads=((MEASUREMENTS, "measure"), (SCORES, "evaluate")), obstacle=too_few_runs
    ),
    "claims": Stage(batches=(claims_units,), reads=((MEASUREMENTS, "measure"),)),
    "report": Stage(batches=(report_units,)),
}
