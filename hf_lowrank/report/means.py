"""Means over the runs of a method, with their intervals, for the page: its scripts compute none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from hf_lowrank.report.schema import (
    Curve,
    Layers,
    Line,
    Mean,
    MethodMeans,
    Numbers,
    Run,
    Trend,
    short,
    shorts,
)
from hf_lowrank.statistics import mean_interval

DIGITS = 7


def method_means(runs: Sequence[Run]) -> list[MethodMeans]:
    """The means of each method that has several runs in a group, by group and method."""
    members: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for run in runs:
        members[run["group"], run["method"]].append(run)
    return [_means(found) for _, found in sorted(members.items()) if len(found) > 1]


def _means(runs: Sequence[Run]) -> MethodMeans:
    finals = {key: [run["final"].get(key) for run in runs] for run in runs for key in run["final"]}
    tasks = {key: [run["tasks"][key] for run in runs if key in run["tasks"]] for run in runs for key in run["tasks"]}
    return {
        "method": runs[0]["method"],
        "group": runs[0]["group"],
        "final": {key: mean for key, values in finals.items() if (mean := _mean(values)) is not None},
        "loss": {
            "eval": _mean_line([run["loss"]["eval"] for run in runs]),
            "train": _mean_line([run["loss"]["train"] for run in runs]),
        },
        "metrics": {
            metric: _mean_trend([run["metrics"][metric] for run in runs if metric in run["metrics"]])
            for metric in dict.fromkeys(metric for run in runs for metric in run["metrics"])
        },
        "curves": {
            metric: _mean_curves([run["curves"][metric] for run in runs if metric in run["curves"]])
            for metric in dict.fromkeys(metric for run in runs for metric in run["curves"])
        },
        "tasks": {key: _mean_score(rows) for key, rows in tasks.items()},
    }


def _mean(values: Iterable[float | None]) -> Mean | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    found = mean_interval(known)
    low, high = found.bounds
    return {"mean": short(found.value, DIGITS), "lo": short(low, DIGITS), "hi": short(high, DIGITS), "n": found.n}


def _mean_score(rows: Sequence[Numbers]) -> Mean:
    """Over runs; a single run keeps the interval over its items."""
    known = [row for row in rows if row[0] is not None]
    if len(known) == 1:
        return {"mean": known[0][0], "lo": known[0][1], "hi": known[0][2], "n": 1}
    return _mean(row[0] for row in known) or {"mean": None, "lo": None, "hi": None, "n": 0}


def _mean_line(lines: Sequence[Line]) -> Line:
    """The mean at the positions that all lines have: over fewer runs than its neighbours it would jump."""
    drawn = [line for line in lines if line["x"]]
    if len(drawn) == 1:
        line = drawn[0]
        return {key: line[key] for key in ("x", "y", "lo", "hi") if key in line}  # type: ignore[return-value]
    found = _means_at([dict(zip(line["x"], line["y"], strict=True)) for line in drawn])
    return {"x": list(found), **_columns(found.values())}


def _means_at(lines: Sequence[Mapping[float | None, float | None]]) -> dict[float, Mean]:
    common = set.intersection(*({x for x, y in line.items() if y is not None} for line in lines)) if lines else set()
    return {
        x: mean
        for x in sorted(x for x in common if x is not None)
        if (mean := _mean(line[x] for line in lines)) is not None
    }


class Columns(TypedDict):
    """Means with their intervals, in columns."""

    y: Numbers
    lo: Numbers
    hi: Numbers


def _columns(means: Iterable[Mean]) -> Columns:
    found = list(means)
    return {"y": [m["mean"] for m in found], "lo": [m["lo"] for m in found], "hi": [m["hi"] for m in found]}


def _mean_trend(trends: Sequence[Trend]) -> Trend:
    trend: Trend = {**_mean_line(trends), "why": None, "base": None}
    tables = [one["layers"] for one in trends if "layers" in one]
    if tables:
        trend["layers"] = tables[0] if len(tables) == 1 else _mean_layers(tables)
    return trend


def _mean_layers(tables: Sequence[Layers]) -> Layers:
    """Per step over the runs that have it; no value where one of them lacks the layer."""
    scopes = list(dict.fromkeys(scope for table in tables for scope in table["scopes"]))
    steps = sorted({step for table in tables for step in table["steps"]})
    found: Layers = {"steps": steps, "scopes": scopes, "values": [], "lo": [], "hi": [], "runs": []}
    for step in steps:
        rows = [
            dict(zip(table["scopes"], table["values"][table["steps"].index(step)], strict=True))
            for table in tables
            if step in table["steps"]
        ]
        columns = [[row.get(scope) for row in rows] for scope in scopes]
        means = [None if None in column else _mean(column) for column in columns]
        found["runs"].append(len(rows))
        found["values"].append(shorts((mean and mean["mean"] for mean in means), 5))
        found["lo"].append(shorts((mean and mean["lo"] for mean in means), 4))
        found["hi"].append(shorts((mean and mean["hi"] for mean in means), 4))
    return found


def _mean_curves(runs: Sequence[Sequence[Curve]]) -> list[Curve]:
    """One curve per step, over the runs that have one; if a run has several at a step, its first counts."""
    by_step: dict[int, list[Curve]] = defaultdict(list)
    for curves in runs:
        for step, curve in {curve["step"]: curve for curve in reversed(curves)}.items():
            by_step[step].append(curve)
    return [found[0] if len(found) == 1 else _mean_curve(found) for _, found in sorted(by_step.items())]


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    centers = [curve["center"] or 0.0 for curve in curves]
    lines = [dict(zip(curve["t"], curve["y"], strict=True)) for curve in curves]
    rises = [
        {t: None if y is None else y - center for t, y in line.items()}
        for line, center in zip(lines, centers, strict=True)
    ]
    found, rise = _means_at(lines), _columns(_means_at(rises).values())
    mean: Curve = {
        "step": curves[0]["step"],
        "t": list(found),
        **_columns(found.values()),
        "center": short(sum(centers) / len(centers), 9),
        "rise_lo": rise["lo"],
        "rise_hi": rise["hi"],
    }
    if any("relative" in curve for curve in curves):
        mean["relative"] = 1
    return mean
