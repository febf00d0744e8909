"""Runs a study: stage by stage, each unit in a process, skipping finished work, and saying how far it is."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from hf_lowrank.claims.results import FAILURES, Failure
from hf_lowrank.errors import UserError
from hf_lowrank.formats import duration
from hf_lowrank.storage.checksums import sealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.locks import locked
from hf_lowrank.storage.parsing import dump_yaml
from hf_lowrank.study.checks import chosen_stages, prepare
from hf_lowrank.study.cluster import RayExecutor
from hf_lowrank.study.executors import Executor, ForkExecutor, WorkerExecutor
from hf_lowrank.study.layout import Study
from hf_lowrank.study.plan import Plan, make_plan, write_timings
from hf_lowrank.study.spec import StudyFile, load_study
from hf_lowrank.study.stages import STAGE_TABLE
from hf_lowrank.study.units import ReportUnit, Unit

logger = logging.getLogger(__name__)

Say = Callable[[str], None]

LOCK_SECONDS = 5.0  # how long the last processes of a killed study may take to end


class Progress:
    """Counts finished units, and predicts the time left from what units of each stage took or are estimated to take.

    Args:
        estimates: seconds of each planned unit, by key; None if unknown.
        jobs: units in parallel.
        say: receives whole lines.
        stream: a terminal for the line that is redrawn; None: plain lines only.

    Attributes:
        seconds: what each finished unit took, by key.
    """

    def __init__(
        self, estimates: Mapping[str, float | None], jobs: int, say: Say, stream: TextIO | None = None
    ) -> None:
        self._left, self._jobs, self._say, self._stream = dict(estimates), jobs, say, stream
        self._planned = set(estimates)
        self._done = 0
        self._started: dict[str, float] = {}
        self._ratios: dict[str, list[float]] = {}
        self._taken: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}

    def add(self, keys: Iterable[str]) -> None:
        """Adds units that were not planned; planned ones are known."""
        new = [key for key in keys if key not in self._planned]
        self._left |= dict.fromkeys(new)
        self._planned.update(new)

    def skip(self, key: str) -> None:
        """Removes a unit that need not run."""
        self._left.pop(key, None)

    def start(self, key: str) -> None:
        self._left.setdefault(key, None)
        self._started[key] = time.monotonic()
        self.show()

    def end(self, key: str, reason: str | None, note: str | None = None) -> None:
        estimate, stage = self._left.pop(key, None), key.split(" ", maxsplit=1)[0]
        seconds = time.monotonic() - self._started.pop(key)
        self._done += 1
        if reason is None:
            self.seconds[key] = round(seconds, 2)
            self._taken.setdefault(stage, []).append(seconds)
            if estimate:
                self._ratios.setdefault(stage, []).append(seconds / estimate)
        how = f"failed: {reason}" if reason else f"done in {duration(seconds)}" + (f" ({note})" if note else "")
        left = self.seconds_left()
        rest = "" if left is None or not self._left else f"; {duration(left)} left"
        self.say(f"{self._count()} {key}: {how}{rest}")

    def say(self, line: str) -> None:
        """Says a line above the progress line."""
        self.clear()
        self._say(line)
        self.show()

    def _count(self) -> str:
        return f"[{self._done}/{self._done + len(self._left)}]"

    def seconds_left(self) -> float | None:
        """Until all units are done, `jobs` in parallel; None if nothing is known."""
        total, known = 0.0, False
        for key, estimate in self._left.items():
            stage = key.split(" ")[0]
            ratios, taken = self._ratios.get(stage), self._taken.get(stage)
            if estimate is not None and ratios:
                whole = estimate * sum(ratios) / len(ratios)
            elif taken or estimate is not None:
                whole = sum(taken) / len(taken) if taken else estimate or 0.0
            else:
                continue
            known = True
            spent = time.monotonic() - self._started[key] if key in self._started else 0.0
            total += max(whole - spent, 0.0)
        return total / self._jobs if known else None

    def show(self) -> None:
        """Draws the progress line."""
        if self._stream is None or not self._started:
            return
        left = self.seconds_left()
        rest = "" if left is None else f", {duration(left)} left"
        line = f"{self._count()} {', '.join(self._started)}{rest}"
        self._stream.write(f"\r\x1b[K{line[:118]}")
        self._stream.flush()

    def clear(self) -> None:
        """Removes the progress line."""
        if self._stream is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a call of `run_study` left: the units that failed, the report if it was written, the runs that it shows."""

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
    ray: str | None = None,
) -> StudyResult:
    """Runs the unfinished work of a study file: sweep, train, measure, evaluate, predict, claims, report.

    After any interruption the next call resumes, with the same results as an uninterrupted one. A unit that fails
    stops no other; it is reported in the result and in `failures.json`, and retried by the next call.

    Args:
        path: the study file.
        output: the study's directory; default: `runs/NAME`.
        stages: the stages to run, a list or comma-separated; default: all that the study has.
        dry_run: only plan; nothing is written.
        jobs: units in parallel; default: the file's, else one per accelerator, else one, on a cluster one per node.
        threads: CPU threads per process of a unit; default: the file's, else the cores divided by `jobs`.
        say: receives a line for everything that a reader should know; default: the log.
        show_plan: receives the plan before anything runs.
        stream: a terminal for a progress line that is redrawn.
        fork_here: forks units from this process rather than from a server process. Saves the server's start, which
            takes seconds, for callers that have not computed with several threads yet.
        ray: the address of a Ray cluster that runs the units, `auto` or `HOST:PORT`; this machine must be one of its
            nodes, and all nodes must see the study's directory. Default: processes of this machine run them.

    Raises:
        UserError: the study is invalid, or the cluster cannot run it; found before anything runs, and nothing is
            written. Or the connection to the cluster was lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a study starts its own processes; start it once, without torchrun or accelerate launch")
    # The nodes of a cluster have working directories of their own.
    file = load_study(path if ray is None else Path(path).absolute())
    directory = Path(output) if output is not None else Path("runs") / file.settings.name
    directory = directory if ray is None else directory.absolute()
    names, by_name = chosen_stages(file, stages)
    for option, value in (("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, got {value}")
    study = prepare(file, directory, names, named=by_name)
    with ExitStack() as stack:
        devices: tuple[str, ...] | None = None
        cluster = None if ray is None else RayExecutor(ray)
        if cluster is None:
            jobs, threads, devices = _resources(file, jobs, threads)
        else:
            stack.callback(cluster.stop)
            jobs, threads = cluster.resources(file, jobs, threads)
        plan = make_plan(study, names, jobs, threads)
        if show_plan is not None:
            show_plan(plan)
        if dry_run:
            return StudyResult(directory=directory, plan=plan)
        stack.callback(_remove_if_empty, directory)
        handle = stack.enter_context(locked(directory, "study", wait=LOCK_SECONDS))
        progress = Progress(plan.estimates, jobs, say or logger.info, stream)
        if cluster is not None:
            cluster.check(directory, _inputs(file))
            cluster.say = progress.say
        resolved = file.settings.model_dump(mode="json", by_alias=True, exclude_unset=True)
        write_text(directory / "study.yaml", dump_yaml(resolved))
        inherited = () if handle is None else (handle,)
        forks = devices is None and hasattr(os, "fork") and os.uname().sysname == "Linux"
        executor: Executor = cluster or (
            ForkExecutor(threads) if fork_here else WorkerExecutor(threads, inherited, devices or (), fork=forks)
        )
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
        trained, known = set(self.study.trained_runs()), {failure.what for failure in self.failures} | self.reported
        missing = [run.name for run in self.study.runs if run not in trained and run.name not in known]
        if missing:
            self.reported.update(missing)
            self.say(f"skipped, not trained: {', '.join(missing)}")

    def _execute(self, units: Sequence[Unit]) -> None:
        """Performs the units that are not done, `jobs` processes at a time."""
        done = {unit.key for unit in units if unit.is_done()}
        for key in done:
            self.progress.skip(key)
        queue = [unit for unit in units if unit.key not in done]
        self.progress.add(unit.key for unit in queue)
        running: dict[str, tuple[Unit, list[int]]] = {}
        free = list(range(self.jobs))
        while queue or running:
            while queue and len(free) >= (count := min(queue[0].process_count, self.jobs)):
                unit, slots = queue.pop(0), free[:count]
                del free[:count]
                running[unit.key] = (unit, slots)
                self.progress.start(unit.key)
                log = self.study.directory / "logs" / unit.stage / f"{unit.name.replace(' ', '-')}.log"
                self.executor.start(unit, log, *slots)
            for outcome in self.executor.wait(0.5):
                unit, slots = running.pop(outcome.key)
                free.extend(slots)
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
    """(units in parallel, threads per unit, accelerators to assign); None without an accelerator, () with only one.

    Raises:
        UserError: a member has more processes than this machine has accelerators, or cores without any.
    """
    import torch

    devices: tuple[str, ...] | None = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most, what = cores, "cores"
    if torch.accelerator.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        count = torch.accelerator.device_count()
        devices = tuple(visible) if visible != [""] else tuple(str(number) for number in range(count))
        devices = devices if count > 1 else ()
        most, what = max(1, len(devices)), "accelerators"
    for name, member in file.settings.members.items():
        if member.processes > most:
            raise file.fault(
                f"members.{name}.processes",
                f"must be at most {most}, the {what} of this machine, got {member.processes}",
            )
    jobs = jobs or file.settings.jobs or (len(devices) if devices else 1)
    return jobs, threads or file.settings.threads or max(1, cores // jobs), devices


def _inputs(file: StudyFile) -> list[str]:
    """The files and folders that a study file names and its units read."""
    settings = file.settings
    members = settings.members.values()
    paths = [member.recipe for member in members if member.recipe is not None]
    paths += [run for member in members for run in member.runs or () if os.path.isdir(run)]
    given = (settings.evaluation_text, settings.measure.evaluation_set, settings.measure.settings)
    return paths + [path for path in given if isinstance(path, str)]


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
