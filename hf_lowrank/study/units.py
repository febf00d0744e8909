"""Units of a study: what one process does, whether it is done, and what it leaves.

A unit holds plain data only, so that it can be sent to another process. A new kind of unit is a class here and an
entry in `stages`.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from contextlib import chdir
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from hf_lowrank.claims.results import CLAIMS
from hf_lowrank.errors import DivergedError, UserError
from hf_lowrank.formats import is_first_process
from hf_lowrank.processes.launch import launched_processes
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.layout import MEASUREMENTS, PREDICTION, SCORES
from hf_lowrank.runs.run_files import read_facts, write_facts
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.checksums import unsealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json
from hf_lowrank.study.launcher import perform_in_processes
from hf_lowrank.training.start import is_finished

# Fingerprints of the inputs that the results were computed from, by stage.
STAMPS = ".results.json"
# In the facts of a trial whose loss became NaN or Inf: the error message.
DIVERGED = "diverged"


@dataclass(frozen=True, kw_only=True)
class Unit(ABC):
    """What one process does.

    Attributes:
        stage: the first word of its key, and the folder of its log.
        imports: modules that it needs; a worker imports them once, before it forks.
        accelerated: whether it computes on an accelerator where there is one.
        name: the run's name, or what is computed.
    """

    stage: ClassVar[str]
    imports: ClassVar[tuple[str, ...]] = ()
    accelerated: ClassVar[bool] = False
    name: str

    @property
    def key(self) -> str:
        return f"{self.stage} {self.name}"

    @property
    def process_count(self) -> int:
        """How many processes compute, each with an accelerator of its own."""
        return 1

    @abstractmethod
    def outputs(self) -> list[Path]: ...

    @abstractmethod
    def perform(self) -> str | None:
        """Does the work in this process, and returns what a reader should know about the outcome.

        Raises:
            UserError: it cannot be done.
        """

    def is_done(self) -> bool:
        return all(output.exists() for output in self.outputs()) and self.is_current()

    def is_current(self) -> bool:
        """Whether the existing outputs are complete and belong to the present study file."""
        return True

    def plain(self) -> dict[str, Any]:
        """The unit as JSON data; `stages.unit_from` reads it."""
        return {"type": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class TrainUnit(Unit):
    """Trains a run.

    Attributes:
        waits: whether the member has no value yet from its sweep.
        processes: how many train it together.
    """

    stage: ClassVar[str] = "train"
    accelerated: ClassVar[bool] = True
    imports: ClassVar[tuple[str, ...]] = ("hf_lowrank.memory", "hf_lowrank.training.pretrain", "transformers.trainer")
    recipe: str
    overrides: list[str]
    seed: int
    folder: str
    output: str
    waits: bool = False
    processes: int = 1

    @property
    def process_count(self) -> int:
        return self.processes

    def outputs(self) -> list[Path]:
        return [Path(self.output)]

    def is_current(self) -> bool:
        return not self.waits and is_finished(Path(self.output))

    def perform(self) -> str | None:
        from hf_lowrank.memory import memory_recorder
        from hf_lowrank.training import load_recipe, pretrain

        if self.waits:
            raise UserError("no trial of its sweep ended with a finite loss")
        if self.processes > 1 and launched_processes() == 1:
            return perform_in_processes(self.plain(), self.processes)
        recipe = load_recipe(self.recipe, self.overrides, self.seed, folder=self.folder)
        pretrain(recipe, self.output, recorder=memory_recorder)
        return None


@dataclass(frozen=True, kw_only=True)
class TrialUnit(TrainUnit):
    """Trains a trial of the sweep; a diverged one is a result too."""

    stage: ClassVar[str] = "sweep"

    def is_current(self) -> bool:
        return is_decided(Path(self.output))

    def perform(self) -> str | None:
        try:
            return super().perform()
        except DivergedError as error:
            if is_first_process():
                write_facts(Path(self.output), {**read_facts(Path(self.output)), DIVERGED: str(error)})
            return str(error)


def failure_of(trial: Path) -> str:
    """Why a trial has no loss."""
    said = read_facts(trial).get(DIVERGED) if trial.is_dir() else None
    return said if isinstance(said, str) else "it did not finish"


def is_decided(trial: Path) -> bool:
    """Whether a trial has ended, with a loss or diverged."""
    return is_finished(trial) or (trial.is_dir() and DIVERGED in read_facts(trial))


@dataclass(frozen=True, kw_only=True)
class MeasureUnit(Unit):
    """Measures a run.

    Attributes:
        baselines: the runs to compare with, one after another; None: no baseline.
    """

    stage: ClassVar[str] = "measure"
    accelerated: ClassVar[bool] = True
    imports: ClassVar[tuple[str, ...]] = ("hf_lowrank.measuring.runner",)
    run: str
    baselines: list[str | None]
    keywords: dict[str, Any] = field(repr=False)

    def outputs(self) -> list[Path]:
        return [Path(self.run) / MEASUREMENTS]

    def is_current(self) -> bool:
        from hf_lowrank.measuring import unmeasured

        keywords = {key: value for key, value in self.keywords.items() if key != "device"}
        try:
            keywords["evaluation_set"] = self._evaluation_set()
            return not any(unmeasured(self.run, baseline=other, **keywords) for other in self.baselines)
        except (ValueError, OSError):  # `perform` reports it
            return False

    def perform(self) -> str | None:
        from hf_lowrank.measuring import measure

        keywords = {**self.keywords, "evaluation_set": self._evaluation_set()}
        for other in self.baselines:
            measure(self.run, baseline=other, **keywords)
        return None

    def _evaluation_set(self) -> EvaluationSet | None:
        given = self.keywords.get("evaluation_set")
        return None if given is None else evaluation_of(given, Trajectory(self.run))


@dataclass(frozen=True, kw_only=True)
class PairsUnit(MeasureUnit):
    """Measures the barriers between a run and other members' runs."""


@dataclass(frozen=True, kw_only=True)
class EvaluateUnit(Unit):
    """Scores a run downstream; `keywords` are further arguments of `evaluate`."""

    stage: ClassVar[str] = "evaluate"
    accelerated: ClassVar[bool] = True
    imports: ClassVar[tuple[str, ...]] = (
        "hf_lowrank.downstream.runner",
        "hf_lowrank.downstream.lm_eval_model",
        "lm_eval.evaluator",
    )
    run: str
    keywords: dict[str, Any] = field(repr=False)

    def outputs(self) -> list[Path]:
        return [Path(self.run) / SCORES]

    def is_current(self) -> bool:
        try:
            return not self._unscored()
        except (ValueError, OSError):  # `perform` reports it
            return False

    def perform(self) -> str | None:
        from hf_lowrank.downstream import evaluate

        lines: list[str] = []

        def warn(line: str) -> None:
            print(line, flush=True)  # noqa: T201
            lines.append(line)

        evaluate(self.run, warn=warn, **self.keywords)
        left = self._unscored() if self.outputs()[0].is_file() else [(0, "every task")]
        if left:
            step, task = left[0]
            raise UserError(lines[0].replace(f"{self.name}: ", "") if lines else f"no score for {task} at step {step}")
        return lines[0] if lines else None

    def _unscored(self) -> list[tuple[int, str]]:
        from hf_lowrank.downstream.runner import unscored

        return unscored(self.run, **{key: self.keywords[key] for key in ("tasks", "steps", "limit")})


@dataclass(frozen=True, kw_only=True)
class ResultUnit(Unit):
    """Computes a result of the whole study in the directory `output` from the tables of its runs.

    Attributes:
        result: the file that it writes, relative to `output`.
    """

    result: ClassVar[str]
    runs: list[str]
    output: str

    def outputs(self) -> list[Path]:
        return [Path(self.output) / self.result]

    def is_current(self) -> bool:
        """Whether the result is intact and was computed from the present inputs."""
        try:
            unsealed(parse_json(self.outputs()[0].read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError):
            return False
        return read_stamps(Path(self.output)).get(self.stage) == self.stamp()

    def perform(self) -> str | None:
        stamp = self.stamp()
        note = self.compute()
        directory = Path(self.output)
        write_text(directory / STAMPS, json.dumps({**read_stamps(directory), self.stage: stamp}))
        return note

    @abstractmethod
    def compute(self) -> str | None: ...

    def stamp(self) -> str:
        """A fingerprint of the inputs, hex."""
        digest = hashlib.sha256(version("hf-lowrank").encode())
        asked = {key: value for key, value in asdict(self).items() if key not in ("name", "runs", "output")}
        asked |= {"kind": self.stage, "names": [Path(run).name for run in self.runs]}
        digest.update(json.dumps(asked, sort_keys=True).encode())
        for file in [Path(run) / name for run in self.runs for name in (MEASUREMENTS, SCORES)] + self.further_inputs():
            digest.update(file.read_bytes() if file.is_file() else b"-")
        return digest.hexdigest()

    def further_inputs(self) -> list[Path]:
        return []


@dataclass(frozen=True, kw_only=True)
class PredictUnit(ResultUnit):
    """Predicts downstream scores; `members` are those of each run, `keywords` arguments of `predict`."""

    stage: ClassVar[str] = "predict"
    result: ClassVar[str] = PREDICTION
    members: list[str]
    keywords: dict[str, Any] = field(repr=False)

    def compute(self) -> str | None:
        from hf_lowrank.downstream import predict

        # The result names its runs by their paths within the study, which may be moved.
        directory = Path(self.output).resolve()
        runs = [os.path.relpath(Path(run).resolve(), directory) for run in self.runs]
        with chdir(directory):
            prediction = predict(runs, methods=self.members, output=directory, **self.keywords)
        return prediction.notes[0] if prediction.notes else None


@dataclass(frozen=True, kw_only=True)
class ClaimsUnit(ResultUnit):
    """Tests the paper's claims; `members` and `seeds` are those of each run."""

    stage: ClassVar[str] = "claims"
    result: ClassVar[str] = CLAIMS
    baseline: str
    members: list[str]
    seeds: list[int]

    def further_inputs(self) -> list[Path]:
        return [Path(self.output) / PREDICTION]

    def compute(self) -> str | None:
        from hf_lowrank.claims import examine, write_claims

        prediction = next((file for file in self.further_inputs() if file.is_file()), None)
        asked: Any = {"baseline": self.baseline, "methods": self.members, "seeds": self.seeds}
        write_claims(examine(self.runs, prediction=prediction, **asked), self.outputs()[0])
        return None


@dataclass(frozen=True, kw_only=True)
class ReportUnit(ResultUnit):
    """Writes the page, always anew."""

    stage: ClassVar[str] = "report"
    imports: ClassVar[tuple[str, ...]] = ("hf_lowrank.report", "matplotlib.figure")
    result: ClassVar[str] = "report/report.html"

    def is_current(self) -> bool:
        return False

    def perform(self) -> str | None:
        return self.compute()

    def compute(self) -> str | None:
        from hf_lowrank.report import write_report

        write_report(self.runs, self.outputs()[0].parent, study=self.output)
        return None


def read_stamps(directory: Path) -> dict[str, str]:
    """Fingerprints of the results' inputs, by stage; empty if the file is missing or unreadable."""
    try:
        stamps = parse_json((directory / STAMPS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def evaluation_of(given: str, trajectory: Trajectory) -> EvaluationSet:
    """The sequences in a safetensors file or folder, or cut from a text by the trajectory's tokenizer."""
    from hf_lowrank.downstream.sources import context_length
    from hf_lowrank.runs.selection import SEQUENCE_LENGTH, evaluation_set_from_text

    path = Path(given)
    if path.is_dir() or path.suffix == ".safetensors":
        return EvaluationSet.load(path)
    return evaluation_set_from_text(path, trajectory, min(SEQUENCE_LENGTH, context_length(trajectory)))
