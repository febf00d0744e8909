"""Means over the runs of a method, with their intervals, for the page: its scripts compute none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from hf_lowrank.report.schema import Curve, Layers, Line, Mean, MethodMeans, Numbers, Run, Trend, short, shorts
from hf_lowrank.statistics import mean_interval

DIGITS = 7
Entry = TypeVar("Entry")


def method_means(runs: Sequence[Run]) -> list[MethodMeans]:
    """The means of each method that has several runs in a group, by group and method."""
    members: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for run in runs:
        members[run["group"], run["method"]].append(run)
    return [_means(found) for _, found in sorted(members.items()) if len(found) > 1]


def _means(runs: Sequence[Run]) -> MethodMeans:
    finals = _by_key(run["final"] for run in runs)
    return {
        "method": runs[0]["method"],
        "group": runs[0]["group"],
        "final": {key: mean for key, values in finals.items() if (mean := _mean(values)) is not None},
        "loss": {
            "eval": _mean_line([run["loss"]["eval"] for run in runs]),
            "train": _mean_line([run["loss"]["train"] for run in runs]),
        },
        "metrics": {key: _mean_trend(found) for key, found in _by_key(run["metrics"] for run in runs).items()},
        "curves": {key: _mean_curves(found) for key, found in _by_key(run["curves"] for run in runs).items()},
        "tasks": {key: _mean_score(found) for key, found in _by_key(run["tasks"] for run in runs).items()},
    }


def _by_key(tables: Iterable[Mapping[str, Entry]]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = defaultdict(list)
    for table in tables:
        for key, entry in table.items():
            found[key].append(entry)
    return found


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
    return _mean_points([dict(zip(line["x"], line["y"], strict=True)) for line in drawn])


def _mean_points(lines: Sequence[Mapping[float | None, float | None]]) -> Line:
    """Means with their intervals at the positions where all lines have values."""
    known = [{x for x, y in line.items() if x is not None and y is not None} for line in lines]
    xs = sorted(set.intersection(*known)) if known else []
    found = [mean for x in xs if (mean := _mean(line[x] for line in lines)) is not None]
    return {
        "x": [*xs],
        "y": [mean["mean"] for mean in found],
        "lo": [mean["lo"] for mean in found],
        "hi": [mean["hi"] for mean in found],
    }


def _mean_trend(trends: Sequence[Trend]) -> Trend:
    trend: Trend = {**_mean_line(trends), "why": None, "base": None}
    if any("own" in one for one in trends):
        trend["own"] = 1
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
    floors = [(curve["center"] or 0.0, curve.get("slope") or 0.0) for curve in curves]
    lines = [dict(zip(curve["t"], curve["y"], strict=True)) for curve in curves]
    rises = [
        {t: None if t is None or y is None else y - level - slope * t for t, y in line.items()}
        for line, (level, slope) in zip(lines, floors, strict=True)
    ]
    points, rise = _mean_points(lines), _mean_points(rises)
    mean: Curve = {
        "step": curves[0]["step"],
        "t": points["x"],
        "y": points["y"],
        "lo": points["lo"],
        "hi": points["hi"],
        "center": short(sum(level for level, _ in floors) / len(floors), 9),
        "rise_lo": rise["lo"],
        "rise_hi": rise["hi"],
    }
    if any(slope for _, slope in floors):
        mean["slope"] = short(sum(slope for _, slope in floors) / len(floors), 9)
    if any("relative" in curve for curve in curves):
        mean["relative"] = 1
    if any("own" in curve for curve in curves):
        mean["own"] = 1
    return mean
