"""Units of a study's work: what each process does, and what of it is done already.

A unit is a plain mapping, so that it can be sent to another process; `perform` does what it says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_lowrank.errors import DivergedError, UserError
from hf_lowrank.runs.facts import read_facts, write_facts
from hf_lowrank.runs.layout import MEASUREMENTS, PREDICTION, SCORES
from hf_lowrank.storage.checksums import unsealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json
from hf_lowrank.study.layout import Attempt, Run, Study
from hf_lowrank.study.strangers import evaluation_of, is_whole, make_view, view_work
from hf_lowrank.training.start import is_finished

# Which results were computed from which inputs.
STAMPS = ".results.json"
# In the facts of an attempt whose loss became no number: what was said of it.
DIVERGED = "diverged"


@dataclass(frozen=True)
class Unit:
    """What one process does.

    Attributes:
        stage: of the study.
        name: the run's, or what is computed.
        work: for `perform`.
        done: whether nothing is left to do.
    """

    stage: str
    name: str
    work: dict[str, Any] = field(repr=False)
    done: bool = False

    @property
    def key(self) -> str:
        return f"{self.stage} {self.name}"


def sweep_units(study: Study) -> list[Unit]:
    return [
        Unit("sweep", attempt.name, _training(study, attempt), is_tried(attempt.folder)) for attempt in study.attempts
    ]


def is_tried(attempt: Path) -> bool:
    """Whether an attempt of the sweep has come to its end, or to numbers that are none."""
    return is_finished(attempt) or DIVERGED in read_facts(attempt)


def train_units(study: Study) -> list[Unit]:
    """One for each run that is trained here. Before the sweep, members that wait for it are all to do."""
    waiting = {attempt.member for attempt in study.attempts} - set(study.rates)
    return [
        Unit("train", run.name, _training(study, run), run.member not in waiting and is_finished(run.folder))
        for run in study.runs
        if run.source is None
    ]


def view_units(study: Study) -> list[Unit]:
    """One for each stranger: its checkpoints are linked, or downloaded."""
    return [
        Unit("fetch", run.name, view_work(study, run), is_whole(study, run))
        for run in study.runs
        if run.source is not None
    ]


def measure_units(study: Study) -> list[Unit]:
    """One for each run that is trained."""
    settings = study.settings.measure
    keywords = settings.model_dump(mode="json", exclude={"pairs"})
    found = []
    for run in study.runs:
        if study.is_trained(run):
            work = {
                "kind": "measure",
                "run": str(run.folder),
                "baseline": str(study.baseline_of(run).folder) if study.is_trained(study.baseline_of(run)) else None,
                "keywords": keywords,
            }
            found.append(Unit("measure", run.name, work, _nothing_unmeasured(work)))
    return found


def pair_units(study: Study) -> list[Unit]:
    """For each run the later runs of its place, each pair once; one process writes into one run."""
    settings = study.settings.measure
    if settings.pairs is None:
        return []
    keywords = settings.model_dump(mode="json", exclude={"pairs"})
    keywords |= {"metrics": ["method_barrier"], "steps": settings.pairs}
    baseline = study.settings.baseline
    found = []
    # Which of two writes does not depend on the order of members; the barrier to the baseline is there already.
    runs = sorted(
        (run for run in study.runs if study.is_trained(run)), key=lambda run: (run.member == baseline, run.member)
    )
    for place, run in enumerate(runs):
        others = [str(o.folder) for o in runs[place + 1 :] if o.place == run.place and o.member != run.member]
        work = {"kind": "pairs", "run": str(run.folder), "others": others, "keywords": keywords}
        if others:
            found.append(Unit("measure", f"{run.name} pairs", work, _nothing_unmeasured(work)))
    return found


def evaluate_units(study: Study) -> list[Unit]:
    keywords = study.settings.evaluate.model_dump(mode="json")
    found = []
    for run in study.runs:
        if study.is_trained(run):
            work = {"kind": "evaluate", "run": str(run.folder), "keywords": keywords}
            found.append(Unit("evaluate", run.name, work, _nothing_unscored(work)))
    return found


def result_units(study: Study, stage: str) -> list[Unit]:
    """Prediction, claims or report, from what lies in the run directories."""
    runs = [run for run in study.runs if study.is_trained(run)]
    work: dict[str, Any] = {
        "kind": stage,
        "runs": [str(run.folder) for run in runs],
        "output": str(study.directory),
    }
    if stage == "predict":
        work["keywords"] = study.settings.predict.model_dump(mode="json")
    if stage == "claims":
        seeds = study.settings.seeds
        work |= {
            "baseline": study.settings.baseline,
            "members": [run.member for run in runs],
            "seeds": [
                run.seed if run.seed is not None else seeds[run.place] if run.place < len(seeds) else run.place
                for run in runs
            ],
        }
    stamp = inputs_of(work)
    work["stamp"] = stamp
    done = stage != "report" and _stamps(study).get(stage) == stamp and _is_readable(study.directory / RESULTS[stage])
    return [Unit(stage, stage, work, done)]


RESULTS = {"predict": PREDICTION, "claims": "claims.json", "report": "report/report.html"}


def _is_readable(result: Path) -> bool:
    """Whether a result is there as it was written; a damaged one is computed again."""
    try:
        unsealed(parse_json(result.read_text(encoding="utf-8")))
        return True
    except (OSError, ValueError, AttributeError):
        return False


def inputs_of(work: dict[str, Any]) -> str:
    """A fingerprint of what a result is computed from, hex."""
    digest = hashlib.sha256(version("hf-lowrank").encode())
    asked = {key: value for key, value in work.items() if key not in ("output", "runs", "stamp")}
    asked["names"] = [Path(run).name for run in work["runs"]]
    digest.update(json.dumps(asked, sort_keys=True).encode())
    files = [Path(run) / name for run in work["runs"] for name in (MEASUREMENTS, SCORES)]
    for file in [*files, Path(work["output"]) / PREDICTION if work["kind"] == "claims" else Path()]:
        digest.update(file.read_bytes() if file.is_file() else b"-")
    return digest.hexdigest()


def _stamps(study: Study) -> dict[str, str]:
    return read_stamps(study.directory)


def read_stamps(directory: Path) -> dict[str, str]:
    """Fingerprints of the inputs by stage, as they were when the results were computed."""
    try:
        stamps = parse_json((directory / STAMPS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _training(study: Study, run: Run | Attempt) -> dict[str, Any]:
    recipe, overrides, seed = study.recipe_arguments(run)
    return {
        "kind": "train",
        "recipe": recipe,
        "overrides": overrides,
        "seed": seed,
        "folder": str(study.file.path.parent),
        "output": str(run.folder),
        "may_diverge": isinstance(run, Attempt),
    }


def _nothing_unmeasured(work: dict[str, Any]) -> bool:
    """Whether a unit that measures would find nothing to do; a fault counts as something: the unit will say it."""
    from hf_lowrank.measuring import unmeasured

    if not (Path(work["run"]) / MEASUREMENTS).is_file():
        return False
    keywords = {key: value for key, value in work["keywords"].items() if key != "device"}
    try:
        keywords["evaluation_set"] = _sequences(work)
        return not any(
            unmeasured(work["run"], baseline=other, **keywords) for other in work.get("others", [work.get("baseline")])
        )
    except (ValueError, OSError):
        return False


def _nothing_unscored(work: dict[str, Any]) -> bool:
    """As `_nothing_unmeasured`."""
    try:
        return not _unscored(work)
    except (ValueError, OSError):
        return False


def _unscored(work: dict[str, Any]) -> list[tuple[int, str]]:
    from hf_lowrank.downstream.runner import unscored

    if not (Path(work["run"]) / SCORES).is_file():
        return [(0, "")]
    keywords = work["keywords"]
    return unscored(work["run"], tasks=keywords["tasks"], steps=keywords["steps"], limit=keywords["limit"])


def _sequences(work: dict[str, Any]) -> Any:
    given = work["keywords"].get("evaluation_set")
    if given is None:
        return None
    from hf_lowrank.runs.trajectory import Trajectory

    return evaluation_of(given, Trajectory(work["run"]))


def perform(work: dict[str, Any]) -> str | None:
    """Does a unit's work in this process; returns what a reader should know about the outcome.

    Raises:
        UserError: it cannot be done.
    """
    return PERFORM[work["kind"]](work)


def _train(work: dict[str, Any]) -> str | None:
    from hf_lowrank.memory import memory_recorder
    from hf_lowrank.training import load_recipe, pretrain

    recipe = load_recipe(work["recipe"], work["overrides"], work["seed"], folder=work["folder"])
    try:
        pretrain(recipe, work["output"], recorder=memory_recorder)
    except DivergedError as error:
        if not work["may_diverge"]:
            raise
        # A rate that is too high is an answer of the sweep.
        run = Path(work["output"])
        write_facts(run, {**read_facts(run), DIVERGED: str(error)})
        return str(error)
    return None


def _measure(work: dict[str, Any]) -> None:
    from hf_lowrank.measuring import measure

    keywords = {**work["keywords"], "evaluation_set": _sequences(work)}
    for other in work.get("others", [work.get("baseline")]):
        measure(work["run"], baseline=other, **keywords)


def _evaluate(work: dict[str, Any]) -> str | None:
    from hf_lowrank.downstream import evaluate

    said: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)  # noqa: T201
        said.append(line)

    evaluate(work["run"], warn=say, **work["keywords"])
    left = _unscored(work)
    if left:
        step, task = left[0]
        run = Path(work["run"]).name
        raise UserError(said[0].replace(f"{run}: ", "") if said else f"{task} gave no score at step {step}")
    return said[0] if said else None


def _predict(work: dict[str, Any]) -> str | None:
    from hf_lowrank.downstream import predict

    # The result names its runs: by their place in the study, wherever the study lies.
    directory = Path(work["output"]).resolve()
    runs = [os.path.relpath(Path(run).resolve(), directory) for run in work["runs"]]
    with chdir(directory):
        prediction = predict(runs, output=directory, **work["keywords"])
    return prediction.notes[0] if prediction.notes else None


def _claims(work: dict[str, Any]) -> None:
    from hf_lowrank.claims import examine, write_claims

    prediction = Path(work["output"]) / RESULTS["predict"]
    claims = examine(
        work["runs"],
        baseline=work["baseline"],
        methods=work["members"],
        seeds=work["seeds"],
        prediction=prediction if prediction.is_file() else None,
    )
    write_claims(claims, Path(work["output"]) / RESULTS["claims"])


def _report(work: dict[str, Any]) -> None:
    from hf_lowrank.report import write_report

    write_report(work["runs"], Path(work["output"]) / "report", study=work["output"])


def _stamped(compute: Callable[[dict[str, Any]], str | None]) -> Callable[[dict[str, Any]], str | None]:
    def perform_and_stamp(work: dict[str, Any]) -> str | None:
        note = compute(work)
        directory = Path(work["output"])
        write_text(directory / STAMPS, json.dumps({**read_stamps(directory), work["kind"]: work["stamp"]}))
        return note

    return perform_and_stamp


PERFORM: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "train": _train,
    "view": make_view,
    "measure": _measure,
    "pairs": _measure,
    "evaluate": _evaluate,
    "predict": _stamped(_predict),
    "claims": _stamped(_claims),
    "report": _report,
}
