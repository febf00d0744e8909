"""lm-eval's results as rows of the table and as scores of single items."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_lowrank.downstream.catalogue import OFFLINE
from hf_lowrank.runs.scores import HUB_DATASET, Score

RESAMPLES = 2000
SLOW_RESAMPLES = 200
# Scores that are fractions of items, which have a chance level.
FRACTIONS = {"acc", "acc_norm", "acc_bytes", "exact_match", "acc_mutual_info"}


def task_rows(name: str, task: Any, samples: Sequence[Mapping[str, Any]], common: dict[str, Any]) -> Iterator[Score]:
    """A row for each metric of a task, with a bootstrap interval over its items."""
    from lm_eval.api.metrics import mean

    dataset, subset = _dataset(task)
    columns: dict[tuple[str, str], list[tuple[Any, float | None]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            item = (sample[metric], _chance(task, metric, sample["doc"]))
            columns.setdefault((metric, sample["filter"]), []).append(item)
    for (metric, filter_), items in columns.items():
        values = [value for value, _ in items]
        aggregate = task.aggregation().get(metric, mean)
        is_mean = aggregate is mean and all(isinstance(value, int | float) for value in values)
        error, low, high = bootstrap(values, aggregate, is_mean=is_mean)
        known = [guess for _, guess in items if guess is not None]
        yield Score(
            **common,
            task=name,
            metric=metric if filter_ == "none" else f"{metric},{filter_}",
            value=float(aggregate(values)),
            stderr=error,
            ci_low=low,
            ci_high=high,
            n=len(values),
            chance=sum(known) / len(known) if len(known) == len(items) else None,
            higher_is_better=bool(task.higher_is_better().get(metric, True)),
            task_version=str(task.VERSION),
            dataset=dataset,
            subset=subset,
        )


def group_rows(
    name: str, group: Any, results: Mapping[str, Any], members: Sequence[Score], common: dict[str, Any]
) -> Iterator[Score]:
    """The group's own scores, as lm-eval aggregates them, with the error that follows from its members' errors."""
    by_size = {config.metric: bool(config.weight_by_size) for config in group.aggregate_metric_list or ()}
    for key, value in results["groups"][name].items():
        metric, _, filter_ = key.partition(",")
        if not filter_ or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        full = metric if filter_ == "none" else f"{metric},{filter_}"
        scores = [row for row in members if row.metric == full]
        weights = [row.n if by_size.get(metric, True) else 1 for row in scores]
        error = math.hypot(*(w * (row.stderr or 0.0) for w, row in zip(weights, scores, strict=True))) / sum(weights)
        datasets = {row.dataset for row in scores}
        chances = [w * row.chance for w, row in zip(weights, scores, strict=True) if row.chance is not None]
        yield Score(
            **common,
            task=name,
            metric=full,
            value=float(value),
            stderr=error,
            ci_low=value - 1.96 * error,
            ci_high=value + 1.96 * error,
            n=sum(row.n for row in scores),
            chance=sum(chances) / sum(weights) if len(chances) == len(scores) else None,
            higher_is_better=scores[0].higher_is_better,
            group=None,
            task_version=str(results.get("versions", {}).get(name)),
            dataset=datasets.pop() if len(datasets) == 1 else None,
        )


def _dataset(task: Any) -> tuple[str | None, str | None]:
    """The Hub dataset and the configuration that a task's items come from; None for a script, a file or a function."""
    path, subset = task.config.dataset_path, task.config.dataset_name
    if task.config.custom_dataset is not None or not isinstance(path, str) or not HUB_DATASET.fullmatch(path):
        return None, None
    return path, None if subset is None else str(subset)


def _chance(task: Any, metric: str, doc: Mapping[str, Any]) -> float | None:
    """The chance level of one item; None where it has none."""
    if metric == "mcc":
        return 0.0
    if task.OUTPUT_TYPE != "multiple_choice" or not (metric in FRACTIONS or metric.startswith("acc_")):
        return None
    if callable(task.config.process_results) and task.config.task not in OFFLINE:
        return None  # the chance level of a task's own scoring function is unknown
    gold = doc_gold(task, doc)
    return (len(gold) if isinstance(gold, list) else 1) / max(1, len(task.doc_to_choice(doc)))


def doc_gold(task: Any, doc: Mapping[str, Any]) -> Any:
    """The right choice, or choices, of an item."""
    return task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)


def item_scores(samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each item with its scores, named by the task's own id if that is unique, else by its number."""
    own = [sample["doc"].get("id") if isinstance(sample["doc"], dict) else None for sample in samples]
    named = set(zip(map(repr, own), (sample["filter"] for sample in samples), strict=True))
    by_number = None in own or len(named) < len(samples)
    for sample, identity in zip(samples, own, strict=True):
        scores = {metric: _number(sample[metric]) for metric in sample["metrics"]}
        yield {"item": str(sample["doc_id"] if by_number else identity), "filter": sample["filter"], **scores}


def _number(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_number(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def bootstrap(
    items: Sequence[Any], aggregate: Callable[[list[Any]], float], *, is_mean: bool, seed: int = 0
) -> tuple[float, float, float]:
    """(standard error, low, high) of `aggregate(items)` under resampling of the items; 95 % percentile interval.

    NaN for fewer than two items.
    """
    count = len(items)
    if count < 2:
        return math.nan, math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    if is_mean:
        picked = torch.randint(count, (RESAMPLES, count), generator=generator).numpy()
        values = np.asarray(items, dtype=np.float64)[picked].mean(1)
    else:
        picked = torch.randint(count, (SLOW_RESAMPLES, count), generator=generator).numpy()
        values = np.asarray([float(aggregate([items[i] for i in row])) for row in picked])
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return math.nan, math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(values.std(ddof=1)), float(low), float(high)
