"""`downstream.jsonl` of a run, one row per checkpoint, task and metric, and the scores of single items."""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.runs.layout import ITEM_SCORES, SCORES
from hf_lowrank.storage.checksums import sealed, unsealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json
from hf_lowrank.storage.tables import append_rows, read_table, row_of

# The first of these that a task has is its score.
PRIMARY = ("acc", "mcc", "acc_norm")
# How lm-eval's tasks name a dataset on the Hub; other names are loaders of local files.
HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

# A score on fewer items is a quick try, which counts nowhere: its standard error is 0.05 and more.
LEAST_ITEMS = 100

Grid = dict[str, dict[int, Any]]  # run -> step -> value


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row.

    Attributes:
        run, method, seed: the run, as named by its folder and recipe.
        step: optimizer step of the checkpoint.
        task, metric: as lm-eval names them.
        value: the task's score on its items.
        stderr, ci_low, ci_high: standard error and 95 % percentile interval of the bootstrap over items (for a group's
            mean, from lm-eval's standard error); None without one.
        n: number of items.
        chance: the score of guessing; None where that is undefined.
        higher_is_better: whether larger values are better.
        group: the group that the task was scored as part of, e.g. blimp; None for a task of its own.
        task_version, lm_eval_version: what produced the score.
        items: fingerprint of the items; scores are compared item by item only if it is equal.
        cut: items whose beginning was truncated to the model's context, as lm-eval does.
        limit: the requested number of items; None: all.
        checkpoint: fingerprint of the checkpoint (`Trajectory.fingerprint`); None where unknown.
        dataset: the Hub dataset that the items come from, `user/name`; None for others, and where unknown.
        subset: its configuration; None: the only or default one, or, for a group's mean, several.
    """

    run: str
    method: str
    seed: int | None
    step: int
    task: str
    metric: str
    value: float
    stderr: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    chance: float | None
    higher_is_better: bool
    group: str | None
    task_version: str
    lm_eval_version: str
    items: str
    cut: int = 0
    limit: int | None = None
    checkpoint: str | None = None
    dataset: str | None = None
    subset: str | None = None


def read_scores(path: str | os.PathLike[str]) -> list[Score]:
    """The rows that count of a file or a run directory: the last one per step, task, metric and limit; none without
    a file. A torn last line is skipped.

    Raises:
        UserError: a line is not a score; names its number.
    """
    parse = partial(row_of, Score)
    key = attrgetter("run", "step", "task", "metric", "limit")
    return read_table(path, SCORES, parse, key, "score", "evaluate")


def append_scores(path: Path, rows: Sequence[Score]) -> None:
    """Appends rows to a table, see `append_rows`."""
    append_rows(path, rows, "scores")


def item_file(table: Path, step: int, task: str) -> Path:
    """The file with the item scores of one checkpoint and task, next to the run's table."""
    return table.parent / ITEM_SCORES / f"step-{step}" / f"{task.replace('/', '--')}.jsonl"


def write_item_scores(path: Path, scores: Iterable[dict[str, Any]]) -> None:
    """Writes the scores of single items, one line each, replacing the file in one piece."""
    write_text(path, "".join(json.dumps(sealed(score), ensure_ascii=False) + "\n" for score in scores))


def read_item_scores(path: Path) -> list[dict[str, Any]]:
    """The scores of single items.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        rows = [unsealed(parse_json(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(row.get("item"), str | int) for row in rows):
            raise ValueError("a row must be a JSON object with the key item")
        return [{**row, "item": str(row["item"])} for row in rows]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not readable item scores: {error}; evaluate that checkpoint again") from None


def comparable_scores(
    tables: Mapping[str, Iterable[Score]], tasks: Iterable[str] | None = None
) -> tuple[dict[str, list[Score]], int | None]:
    """Each run's primary scores with a known level of chance, without runs that have none, and on how many items.

    That is None, on all, where a run was scored so; otherwise the largest limit that one has and that is no quick try.
    """
    wanted = None if tasks is None else set(tasks)
    usable = {run: [row for row in rows if _is_usable(row, wanted)] for run, rows in tables.items()}
    limits = {row.limit for rows in usable.values() for row in rows}
    limit = None if None in limits else max((one for one in limits if one and one >= LEAST_ITEMS), default=None)
    found = {run: _primary(row for row in rows if row.limit == limit) for run, rows in usable.items()}
    return {run: rows for run, rows in found.items() if rows}, limit


def _is_usable(row: Score, wanted: set[str] | None) -> bool:
    """Whether a score is finite and its chance level is known and below 1."""
    if row.group is not None or row.metric not in PRIMARY or (wanted is not None and row.task not in wanted):
        return False
    return row.chance is not None and row.chance < 1 and math.isfinite(row.value)


def _primary(scores: Iterable[Score]) -> list[Score]:
    """The primary score of each task at each checkpoint."""
    best: dict[tuple[int, str], Score] = {}
    for row in scores:
        known = best.get((row.step, row.task))
        if known is None or PRIMARY.index(row.metric) < PRIMARY.index(known.metric):
            best[row.step, row.task] = row
    return list(best.values())


def shared_tasks(scored: Mapping[str, Sequence[Score]], notes: list[str]) -> list[str]:
    """The tasks that every run was scored on with the same items, by name; `notes` gets why others are left out."""
    if not scored:
        return []
    items: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for run, rows in scored.items():
        for row in rows:
            items[row.task][run].add(row.items)
    shared = []
    for task, by_run in sorted(items.items()):
        if len(by_run) < len(scored):
            notes.append(f"{task} has no score in some runs: left out")
        elif len(set.union(*by_run.values())) > 1:
            notes.append(f"{task} was scored on different items in different runs: left out")
        else:
            shared.append(task)
    return shared


def above_chance(scored: Mapping[str, Sequence[Score]], notes: list[str]) -> Grid:
    """Mean above-chance score `(score − chance)/(1 − chance)` over `shared_tasks`."""
    shared = shared_tasks(scored, notes)
    if not shared:
        raise UserError("the runs share no task with the same items; evaluate them on the same tasks")
    target: Grid = {}
    for run, rows in scored.items():
        by_step: dict[int, dict[str, float]] = defaultdict(dict)
        for row in rows:
            if row.task in shared and row.chance is not None:
                by_step[row.step][row.task] = (row.value - row.chance) / (1 - row.chance)
        target[run] = {s: sum(v.values()) / len(v) for s, v in by_step.items() if len(v) == len(shared)}
    return target
