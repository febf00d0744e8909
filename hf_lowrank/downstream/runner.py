"""Scoring every checkpoint of every run on every task, each once.

What lm-eval draws (few-shot examples, sampled answers) is drawn with its own default seeds, anew for every checkpoint
and task, so all checkpoints of all runs see the same prompts in whatever process. The uncertainty that rows report is
that of the choice of items, by the bootstrap.
"""

import hashlib
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_lowrank.downstream.catalogue import OFFLINE, OWN, expand_tasks, manager, wanted_tasks
from hf_lowrank.downstream.items import items_for
from hf_lowrank.downstream.results import group_rows, item_scores, task_rows
from hf_lowrank.downstream.sources import load_tokenizer
from hf_lowrank.errors import UserError
from hf_lowrank.processes.launch import RECOVERABLE_ERRORS, Launch, error_line
from hf_lowrank.processes.placement import Placement
from hf_lowrank.processes.work import Progress, SharedTables, run_units
from hf_lowrank.runs.layout import EVALUATION_SET, SCORES
from hf_lowrank.runs.scores import Score, append_scores, item_file, read_item_scores, read_scores, write_item_scores
from hf_lowrank.runs.selection import (
    Run,
    check_rows_belong,
    check_separate_tables,
    is_current,
    open_run,
    open_runs,
    steps_of,
    table_of,
)
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.runs.weights import positions_of
from hf_lowrank.storage.locks import all_locked

logger = logging.getLogger(__name__)

Warn = Callable[[str], None]


class Unit(NamedTuple):
    """One task of one checkpoint."""

    run: int  # index among the runs
    step: int
    task: str


class LoadedTask(NamedTuple):
    """A task or group, loaded once for all checkpoints of a run."""

    name: str  # as requested
    loaded: dict[str, Any]  # what lm-eval's task manager returned
    items: str  # fingerprint of the items


def evaluate(
    runs: Run | Sequence[Run],
    *,
    tasks: str | Iterable[str] | None = None,
    steps: str | int | Iterable[int] | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    output: str | os.PathLike[str] | None = None,
    revisions: str | None = None,
    warn: Warn | None = None,
    progress: bool = False,
) -> list[Score]:
    """Scores checkpoints of runs and returns all their rows; skips what has been scored.

    Rows go to `downstream.jsonl` in each run directory, scores of single items to `downstream/step-N/TASK.jsonl`.
    Under `accelerate launch` the processes split the tasks of all checkpoints; of a remainder they split the items.
    Every process returns all rows.

    Args:
        runs: run directories, folders of checkpoints, `user/repo` or `user/repo@revision`, or trajectories.
        tasks: names of tasks and groups of lm-eval and of this package, a list or comma-separated; None: the four
            that need no network.
        steps: "all", "last" or numbers; None: all.
        limit: scores only the first items of each task, for trials.
        batch_size: sequences per batch; None: chosen by context length, vocabulary and device.
        device: where models are evaluated; None: accelerate's choice for this process.
        output: a folder for the tables, with a subfolder for each run; None: the run directories.
        revisions: which revisions of a repository are checkpoints, as a pattern.
        warn: gets a line for everything that cannot be done (unknown task, no network, no tokenizer, items that do not
            fit); None: a warning in the log. Other work is not affected.
        progress: shows tasks done and time left on stderr.

    Raises:
        UserError: a run is unusable, no task is known, a number is below 1, a table cannot be written, or a process
            was lost (finished rows are saved).
    """
    for name, count in (("limit", limit), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise UserError(f"{name} must be at least 1, got {count}")
    warn = warn or logger.warning
    trajectories = open_runs(runs, "evaluate", revisions)
    names, problems = expand_tasks(wanted_tasks(tasks))
    if not names:
        raise UserError("; ".join(problems))
    launch = Launch(device)
    for problem in problems if launch.is_first else ():
        warn(problem)
    chosen = [steps_of(trajectory, steps) for trajectory in trajectories]
    files = [table_of(trajectory, output, SCORES) for trajectory in trajectories]
    check_separate_tables(trajectories, files)
    tables = SharedTables(launch, files, read_scores, append_scores)
    with all_locked([file.parent for file in files], "evaluate"), _quiet_lm_eval():
        tables.merge()
        saved = [_SavedScores(run, file, limit) for run, file in zip(trajectories, files, strict=True)]
        for scores in saved:
            check_rows_belong(scores.trajectory, scores.table, scores.rows)
        units = launch.from_first(
            lambda: [
                Unit(index, step, name)
                for index, (scores, steps_of_run) in enumerate(zip(saved, chosen, strict=True))
                for step, name in scores.missing(steps_of_run, names)
            ]
        )
        with Progress("task", progress and launch.is_first) as bar:
            runners = [
                _Runner(scores, tables.part(scores.table), batch_size, launch.device, warn, bar) for scores in saved
            ]

            def work(some: Sequence[Unit], placement: Placement, writes: bool) -> None:
                for index, runner in enumerate(runners):
                    by_step: dict[int, list[str]] = {}
                    for unit in some:
                        if unit.run == index:
                            by_step.setdefault(unit.step, []).append(unit.task)
                    runner.run(by_step, placement, writes)

            placement = Placement(launch.device)
            run_units(units, work, tables, placement, bar, cost=lambda _: 1, activity="evaluating")
    return tables.rows()


def unscored(run: Run, *, tasks: Any = None, steps: Any = None, limit: int | None = None) -> list[tuple[int, str]]:
    """The (step, task) pairs that `evaluate` with these arguments would score; loads no model."""
    trajectory = open_run(run)
    names, _ = expand_tasks(wanted_tasks(tasks))
    scores = _SavedScores(trajectory, table_of(trajectory, None, SCORES), limit)
    return scores.missing(steps_of(trajectory, steps), names)


def requested_scores(
    runs: Sequence[Trajectory],
    *,
    output: str | Path | None = None,
    tasks: Any = None,
    steps: Any = None,
    limit: int | None = None,
) -> tuple[list[Score], list[str]]:
    """The saved scores of what `evaluate` with these arguments scores, and what has none, as `run@step task`."""
    names, missing = expand_tasks(wanted_tasks(tasks))
    runs_of_name = Counter(run.run.name for run in runs)
    found: list[Score] = []
    for run in sorted(runs, key=lambda run: run.run.name):
        scores = _SavedScores(run, table_of(run, output, SCORES), limit)
        label = run.run.name if runs_of_name[run.run.name] == 1 else run.path
        for step in steps_of(run, steps):
            for name in sorted(names):
                rows = scores.of(step, name)
                found += [row for row in rows if row not in found]
                missing += [] if rows else [f"{label}@{step} {name}"]
    return found, missing


class _SavedScores:
    """The scores of a run that are saved already, as far as they were made with the same limit."""

    def __init__(self, trajectory: Trajectory, table: Path, limit: int | None) -> None:
        self.trajectory, self.table, self.limit = trajectory, table, limit
        self.rows = read_scores(table)

    def missing(self, steps: Sequence[int], names: Sequence[str]) -> list[tuple[int, str]]:
        """The (step, task) pairs without a score."""
        return [(step, name) for step in steps for name in names if not self._is_done(step, name)]

    def of(self, step: int, name: str) -> list[Score]:
        """The valid rows of a task or a group at a step: of the present checkpoint, scored with the same limit and
        version of lm-eval, and, for this package's tasks, on the items that the run would give now."""
        import lm_eval

        rows = [
            row
            for row in self.rows
            if row.step == step and name in (row.task, row.group) and row.limit == self.limit
            and row.lm_eval_version == lm_eval.__version__ and is_current(row, self.trajectory)
            and self._has_items(row)
        ]  # fmt: skip
        if name in OFFLINE and rows:
            with suppress(UserError):  # items that cannot be made again are taken for the same
                items = own_items(self.trajectory, name)
                return [row for row in rows if row.items == items]
        return rows

    def _is_done(self, step: int, name: str) -> bool:
        if not self.of(step, name):
            return False
        try:
            return name not in OFFLINE or bool(own_items(self.trajectory, name))
        except UserError:
            return False  # loading the task reports the same error

    def _has_items(self, row: Score) -> bool:
        """Whether the scores of the single items are saved and readable; a group's mean has none."""
        if any(other.group == row.task for other in self.rows):
            return True
        try:
            return len(read_item_scores(item_file(self.table, row.step, row.task))) >= row.n
        except UserError:
            return False


def own_items(trajectory: Trajectory, task: str) -> str:
    """Fingerprint of a run's items for one of this package's tasks."""
    return items_for(trajectory, task).parent.name.rpartition("-")[2][:16]


class _Runner:
    """Scores checkpoints of one run; its tokenizer, tasks and encodings are made once.

    Rows go to `part`, a file of this process; the other arguments are those of `evaluate`.
    """

    def __init__(
        self,
        saved: _SavedScores,
        part: Path,
        batch_size: int | None,
        device: torch.device,
        warn: Warn,
        progress: Progress,
    ) -> None:
        self.trajectory, self.table, self.limit = saved.trajectory, saved.table, saved.limit
        self.part, self.batch_size, self.device = part, batch_size, device
        self.warn, self.progress = warn, progress
        self.placement, self.writes = Placement(device), True
        self.lm: Any = None
        self._loaded: dict[str, LoadedTask | UserError] = {}
        self._warned: set[str] = set()

    def run(self, names_by_step: Mapping[int, Sequence[str]], placement: Placement, writes: bool) -> None:
        """Scores tasks by step; of processes with a joint placement only one writes and reports."""
        self.placement, self.writes = placement, writes
        if self.lm is not None:
            self.lm.replicas = placement.replicas
        wanted = Counter(name for names in names_by_step.values() for name in names)
        tasks = {name: task for name, count in wanted.items() if (task := self._load(name, count))}
        for step, names in names_by_step.items():
            loaded = [tasks[name] for name in names if name in tasks]
            if loaded and self._load_checkpoint(step, len(loaded)):
                for task in loaded:
                    self.progress.start(f"{self.trajectory.run.name} {step} {task.name}", 1)
                    self._score(step, task)
                    self.progress.tick()

    def _load(self, name: str, count: int) -> LoadedTask | None:
        """The task; None, with a reported reason, if it cannot be loaded for its `count` checkpoints."""
        load = partial(self._loaded_task, name)
        try:
            with _lm_eval_seeds(self.device):
                self._loaded[name] = task = self.placement.synchronized(load, independent=True)
            return task
        except UserError as error:
            self._loaded.setdefault(name, error)
            self._warn_once(self.trajectory.run.name, str(error))
            self.progress.start(name, count)
            return None

    def _loaded_task(self, name: str) -> LoadedTask:
        known = self._loaded.get(name)
        if isinstance(known, LoadedTask):
            return known
        if known is not None:
            raise UserError(str(known))
        metadata = {"run": self.trajectory} if name in OWN else None
        try:
            loaded = manager(own_only=name in OWN, metadata=metadata).load([name])
            items = own_items(self.trajectory, name) if name in OFFLINE else _fingerprint(loaded)
            return LoadedTask(name, loaded, items)
        except RECOVERABLE_ERRORS as error:
            raise UserError(_load_error(name, error)) from None

    def _warn_once(self, subject: str, line: str) -> None:
        """Warns with a line that begins with its subject, unless it has done so before."""
        line = line if line.startswith(subject) else f"{subject}: {line}"
        if line not in self._warned:
            self._warned.add(line)
            self._warn(line)

    def _warn(self, line: str) -> None:
        (self.warn if self.writes else logger.debug)(line)

    def _load_checkpoint(self, step: int, tasks: int) -> bool:
        """Whether the checkpoint's model could be loaded for its `tasks` tasks."""
        try:
            self.placement.synchronized(partial(self._load_model, step), independent=True)
        except RECOVERABLE_ERRORS as error:
            self._warn_once(self.trajectory.where(step), error_line(error))
            self.progress.start(self.trajectory.run.name, tasks)
            return False
        return True

    def _load_model(self, step: int) -> None:
        from hf_lowrank.downstream.lm_eval_model import LowRankLM

        model: Any = self.trajectory.model(step)
        tokenizer = load_tokenizer(self.trajectory, step)
        if self.lm is not None and self.lm.tokenizer.get_vocab() == tokenizer.get_vocab():
            self.lm.replace_model(model)
            return
        sequences = self.trajectory.extra(EVALUATION_SET)
        self.lm = LowRankLM(
            model.to(self.device),
            tokenizer=tokenizer,
            evaluation_set=str(sequences) if sequences else None,
            batch_size=self.batch_size or _batch_size(model, self.device),
            show_progress=False,
        )
        self.lm.replicas = self.placement.replicas

    def _score(self, step: int, task: LoadedTask) -> None:
        from lm_eval.evaluator import evaluate as lm_evaluate

        self.lm.truncated_items = self.lm.scored_items = 0
        subject = f"{self.trajectory.where(step)}: {task.name}"
        try:
            with _lm_eval_seeds(self.device, task.loaded["tasks"].values()):
                results = self.placement.synchronized(
                    lambda: lm_evaluate(self.lm, task.loaded, limit=self.limit, bootstrap_iters=0, log_samples=True)
                )
        except RECOVERABLE_ERRORS as error:
            self._warn_once(subject, error_line(error))
            return
        if self.lm.truncated_items:
            self._warn(
                f"{subject}: {self.lm.truncated_items} of {self.lm.scored_items} requests are longer than the context "
                f"of {self.lm.max_length} tokens and are truncated on the left, as in lm-eval"
            )
        self.placement.synchronized(
            lambda: self._write(step, task, results) if self.writes else None, independent=True
        )

    def _write(self, step: int, task: LoadedTask, results: Mapping[str, Any]) -> None:
        """Writes items before rows, so that a row means that both are complete."""
        import lm_eval

        run = self.trajectory.run
        common = {
            "run": run.name, "method": run.method, "seed": run.seed, "step": step, "items": task.items,
            "limit": self.limit, "cut": self.lm.truncated_items, "lm_eval_version": lm_eval.__version__,
            "checkpoint": self.trajectory.fingerprint(step),
        }  # fmt: skip
        rows: list[Score] = []
        for name, samples in results["samples"].items():
            write_item_scores(item_file(self.table, step, name), item_scores(samples))
            group = task.name if name != task.name else None
            rows.extend(task_rows(name, task.loaded["tasks"][name], samples, {**common, "group": group}))
        if task.name in results.get("groups", {}):
            rows += list(group_rows(task.name, task.loaded["groups"][task.name], results, rows, common))
        append_scores(self.part, rows)


def _fingerprint(loaded: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, task in sorted(loaded["tasks"].items()):
        digest.update(name.encode())
        for doc in task.eval_docs:
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _load_error(name: str, error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"{name}: {error}" if name not in str(error) else str(error)
    network = ("connection", "offline", "couldn't reach", "max retries", "localentrynotfound", "couldn't find")
    text = f"{type(error).__name__} {error}".lower()
    if any(word in text for word in network) or isinstance(error, ConnectionError | FileNotFoundError):
        return f"{name}: its data set is not on this machine and cannot be downloaded: {error_line(error)}"
    return f"{name}: cannot be loaded: {error_line(error)}"


def _batch_size(model: Any, device: torch.device) -> int:
    """As many full-length sequences as give a quarter gigabyte of logits on a CPU, two gigabytes elsewhere."""
    config = model.config.get_text_config()
    words, length = config.vocab_size, positions_of(config) or 1024
    logits = 2**26 if device.type == "cpu" else 2**29
    tokens = min(8192 if device.type == "cpu" else 65536, logits // words)
    return max(1, tokens // length)


@contextmanager
def _lm_eval_seeds(device: torch.device, tasks: Iterable[Any] = ()) -> Iterator[None]:
    """Seeds all generators, and those of tasks with few-shot examples, as lm-eval's command line does, and restores
    the global ones afterwards."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    # Tasks draw from numpy's global generator.
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            for task in tasks:
                task.set_fewshot_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Hides lm-eval's progress bars and all of its log but errors; lines of ours report what matters."""
    import lm_eval.api.task as lm_task
    import tqdm as tqdm_package

    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    bar = lm_task.tqdm
    lm_task.tqdm = lambda items=None, **options: tqdm_package.tqdm(items, **{**options, "disable": True})
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        lm_task.tqdm = bar
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
