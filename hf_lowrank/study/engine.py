"""Runs a study: stage by stage, each unit a process, what is done already never again."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from hf_lowrank.claims.results import FAILURES, Failure
from hf_lowrank.downstream.prediction import FEWEST_RUNS
from hf_lowrank.errors import UserError
from hf_lowrank.runs.layout import MEASUREMENTS, SCORES
from hf_lowrank.storage.checksums import sealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.locks import locked
from hf_lowrank.storage.parsing import dump_yaml
from hf_lowrank.study import units
from hf_lowrank.study.checks import chosen_stages, prepare
from hf_lowrank.study.layout import Study
from hf_lowrank.study.plan import Plan, make_plan, write_timings
from hf_lowrank.study.progress import Progress, Say
from hf_lowrank.study.spec import StudyFile, load_study
from hf_lowrank.study.sweep import chosen_rates, write_sweep
from hf_lowrank.study.workers import Forks, Processes, Server, Workers

logger = logging.getLogger(__name__)

LOCK_SECONDS = 5.0  # how long a killed study's last processes may take to go


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a call left.

    Attributes:
        directory: the study's.
        plan: what was to do.
        failures: what of it failed.
        page: the report; None where none was written.
        runs: the run directories that it shows.
    """

    directory: Path
    plan: Plan
    failures: Sequence[Failure] = field(default=())
    page: Path | None = None
    runs: Sequence[Path] = field(default=())


def run_study(
    path: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    stages: str | Sequence[str] | None = None,
    dry_run: bool = False,
    jobs: int | None = None,
    threads: int | None = None,
    say: Say | None = None,
    show_plan: Callable[[Plan], Any] | None = None,
    stream: TextIO | None = None,
    fork_here: bool = False,
) -> StudyResult:
    """Runs what a study file asks for and is not done yet: sweep, train, measure, evaluate, predict, claims, report.

    A call that was interrupted, however, is continued by the next one, with the same results as an undisturbed one.
    A unit that fails stops no other; it is named in the result and in `failures.json`, and tried again next time.

    Args:
        path: the study file.
        output: the study's directory; None: `runs/NAME`.
        stages: which, a list or comma-separated; None: all that the study has.
        dry_run: only plans; nothing is written.
        jobs: units side by side; None: the file's, else one for each accelerator, else one.
        threads: CPU threads of each; None: the file's, else the cores shared out.
        say: gets a line for everything that a reader should know; None: the log.
        show_plan: gets the plan before anything runs.
        stream: a terminal for a line of progress that changes.
        fork_here: forks units from this process instead of from one of their own; saves the seconds that its start
            takes, for callers that have not computed anything with several threads yet.

    Raises:
        UserError: anything is wrong with the study; found before anything runs, and nothing is written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a study starts its own processes; start it once, without torchrun or accelerate launch")
    file = load_study(path)
    directory = Path(output) if output is not None else Path("runs") / file.settings.name
    names, by_name = chosen_stages(file, stages)
    jobs, threads, devices = _shares(file, jobs, threads)
    study = prepare(file, directory, names, named=by_name)
    plan = make_plan(study, names, jobs, threads)
    if show_plan is not None:
        show_plan(plan)
    if dry_run:
        return StudyResult(directory=directory, plan=plan)
    with locked(directory, "study", wait=LOCK_SECONDS) as handle:
        write_text(directory / "study.yaml", dump_yaml(_plain(file)))
        keep = () if handle is None else (handle,)
        workers: Workers = (
            Forks(threads) if fork_here else Processes(threads, keep, devices) if devices is not None or
            not hasattr(os, "fork") or os.uname().sysname != "Linux" else Server(threads, keep)
        )  # fmt: skip
        progress = Progress(plan.estimates, jobs, say or logger.info, stream)
        engine = _Engine(study, workers, jobs, progress, say or logger.info)
        try:
            engine.run(names)
        finally:
            progress.clear()
            workers.stop()
            write_timings(directory, progress.seconds)
            engine.write_failures()
    page = directory / units.RESULTS["report"]
    written = "report" in names and not any(failure.stage == "report" for failure in engine.failures)
    return StudyResult(
        directory=directory,
        plan=plan,
        failures=engine.failures,
        page=page if written and page.is_file() else None,
        runs=[run.folder for run in study.runs if study.is_trained(run)],
    )


class _Engine:
    def __init__(self, study: Study, workers: Workers, jobs: int, progress: Progress, say: Say) -> None:
        self.study, self.workers, self.jobs, self.progress, self.say = study, workers, jobs, progress, say
        self.failures: list[Failure] = []
        self.named: set[str] = set()

    def run(self, stages: Sequence[str]) -> None:
        self.write_failures()
        for stage in stages:
            if stage in self.study.left_out:
                self.say(f"{stage} is left out: {self.study.left_out[stage]}")
            else:
                getattr(self, f"_{stage}")()

    def _sweep(self) -> None:
        self._do(units.sweep_units(self.study))
        rows = write_sweep(self.study)
        self.study = self.study.with_rates(chosen_rates(self.study.file, self.study.directory))
        for row in rows:
            if row["at_edge"]:
                self.say(
                    f"sweep: {row['member']} is best at {row['learning_rate']:g}, an edge of the rates that were "
                    "tried; a rate beyond may be better"
                )

    def _train(self) -> None:
        lost = {attempt.member for attempt in self.study.attempts} - set(self.study.rates)
        for member in sorted(lost):
            self._fail(member, "train", "no rate of its sweep ended with a finite loss")
        self._do([unit for unit in units.train_units(self.study) if not self._waits(unit, lost)])

    def _waits(self, unit: units.Unit, lost: set[str]) -> bool:
        run = next(run for run in self.study.runs if run.name == unit.name)
        if run.member in lost:
            self.progress.skip(unit.key)
        return run.member in lost

    def _measure(self) -> None:
        self._fetch()
        self._do(units.measure_units(self.study))
        self._do(units.pair_units(self.study))

    def _evaluate(self) -> None:
        self._fetch()
        self._do(units.evaluate_units(self.study))

    def _fetch(self) -> None:
        """Strangers' run directories. What is not trained is named, once."""
        self._do(units.view_units(self.study))
        missing = [run.name for run in self.study.runs if not self.study.is_trained(run)]
        failed = {failure.what for failure in self.failures}
        new = [name for name in missing if name not in failed | self.named]
        if new:
            self.named.update(new)
            self.say(f"left out, for they are not trained: {', '.join(new)}")

    def _predict(self) -> None:
        ready = [
            run for run in self.study.runs
            if all((run.folder / name).is_file() for name in (MEASUREMENTS, SCORES))
        ]  # fmt: skip
        if len(ready) < FEWEST_RUNS:
            self.say(
                f"predict is left out: it needs at least {FEWEST_RUNS} runs with measurements and scores, "
                f"there are {len(ready)}"
            )
            self.progress.skip("predict predict")
            return
        self._do(units.result_units(self.study, "predict"))

    def _claims(self) -> None:
        self._do(units.result_units(self.study, "claims"))

    def _report(self) -> None:
        self.write_failures()
        self._do(units.result_units(self.study, "report"))

    def _do(self, wanted: Sequence[units.Unit]) -> None:
        """Carries out units side by side."""
        for unit in wanted:
            if unit.done:
                self.progress.skip(unit.key)
        queue = [unit for unit in wanted if not unit.done]
        self.progress.more({unit.key: None for unit in queue if unit.key not in self.progress.known})
        running: dict[str, tuple[units.Unit, int]] = {}
        free = list(range(self.jobs))
        while queue or running:
            while queue and free:
                unit, slot = queue.pop(0), free.pop(0)
                running[unit.key] = (unit, slot)
                self.progress.start(unit.key)
                log = self.study.directory / "logs" / unit.stage / f"{unit.name.replace(' ', '-')}.log"
                self.workers.start(unit.key, unit.work, log, slot)
            for outcome in self.workers.wait(0.5):
                unit, slot = running.pop(outcome.key)
                free.append(slot)
                if outcome.reason is not None:
                    self._fail(unit.name, unit.stage, outcome.reason)
                self.progress.end(unit.key, outcome.reason, outcome.note)
            self.progress.show()

    def _fail(self, what: str, stage: str, reason: str) -> None:
        self.failures.append(Failure(what=what, stage=stage, reason=reason))

    def write_failures(self) -> None:
        """Writes failures.json, or takes it away where nothing failed."""
        path = self.study.directory / FAILURES
        if self.failures:
            write_text(path, json.dumps([sealed(vars(failure)) for failure in self.failures], indent=1) + "\n")
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _shares(file: StudyFile, jobs: int | None, threads: int | None) -> tuple[int, int, tuple[str, ...] | None]:
    """Units side by side, threads of each, and the accelerators to share out (None without)."""
    for name, value in (("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    import torch

    devices: tuple[str, ...] | None = None
    if torch.accelerator.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        count = torch.accelerator.device_count()
        devices = tuple(visible) if visible != [""] else tuple(str(number) for number in range(count))
        devices = devices if count > 1 else ()
    jobs = jobs or file.settings.jobs or (len(devices) if devices else 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return jobs, threads or file.settings.threads or max(1, cores // jobs), devices


def _plain(file: StudyFile) -> dict[str, Any]:
    """The study with absolute paths, as study.yaml in its directory says it."""
    return file.settings.model_dump(mode="json", by_alias=True, exclude_unset=True)
