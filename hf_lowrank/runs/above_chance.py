"""Downstream scores relative to chance, from the rows that runs hold."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.runs.scores import PRIMARY, Score

Grid = dict[str, dict[int, Any]]  # run -> step -> value


def usable_scores(scores: Iterable[Score], tasks: Iterable[str] | None) -> list[Score]:
    """The primary score of each task at each checkpoint, if it is finite and its chance level is known and below 1."""
    wanted = None if tasks is None else set(tasks)
    best: dict[tuple[int, str], Score] = {}
    for row in scores:
        if row.group is not None or row.limit is not None or row.metric not in PRIMARY:
            continue
        if row.chance is None or not row.chance < 1 or not math.isfinite(row.value):
            continue
        if wanted is not None and row.task not in wanted:
            continue
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
