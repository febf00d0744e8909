"""Comparing two runs item by item; their difference on the same items is more certain than either score."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.runs.layout import SCORES
from hf_lowrank.runs.scores import Score, item_file, read_item_scores, read_scores
from hf_lowrank.statistics import mcnemar

RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference of two checkpoints on the same items.

    Attributes:
        task, metric: what was compared.
        first, second: the runs, as `name@step`.
        difference: second − first, mean over items.
        ci_low, ci_high: 95 % percentile interval of the paired bootstrap over items.
        p_value: two-sided. McNemar's exact test for scores of 0 and 1, else the sign-flip permutation test.
        test: its name.
        n: number of items, those on which both agree included.
        only_first, only_second: numbers of items that only one got right; None for scores other than 0 and 1.
    """

    task: str
    metric: str
    first: str
    second: str
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    test: str
    n: int
    only_first: int | None
    only_second: int | None


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0
) -> tuple[float, float, float, float, str]:
    """(second − first, low, high, p-value, name of the test) for scores of the same items.

    Raises:
        ValueError: the numbers of scores differ, or there are none.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"scores must be of the same items, got {a.shape} and {b.shape}")
    delta = b - a
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(delta), (RESAMPLES, len(delta)), generator=generator).numpy()
    low, high = np.quantile(delta[picked].mean(1), [0.025, 0.975])
    if np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        p, test = mcnemar(int((delta < 0).sum()), int((delta > 0).sum())), "McNemar, exact"
    else:
        signs = torch.randint(2, (RESAMPLES, len(delta)), generator=generator).numpy() * 2.0 - 1
        null = np.abs((signs @ delta) / len(delta))
        p, test = float((1 + (null >= abs(delta.mean()) - 1e-15).sum()) / (1 + RESAMPLES)), "sign flips"
    return float(delta.mean()), float(low), float(high), p, test


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    metric: str = "acc",
    step: int | None = None,
) -> list[Comparison]:
    """Compares two run directories on the tasks for which both have scores.

    Args:
        first, second: run directories (or folders that hold a run's `downstream.jsonl`).
        tasks: None: all that both have.
        metric: the score of an item.
        step: the checkpoint of both; None: the last one of each.

    Raises:
        UserError: scores are missing, or the items are not the same.
    """
    tables = [_rows(Path(run), metric) for run in (first, second)]
    shared = [task for task in tables[0] if task in tables[1]]
    for task in tasks or ():
        if task not in shared:
            raise UserError(f"no {metric} of {task!r} in both {first} and {second}; {nearest(task, shared)}")
    if not (tasks or shared):
        raise UserError(f"{first} and {second} have no task with {metric} in common; run hf-lowrank evaluate on both")
    return [_compared([Path(first), Path(second)], tables, task, metric, step) for task in tasks or shared]


def _rows(run: Path, metric: str) -> dict[str, list[Score]]:
    rows: dict[str, list[Score]] = {}
    for row in read_scores(run):
        if row.metric == metric:
            rows.setdefault(row.task, []).append(row)
    if not rows:
        raise UserError(f"{run}: has no scores with metric {metric!r}; run hf-lowrank evaluate {run}")
    return rows


def _compared(
    runs: list[Path], tables: list[dict[str, list[Score]]], task: str, metric: str, step: int | None
) -> Comparison:
    (one, ours), (other, theirs) = (
        _item_values(run, table[task], metric, step) for run, table in zip(runs, tables, strict=True)
    )
    if one.items != other.items or ours.keys() != theirs.keys():
        raise UserError(f"{task}: {runs[0]} and {runs[1]} were scored on different items; evaluate one of them again")
    a, b = list(ours.values()), [theirs[item] for item in ours]
    difference, low, high, p, test = paired_difference(a, b)
    binary = test.startswith("McNemar")
    return Comparison(
        task=task,
        metric=metric,
        first=f"{one.run}@{one.step}",
        second=f"{other.run}@{other.step}",
        difference=difference,
        ci_low=low,
        ci_high=high,
        p_value=p,
        test=test,
        n=len(a),
        only_first=sum(x > y for x, y in zip(a, b, strict=True)) if binary else None,
        only_second=sum(x < y for x, y in zip(a, b, strict=True)) if binary else None,
    )


def _item_values(run: Path, rows: list[Score], metric: str, step: int | None) -> tuple[Score, dict[str, float]]:
    """The score among a run's `rows` of a task at `step`, else the last one, and its items' scores by item."""
    row = max((row for row in rows if step in (None, row.step)), key=lambda row: row.step, default=None)
    if row is None:
        raise UserError(f"{run}: has no score of {rows[0].task} at step {step}")
    file = item_file(run / SCORES, row.step, row.task)
    items = read_item_scores(file)
    if len(items) < row.n:
        raise UserError(f"{file}: holds {len(items)} of {row.n} items; evaluate that checkpoint again")
    values = {item["item"]: item[metric] for item in items if metric in item}
    if not values or not all(isinstance(value, int | float) for value in values.values()):
        raise UserError(f"{file}: {metric} must be a number for every item; evaluate that checkpoint again")
    return row, {item: float(value) for item, value in values.items()}
