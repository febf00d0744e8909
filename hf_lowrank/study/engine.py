"""Runs a study: stage by stage, each unit in a process, skipping finished work."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from hf_lowrank.claims.results import FAILURES, Failure
from hf_lowrank.errors import UserError
from hf_lowrank.storage.checksums import sealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.locks import locked
from hf_lowrank.storage.parsing import dump_yaml
from hf_lowrank.study.checks import chosen_stages, prepare
from hf_lowrank.study.executors import Executor, ForkExecutor, WorkerExecutor
from hf_lowrank.study.layout import Study
from hf_lowrank.study.plan import Plan, make_plan, write_timings
from hf_lowrank.study.progress import Progress, Say
from hf_lowrank.study.spec import StudyFile, load_study
from hf_lowrank.study.stages import STAGE_TABLE
from hf_lowrank.study.units import ReportUnit, Unit

logger = logging.getLogger(__name__)

LOCK_SECONDS = 5.0  # how long the last processes of a killed study may take to end


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a call of `run_study` left.

    Attributes:
        directory: the study's.
        plan: what there was to do.
        failures: the units that failed.
        page: the report; None if none was written.
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
    """Runs the unfinished work of a study file: sweep, train, measure, evaluate, predict, claims, report.

    After any interruption the next call resumes, with the same results as an uninterrupted one. A unit that fails
    stops no other; it is reported in the result and in `failures.json`, and retried by the next call.

    Args:
        path: the study file.
        output: the study's directory; default: `runs/NAME`.
        stages: the stages to run, a list or comma-separated; default: all that the study has.
        dry_run: only plan; nothing is written.
        jobs: units in parallel; default: the file's, else one per accelerator, else one.
        threads: CPU threads per unit; default: the file's, else the cores divided by `jobs`.
        say: receives a line for everything that a reader should know; default: the log.
        show_plan: receives the plan before anything runs.
        stream: a terminal for a progress line that is redrawn.
        fork_here: forks units from this process rather than from a server process. Saves the server's start, which
            takes seconds, for callers that have not computed with several threads yet.

    Raises:
        UserError: the study is invalid; found before anything runs, and nothing is written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a study starts its own processes; start it once, without torchrun or accelerate launch")
    file = load_study(path)
    directory = Path(output) if output is not None else Path("runs") / file.settings.name
    names, by_name = chosen_stages(file, stages)
    jobs, threads, devices = _resources(file, jobs, threads)
    study = prepare(file, directory, names, named=by_name)
    plan = make_plan(study, names, jobs, threads)
    if show_plan is not None:
        show_plan(plan)
    if dry_run:
        return StudyResult(directory=directory, plan=plan)
    with locked(directory, "study", wait=LOCK_SECONDS) as handle:
        resolved = file.settings.model_dump(mode="json", by_alias=True, exclude_unset=True)
        write_text(directory / "study.yaml", dump_yaml(resolved))
        inherited = () if handle is None else (handle,)
        forks = devices is None and hasattr(os, "fork") and os.uname().sysname == "Linux"
        executor: Executor = (
            ForkExecutor(threads) if fork_here else WorkerExecutor(threads, inherited, devices or (), fork=forks)
        )
        progress = Progress(plan.estimates, jobs, say or logger.info, stream)
        engine = _Engine(study, executor, jobs, progress, say or logger.info)
        try:
            engine.run(names)
        finally:
            progress.clear()
            executor.stop()
            write_timings(directory, progress.seconds)
            engine.write_failures()
    page = directory / ReportUnit.result
    written = "report" in names and not any(failure.stage == "report" for failure in engine.failures)
    return StudyResult(
        directory=directory,
        plan=plan,
        failures=engine.failures,
        page=page if written and page.is_file() else None,
        runs=[run.folder for run in study.trained_runs()],
    )


class _Engine:
    def __init__(self, study: Study, executor: Executor, jobs: int, progress: Progress, say: Say) -> None:
        self.study, self.executor, self.jobs, self.progress, self.say = study, executor, jobs, progress, say
        self.failures: list[Failure] = []
        self.reported: set[str] = set()

    def run(self, names: Sequence[str]) -> None:
        for name in names:
            self.write_failures()  # the report shows them
            stage, runs = STAGE_TABLE[name], self.study.trained_runs()
            reason = self.study.skipped.get(name) or stage.obstacle(self.study, runs)
            if reason is not None:
                self.say(f"skipped {name}: {reason}")
                for unit in stage.batches[-1](self.study, runs):
                    self.progress.skip(unit.key)
                continue
            if stage.uses_runs:
                self._report_untrained()
            for batch in stage.batches:
                self._execute(batch(self.study, runs))
            self.study, lines = stage.finish(self.study)
            for line in lines:
                self.say(line)

    def _report_untrained(self) -> None:
        """Names the runs that are missing because they are not trained, each once."""
        trained, failed = set(self.study.trained_runs()), {failure.what for failure in self.failures}
        missing = [run.name for run in self.study.runs if run not in trained]
        missing = [name for name in missing if name not in failed | self.reported]
        if missing:
            self.reported.update(missing)
            self.say(f"skipped, not trained: {', '.join(missing)}")

    def _execute(self, units: Sequence[Unit]) -> None:
        """Performs the units that are not done, `jobs` at a time."""
        queue = []
        for unit in units:
            if unit.is_done():
                self.progress.skip(unit.key)
            else:
                queue.append(unit)
        self.progress.add(unit.key for unit in queue)
        running: dict[str, tuple[Unit, int]] = {}
        free = list(range(self.jobs))
        while queue or running:
            while queue and free:
                unit, slot = queue.pop(0), free.pop(0)
                running[unit.key] = (unit, slot)
                self.progress.start(unit.key)
                log = self.study.directory / "logs" / unit.stage / f"{unit.name.replace(' ', '-')}.log"
                self.executor.start(unit, log, slot)
            for outcome in self.executor.wait(0.5):
                unit, slot = running.pop(outcome.key)
                free.append(slot)
                if outcome.reason is not None:
                    self.failures.append(Failure(what=unit.name, stage=unit.stage, reason=outcome.reason))
                self.progress.end(unit.key, outcome.reason, outcome.note)
            self.progress.show()

    def write_failures(self) -> None:
        """Writes failures.json, or removes it if nothing failed."""
        path = self.study.directory / FAILURES
        if self.failures:
            write_text(path, json.dumps([sealed(vars(failure)) for failure in self.failures], indent=1) + "\n")
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _resources(file: StudyFile, jobs: int | None, threads: int | None) -> tuple[int, int, tuple[str, ...] | None]:
    """(units in parallel, threads per unit, accelerators to assign); None without an accelerator, () with only one."""
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
