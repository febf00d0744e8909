"""Every checkpoint of every run on every task, each once.

What lm-eval draws (examples in the prompt, sampled answers) is drawn with its own default seeds, anew for every
checkpoint and task: all checkpoints of all runs are asked the same, in whatever process.
The uncertainty that is reported is that of the choice of items, by the bootstrap.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_lowrank.downstream.catalogue import OFFLINE, OWN, manager, units, wanted_tasks
from hf_lowrank.downstream.items import items_for
from hf_lowrank.downstream.results import group_rows, item_scores, task_rows
from hf_lowrank.downstream.sources import load_tokenizer
from hf_lowrank.errors import UserError
from hf_lowrank.measuring.plan import check_apart, check_own, choose_steps, is_of, rows_file
from hf_lowrank.processes.faults import FAULTS, LostProcessError
from hf_lowrank.processes.launch import Processes
from hf_lowrank.processes.placement import OneDevice, Replicas
from hf_lowrank.runs.scores import (
    FILE_NAME,
    Score,
    append_scores,
    item_file,
    read_item_scores,
    read_scores,
    write_item_scores,
)
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.locks import all_locked

logger = logging.getLogger(__name__)

Run = str | os.PathLike[str] | Trajectory
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """One task of one run, loaded once for all checkpoints."""

    name: str
    loaded: dict[str, Any]
    items: str


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
    say: Say | None = None,
    progress: bool = False,
) -> list[Score]:
    """Scores checkpoints of runs and returns all their rows, old and new; what is there is not scored again.

    Rows go to `downstream.jsonl` in each run directory, scores of single items to `downstream/step-N/TASK.jsonl`.
    Under `accelerate launch` the tasks of all checkpoints are shared out over the processes; where they do not go up,
    the items of the rest are. Each process returns all rows.

    Args:
        runs: run directories, folders of checkpoints, `user/repo` or `user/repo@revision`, or trajectories.
        tasks: names of lm-eval's and this package's tasks and groups, a list or comma-separated; None: the four
            that need no network.
        steps: "all", "last" or numbers; None: all.
        limit: only the first so many items of each task, for trying out.
        batch_size: sequences a batch; None: chosen by context length, vocabulary and device.
        device: None: accelerate's choice for this process.
        output: a folder for the tables, a subfolder each run; None: the run directories.
        revisions: which revisions of a repository are checkpoints, as a pattern.
        say: gets a line for everything that cannot be done (unknown task, no network, no tokenizer, items that do not
            fit); None: a warning in the log. The other work goes on.
        progress: shows checkpoints × tasks done on stderr.

    Raises:
        UserError: a run is unusable, no task is known, or a table cannot be written. Also where processes that share
            out items lose one of them: what was scored is written then.
    """
    say = say or logger.warning
    given = [runs] if isinstance(runs, str | os.PathLike | Trajectory) else list(runs)
    if not given:
        raise UserError("there must be at least one run to evaluate")
    trajectories = [run if isinstance(run, Trajectory) else Trajectory(run, revisions=revisions) for run in given]
    names, problems = units(wanted_tasks(tasks))
    if not names:
        raise UserError("; ".join(problems))
    processes = Processes(device)
    for problem in problems if processes.first else ():
        say(problem)
    plans = []
    for trajectory in trajectories:
        try:
            chosen = choose_steps(trajectory.steps, steps, "all")
        except UserError as error:
            raise UserError(f"{trajectory.path}: {error}") from None
        plans.append(
            (trajectory, chosen, rows_file(trajectory, None if output is None else Path(output)).with_name(FILE_NAME))
        )
    from tqdm.auto import tqdm

    tables = [table for _, _, table in plans]
    check_apart(trajectories, tables)
    total = sum(len(chosen) for _, chosen, _ in plans) * len(names)
    bar = tqdm(total=total, unit="task", disable=not (progress and processes.first), delay=2, leave=False)
    with all_locked([table.parent for table in tables], "evaluate"), _quiet_lm_eval(), bar:
        processes.merge_parts(tables, read_scores, append_scores)
        runners = [
            _Runner(trajectory, table, limit, batch_size, processes.device, say, bar.update, processes.part(table))
            for trajectory, _, table in plans
        ]
        for runner in runners:
            check_own(runner.trajectory, runner.table, runner.rows)
        work = processes.of_first(
            lambda: [
                (place, step, name)
                for place, (runner, (_, chosen, _)) in enumerate(zip(runners, plans, strict=True))
                for step, wanted in runner.missing(chosen, names).items()
                for name in wanted
            ]
        )
        whole, rest = processes.rounds(work)
        share = processes.share(whole)
        bar.update(total - len(share) - len(rest))
        _run_all(runners, share)
        if rest:
            processes.merge_parts(tables, read_scores, append_scores)
            try:
                with Replicas(processes.device) as together:
                    for runner in runners:
                        runner.go_together(together)
                    _run_all(runners, rest)
            except LostProcessError as error:
                raise UserError(
                    f"evaluating together ended: {error}; what was scored is written, start again"
                ) from None
        processes.merge_parts(tables, read_scores, append_scores)
    return [row for table in tables for row in read_scores(table)]


def _run_all(runners: Sequence[_Runner], work: Iterable[tuple[int, int, str]]) -> None:
    """Scores (number of the run, step, task)."""
    missing: list[dict[int, list[str]]] = [{} for _ in runners]
    for place, step, name in work:
        missing[place].setdefault(step, []).append(name)
    for runner, left in zip(runners, missing, strict=True):
        runner.run(left)


def unscored(run: Run, *, tasks: Any = None, steps: Any = None, limit: int | None = None) -> list[tuple[int, str]]:
    """The (step, task) that `evaluate` with these arguments would score in a run; no model is loaded."""
    trajectory = run if isinstance(run, Trajectory) else Trajectory(run)
    names, chosen = units(wanted_tasks(tasks))[0], choose_steps(trajectory.steps, steps, "all")
    missing = _reader(trajectory, None, limit).missing(chosen, names)
    return [(step, name) for step, left in missing.items() for name in left]


def asked_for(
    runs: Sequence[Trajectory],
    *,
    output: str | Path | None = None,
    tasks: Any = None,
    steps: Any = None,
    limit: int | None = None,
) -> tuple[list[Score], list[str]]:
    """The scores that `evaluate` with these arguments was to make, and what has none: `run@step task`."""
    names, problems = units(wanted_tasks(tasks))
    shared = Counter(run.run.name for run in runs)
    found: list[Score] = []
    for run in sorted(runs, key=lambda run: run.run.name):
        reader, label = _reader(run, output, limit), run.run.name if shared[run.run.name] == 1 else run.path
        for step in choose_steps(run.steps, steps, "all"):
            for name in sorted(names):
                rows = reader.scores(step, name)
                found += [row for row in rows if row not in found]
                problems += [] if rows else [f"{label}@{step} {name}"]
    return found, problems


def _reader(trajectory: Trajectory, output: str | Path | None, limit: int | None) -> _Runner:
    """What knows the scores of a run, and makes none."""
    table = rows_file(trajectory, None if output is None else Path(output)).with_name(FILE_NAME)
    return _Runner(trajectory, table, limit, None, torch.device("cpu"), logger.warning, lambda _: None, table)


class _Runner:
    """One run's checkpoints; its tokenizer, tasks and encodings are made once."""

    def __init__(
        self,
        trajectory: Trajectory,
        table: Path,
        limit: int | None,
        batch_size: int | None,
        device: torch.device,
        say: Say,
        done: Callable[[int], Any],
        part: Path,
    ) -> None:
        self.trajectory, self.table, self.limit, self.part = trajectory, table, limit, part
        self.batch_size, self.device, self.say, self.done = batch_size, device, say, done
        self.placement, self.writes = OneDevice(device), True
        self.lm: Any = None
        self.rows = read_scores(table)
        self._loaded: dict[str, Work | UserError] = {}
        self._said: set[str] = set()

    def go_together(self, processes: Replicas) -> None:
        """From here on all processes do the same tasks and divide the items; the first writes and says."""
        self.placement, self.writes = processes, processes.crew.rank == 0
        if self.lm is not None:
            self.lm.replicas = processes.replicas
        if not self.writes:
            self.say = logger.debug

    def missing(self, steps: Sequence[int], names: Sequence[str]) -> dict[int, list[str]]:
        """The tasks that each step has no score of; steps that have all are left out."""
        left = {step: [name for name in names if not self._is_done(step, name)] for step in steps}
        return {step: names for step, names in left.items() if names}

    def run(self, missing: Mapping[int, Sequence[str]]) -> None:
        """Scores these tasks at these steps."""
        wanted = Counter(name for names in missing.values() for name in names)
        tasks = {name: work for name, steps in wanted.items() if (work := self._load(name, steps))}
        for step, names in missing.items():
            todo = [tasks[name] for name in names if name in tasks]
            if todo and self._take(step, len(todo)):
                for work in todo:
                    self._score(step, work)
                    self.done(1)

    def scores(self, step: int, name: str) -> list[Score]:
        """The rows of a task or a group at a step that count: of this checkpoint, with these arguments, and, of this
        package's own tasks, of the items that the run would give now."""
        import lm_eval

        rows = [
            row
            for row in self.rows
            if row.step == step and name in (row.task, row.group) and row.limit == self.limit
            and row.lm_eval_version == lm_eval.__version__ and is_of(row, self.trajectory) and self._has_items(row)
        ]  # fmt: skip
        if name in OFFLINE and rows:
            with suppress(UserError):  # where they cannot be made again, these were of what there was
                items = self._own_items(name)
                return [row for row in rows if row.items == items]
        return rows

    def _is_done(self, step: int, name: str) -> bool:
        if not self.scores(step, name):
            return False
        try:
            return name not in OFFLINE or bool(self._own_items(name))
        except UserError:
            return False  # the same fault is reported when the task is loaded

    def _has_items(self, row: Score) -> bool:
        """Whether the scores of the single items are there, undamaged; a group's mean has none."""
        if any(other.group == row.task for other in self.rows):
            return True
        try:
            return len(read_item_scores(item_file(self.table, row.step, row.task))) >= row.n
        except UserError:
            return False

    def _own_items(self, name: str) -> str:
        return items_for(self.trajectory, name).parent.name.rpartition("-")[2][:16]

    def _load(self, name: str, steps: int) -> Work | None:
        """The task, or None and a line that says why not."""
        metadata = {"run": self.trajectory} if name in OWN else None

        def load() -> Work:
            known = self._loaded.get(name)
            if isinstance(known, Work):
                return known
            if known is not None:
                raise UserError(str(known))
            try:
                loaded = manager(own_only=name in OWN, metadata=metadata).load([name])
                return Work(name, loaded, self._own_items(name) if name in OFFLINE else _fingerprint(loaded))
            except FAULTS as error:
                raise UserError(_load_fault(name, error)) from None

        try:
            with _lm_eval_seeds(self.device):
                self._loaded[name] = work = self.placement.agreed(load, apart=True)
            return work
        except UserError as error:
            self._loaded.setdefault(name, error)
            self._say_once(self.trajectory.run.name, str(error))
            self.done(steps)
            return None

    def _say_once(self, where: str, line: str) -> None:
        """Says what was not said before, beginning with where it is."""
        line = line if line.startswith(where) else f"{where}: {line}"
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def _take(self, step: int, tasks: int) -> bool:
        """Whether the checkpoint's model is ready to be scored."""
        try:
            self.placement.agreed(partial(self._load_model, step), apart=True)
            return True
        except FAULTS as error:
            self._say_once(self.trajectory.where(step), _one_line(error))
            self.done(tasks)
            return False

    def _load_model(self, step: int) -> None:
        from hf_lowrank.downstream.lm_eval_model import LowRankLM

        model: Any = self.trajectory.model(step)
        tokenizer = load_tokenizer(self.trajectory, step)
        if self.lm is not None and self.lm.tokenizer.get_vocab() == tokenizer.get_vocab():
            self.lm.replace_model(model)
            return
        sequences = self.trajectory.extra("evaluation.safetensors")
        self.lm = LowRankLM(
            model.to(self.device),
            tokenizer=tokenizer,
            evaluation_set=str(sequences) if sequences else None,
            batch_size=self.batch_size or _batch_size(model, self.device),
            show_progress=False,
        )
        self.lm.replicas = self.placement.replicas

    def _score(self, step: int, work: Work) -> None:
        """Scores one checkpoint on one task."""
        from lm_eval.evaluator import evaluate as lm_evaluate

        self.lm.cut_items = self.lm.scored_items = 0
        where = f"{self.trajectory.where(step)}: {work.name}"
        try:
            with _lm_eval_seeds(self.device, work.loaded["tasks"].values()):
                results = self.placement.agreed(
                    lambda: lm_evaluate(self.lm, work.loaded, limit=self.limit, bootstrap_iters=0, log_samples=True)
                )
        except FAULTS as error:
            self._say_once(where, _one_line(error))
            return
        if self.lm.cut_items:
            self.say(
                f"{where}: {self.lm.cut_items} of {self.lm.scored_items} requests are longer than the context of "
                f"{self.lm.max_length} tokens; their beginnings are cut, as lm-eval does"
            )
        self.placement.agreed(lambda: self._write(step, work, results) if self.writes else None, apart=True)

    def _write(self, step: int, work: Work, results: Mapping[str, Any]) -> None:
        """Writes items first, then rows: rows mean that all is there."""
        import lm_eval

        run = self.trajectory.run
        common = {
            "run": run.name, "method": run.method, "seed": run.seed, "step": step, "items": work.items,
            "limit": self.limit, "cut": self.lm.cut_items, "lm_eval_version": lm_eval.__version__,
            "checkpoint": self.trajectory.fingerprint(step),
        }  # fmt: skip
        rows: list[Score] = []
        for name, samples in results["samples"].items():
            task = work.loaded["tasks"][name]
            write_item_scores(item_file(self.table, step, name), item_scores(samples))
            group = work.name if name != work.name else None
            rows.extend(task_rows(name, task, samples, {**common, "group": group}))
        if work.name in results.get("groups", {}):
            rows.extend(group_rows(work.name, work.loaded["groups"][work.name], results, rows, common))
        append_scores(self.part, rows)


def _fingerprint(loaded: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, task in sorted(loaded["tasks"].items()):
        digest.update(name.encode())
        for doc in task.eval_docs:
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _load_fault(name: str, error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"{name}: {error}" if name not in str(error) else str(error)
    network = ("connection", "offline", "couldn't reach", "max retries", "localentrynotfound", "couldn't find")
    text = f"{type(error).__name__} {error}".lower()
    if any(word in text for word in network) or isinstance(error, ConnectionError | FileNotFoundError):
        return f"{name}: its data set is not on this machine and cannot be downloaded: {_one_line(error)}"
    return f"{name}: cannot be loaded: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _batch_size(model: Any, device: torch.device) -> int:
    """As many sequences of full length as give a quarter gigabyte of logits on a CPU, two on an accelerator."""
    config = model.config.get_text_config()
    words, length = config.vocab_size, getattr(config, "max_position_embeddings", None) or 1024
    logits = 2**26 if device.type == "cpu" else 2**29
    tokens = min(8192 if device.type == "cpu" else 65536, logits // words)
    return max(1, tokens // length)


@contextmanager
def _lm_eval_seeds(device: torch.device, tasks: Iterable[Any] = ()) -> Iterator[None]:
    """The seeds of lm-eval's command line, for tasks that draw examples too; afterwards draws go on as before."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    # numpy's global generator, since it is the one that tasks draw from.
    before, numpy_before = random.getstate(), np.random.get_state()
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
        random.setstate(before)
        np.random.set_state(numpy_before)


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Only errors of lm-eval's log and no bars of its own: one line of ours says what matters."""
    import lm_eval.api.task as lm_task
    import tqdm as tqdm_package

    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [(each, each.level) for each in loggers]
    bar = lm_task.tqdm
    lm_task.tqdm = lambda items=None, **options: tqdm_package.tqdm(items, **{**options, "disable": True})
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        lm_task.tqdm = bar
        for each, level in levels:
            each.setLevel(level)
