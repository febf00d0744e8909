"""Every checkpoint of every run on every task, each once.

Likelihood tasks without examples in the prompt have nothing random: seeds would change nothing, so there are none.
The uncertainty that is reported is that of the choice of items, by the bootstrap.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.checkpoints import Trajectory
from hf_lowrank.downstream.catalogue import OFFLINE, OWN, manager, units, wanted_tasks
from hf_lowrank.downstream.items import items_for
from hf_lowrank.downstream.scores import (
    FILE_NAME,
    Score,
    append_scores,
    bootstrap,
    item_file,
    read_scores,
    write_item_scores,
)
from hf_lowrank.downstream.sources import load_tokenizer
from hf_lowrank.errors import UserError
from hf_lowrank.locks import all_locked
from hf_lowrank.measuring.plan import choose_steps, rows_file

logger = logging.getLogger(__name__)

Run = str | os.PathLike[str] | Trajectory
Say = Callable[[str], None]
FAULTS = (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError, AssertionError, ImportError)
FRACTIONS = {"acc", "acc_norm", "acc_bytes", "exact_match", "acc_mutual_info"}


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

    Args:
        runs: run directories, folders of checkpoints, `user/repo` or `user/repo@revision`, or trajectories.
        tasks: names of lm-eval's and this package's tasks and groups, a list or comma-separated; None: the four
            that need no network.
        steps: "all", "last" or numbers; None: all.
        limit: only the first so many items of each task, for trying out.
        batch_size: sequences a batch; None: chosen by context length, vocabulary and device.
        device: None: an accelerator if there is one.
        output: a folder for the tables, a subfolder each run; None: the run directories.
        revisions: which revisions of a repository are checkpoints, as a pattern.
        say: gets a line for everything that cannot be done (unknown task, no network, no tokenizer, items that do not
            fit); None: a warning in the log. The other work goes on.
        progress: shows checkpoints × tasks done on stderr.

    Raises:
        UserError: a run is unusable, no task is known, or a table cannot be written.
    """
    say = say or logger.warning
    given = [runs] if isinstance(runs, str | os.PathLike | Trajectory) else list(runs)
    if not given:
        raise UserError("there must be at least one run to evaluate")
    trajectories = [run if isinstance(run, Trajectory) else Trajectory(run, revisions=revisions) for run in given]
    names, problems = units(wanted_tasks(tasks))
    if not names:
        raise UserError("; ".join(problems))
    for problem in problems:
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

    total = sum(len(chosen) for _, chosen, _ in plans) * len(names)
    bar = tqdm(total=total, unit="task", disable=not progress, delay=2, leave=False)
    with all_locked([table.parent for _, _, table in plans], "evaluate"), _quiet_lm_eval(), bar:
        for trajectory, chosen, table in plans:
            _Runner(trajectory, table, limit, batch_size, device, say, bar.update).run(chosen, names)
    return [row for _, _, table in plans for row in read_scores(table)]


def unscored(run: Run, *, tasks: Any = None, steps: Any = None, limit: int | None = None) -> list[tuple[int, str]]:
    """The (step, task) that `evaluate` with these arguments would score in a run; no model is loaded."""
    trajectory = run if isinstance(run, Trajectory) else Trajectory(run)
    table = rows_file(trajectory, None).with_name(FILE_NAME)
    runner = _Runner(trajectory, table, limit, None, None, logger.warning, lambda _: None)
    names, chosen = units(wanted_tasks(tasks))[0], choose_steps(trajectory.steps, steps, "all")
    return [(step, name) for step in chosen for name in names if not runner._is_done(step, name)]


class _Runner:
    """One run's checkpoints; its tokenizer, tasks and encodings are made once."""

    def __init__(
        self,
        trajectory: Trajectory,
        table: Path,
        limit: int | None,
        batch_size: int | None,
        device: str | torch.device | None,
        say: Say,
        done: Callable[[int], Any],
    ) -> None:
        self.trajectory, self.table, self.limit = trajectory, table, limit
        self.batch_size, self.device, self.say, self.done = batch_size, device, say, done
        self.lm: Any = None
        self.rows = read_scores(table)

    def run(self, steps: Sequence[int], names: Sequence[str]) -> None:
        missing = {name: [step for step in steps if not self._is_done(step, name)] for name in names}
        self.done(sum(len(steps) - len(left) for left in missing.values()))
        tasks = {name: work for name, left in missing.items() if left and (work := self._load(name, len(left)))}
        for step in steps:
            todo = [work for name, work in tasks.items() if step in missing[name]]
            if todo and self._take(step, len(todo)):
                for work in todo:
                    self._score(step, work)
                    self.done(1)

    def _is_done(self, step: int, name: str) -> bool:
        import lm_eval

        rows = [
            row
            for row in self.rows
            if row.step == step and name in (row.task, row.group) and row.limit == self.limit
            and row.lm_eval_version == lm_eval.__version__
        ]  # fmt: skip
        if name not in OFFLINE:
            return bool(rows)
        try:
            return any(row.items == self._own_items(name) for row in rows)
        except UserError:
            return False  # the same fault is reported when the task is loaded

    def _own_items(self, name: str) -> str:
        return items_for(self.trajectory, name).parent.name.rpartition("-")[2][:16]

    def _load(self, name: str, steps: int) -> Work | None:
        """The task, or None and a line that says why not."""
        metadata = {"run": self.trajectory}
        try:
            loaded = manager(own_only=name in OWN, metadata=metadata if name in OWN else None).load([name])
            items = self._own_items(name) if name in OFFLINE else _fingerprint(loaded)
        except FAULTS as error:
            self.say(f"{self.trajectory.run.name}: {_load_fault(name, error)}")
            self.done(steps)
            return None
        return Work(name, loaded, items)

    def _take(self, step: int, tasks: int) -> bool:
        """Whether the checkpoint's model is ready to be scored."""
        from hf_lowrank.downstream.lm_eval_model import LowRankLM

        try:
            model: Any = self.trajectory.model(step)
            tokenizer = load_tokenizer(self.trajectory, step)
            if self.lm is not None and self.lm.tokenizer.get_vocab() == tokenizer.get_vocab():
                self.lm.replace_model(model)
                return True
            device = torch.device(self.device) if self.device is not None else _best_device()
            sequences = self.trajectory.extra("evaluation.safetensors")
            self.lm = LowRankLM(
                model.to(device),
                tokenizer=tokenizer,
                evaluation_set=str(sequences) if sequences else None,
                batch_size=self.batch_size or _batch_size(model, device),
                show_progress=False,
            )
            return True
        except FAULTS as error:
            self.say(f"{self.trajectory.where(step)}: {_one_line(error)}")
            self.done(tasks)
            return False

    def _score(self, step: int, work: Work) -> None:
        """Scores one checkpoint on one task and writes items first, then rows: rows mean that all is there."""
        import lm_eval
        from lm_eval.evaluator import evaluate as lm_evaluate

        self.lm.cut_items = self.lm.scored_items = 0
        where = f"{self.trajectory.where(step)}: {work.name}"
        try:
            with torch.random.fork_rng(devices=[]):
                results = lm_evaluate(self.lm, work.loaded, limit=self.limit, bootstrap_iters=0, log_samples=True)
        except FAULTS as error:
            self.say(f"{where}: {_one_line(error)}")
            return
        if self.lm.cut_items:
            self.say(
                f"{where}: {self.lm.cut_items} of {self.lm.scored_items} requests are longer than the context of "
                f"{self.lm.max_length} tokens; their beginnings are cut, as lm-eval does"
            )
        run = self.trajectory.run
        common = {
            "run": run.name, "method": run.method, "seed": run.seed, "step": step, "items": work.items,
            "limit": self.limit, "cut": self.lm.cut_items, "lm_eval_version": lm_eval.__version__,
        }  # fmt: skip
        rows: list[Score] = []
        for name, samples in results["samples"].items():
            task = work.loaded["tasks"][name]
            write_item_scores(item_file(self.table, step, name), _item_scores(samples))
            group = work.name if name != work.name else None
            rows.extend(_task_rows(name, task, samples, {**common, "group": group}))
        if work.name in results.get("groups", {}):
            rows.extend(_group_rows(work.name, work.loaded["groups"][work.name], results, rows, common))
        append_scores(self.table, rows)


def _task_rows(name: str, task: Any, samples: Sequence[Mapping[str, Any]], common: dict[str, Any]) -> Iterator[Score]:
    from lm_eval.api.metrics import mean

    columns: dict[tuple[str, str], list[Any]] = {}
    chances: dict[tuple[str, str], list[float | None]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            columns.setdefault((metric, sample["filter"]), []).append(sample[metric])
            chances.setdefault((metric, sample["filter"]), []).append(_chance(task, metric, sample["doc"]))
    for (metric, filter_), values in columns.items():
        aggregate = task.aggregation().get(metric, mean)
        is_mean = aggregate is mean and all(isinstance(value, int | float) for value in values)
        error, low, high = bootstrap(values, aggregate, is_mean=is_mean)
        guesses = chances[metric, filter_]
        known = [guess for guess in guesses if guess is not None]
        yield Score(
            **common,
            task=name,
            metric=metric if filter_ == "none" else f"{metric},{filter_}",
            value=float(aggregate(values)),
            stderr=error,
            ci_low=low,
            ci_high=high,
            n=len(values),
            chance=sum(known) / len(known) if len(known) == len(guesses) else None,
            higher_is_better=bool(task.higher_is_better().get(metric, True)),
            task_version=str(task.VERSION),
        )


def _group_rows(
    name: str, group: Any, results: Mapping[str, Any], members: Sequence[Score], common: dict[str, Any]
) -> list[Score]:
    """The group's own scores, as lm-eval aggregates them, with the error that its members' errors make."""
    by_size = {config.metric: bool(config.weight_by_size) for config in group.aggregate_metric_list or ()}
    found: list[Score] = []
    for key, value in results["groups"][name].items():
        metric, _, filter_ = key.partition(",")
        if not filter_ or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        full = metric if filter_ == "none" else f"{metric},{filter_}"
        parts = [row for row in members if row.metric == full]
        weights = [row.n if by_size.get(metric, True) else 1 for row in parts]
        error = math.hypot(*(w * (row.stderr or 0.0) for w, row in zip(weights, parts, strict=True))) / sum(weights)
        guesses = [row.chance for row in parts]
        chance = None
        if None not in guesses:
            chance = sum(w * (guess or 0.0) for w, guess in zip(weights, guesses, strict=True)) / sum(weights)
        found.append(
            Score(
                **common,
                task=name,
                metric=full,
                value=float(value),
                stderr=error,
                ci_low=value - 1.96 * error,
                ci_high=value + 1.96 * error,
                n=sum(row.n for row in parts),
                chance=chance,
                higher_is_better=parts[0].higher_is_better,
                group=None,
                task_version=str(results.get("versions", {}).get(name)),
            )
        )
    return found


def _chance(task: Any, metric: str, doc: Mapping[str, Any]) -> float | None:
    """What guessing scores on one item; None where that has no meaning."""
    if metric == "mcc":
        return 0.0
    if task.OUTPUT_TYPE != "multiple_choice" or not (metric in FRACTIONS or metric.startswith("acc_")):
        return None
    if callable(task.config.process_results) and task.config.task not in OFFLINE:
        return None  # the task's own rule of scoring; only its author knows what guessing gives
    gold = doc_gold(task, doc)
    return (len(gold) if isinstance(gold, list) else 1) / max(1, len(task.doc_to_choice(doc)))


def doc_gold(task: Any, doc: Mapping[str, Any]) -> Any:
    """The right choice, or choices, of an item."""
    return task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)


def _item_scores(samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        identity = sample["doc"].get("id", sample["doc_id"]) if isinstance(sample["doc"], dict) else sample["doc_id"]
        scores = {metric: _number(sample[metric]) for metric in sample["metrics"]}
        yield {"item": identity, "filter": sample["filter"], **scores}


def _number(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_number(part) for part in value]
    return value.item() if hasattr(value, "item") else value


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


def _best_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _batch_size(model: Any, device: torch.device) -> int:
    """As many sequences of full length as give a quarter gigabyte of logits on a CPU, two on an accelerator."""
    config = model.config.get_text_config()
    words, length = config.vocab_size, getattr(config, "max_position_embeddings", None) or 1024
    logits = 2**26 if device.type == "cpu" else 2**29
    tokens = min(8192 if device.type == "cpu" else 65536, logits // words)
    return max(1, tokens // length)


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
