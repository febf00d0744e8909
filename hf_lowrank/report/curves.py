"""Loss curves along lines in weight space, assembled from their rows.

`measurements.jsonl` keeps a sweep as one row for each offset: metric `random_curve` (`pca1_curve`, `pcak_curve`,
`step_path`, `method_path`), the offset as `settings["t"]`, the mean loss as value and its 95 % band as interval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_lowrank.formats import finite_number
from hf_lowrank.metrics import PLANE
from hf_lowrank.runs.measurements import Measurement
from hf_lowrank.runs.records import RunRecord


@dataclass(frozen=True)
class Curve:
    """Losses in nats along a line: positions `t` ascending, `mean`, and the 95 % band where there were several draws.

    `relative`: `t` is in units of the model's root-mean-square weight rather than of the weights themselves.
    `dense`: False where the model's own parameters were moved instead of dense weights.
    """

    step: int
    baseline: str | None
    t: tuple[float, ...]
    mean: tuple[float | None, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    n: int | None
    relative: bool
    dense: bool


def curves(run: RunRecord, metric: str) -> list[Curve]:
    """The curves of `metric`, in step order; the last measured one if a step has several settings."""
    sweeps: dict[tuple[int, str | None], dict[str, dict[float, tuple[float | None, ...]]]] = {}
    last_rows: dict[tuple[int, str | None, str], Measurement] = {}
    for row in run.rows:
        t = row.settings.get("t")
        if row.metric != metric or row.scope != "model" or isinstance(t, bool) or not isinstance(t, int | float):
            continue
        if not math.isfinite(t):
            continue
        rest = json.dumps({key: value for key, value in row.settings.items() if key != "t"}, sort_keys=True)
        line = sweeps.setdefault((row.step, row.baseline), {}).setdefault(rest, {})
        line[float(t)] = (finite_number(row.value), finite_number(row.ci_low), finite_number(row.ci_high))
        last_rows[row.step, row.baseline, rest] = row
    found = []
    for (step, baseline), by_settings in sorted(sweeps.items(), key=lambda item: (item[0][0], item[0][1] or "")):
        settings, line = list(by_settings.items())[-1]
        unit, row = _relative_unit(json.loads(settings), line), last_rows[step, baseline, settings]
        points = sorted(line.items())
        lows = tuple(low for _, (_, low, _) in points if low is not None)
        highs = tuple(high for _, (_, _, high) in points if high is not None)
        banded = len(lows) == len(highs) == len(points)
        found.append(
            Curve(
                step=step,
                baseline=baseline,
                t=tuple(float(f"{t / (unit or 1.0):.6g}") for t, _ in points),
                mean=tuple(mean for _, (mean, _, _) in points),
                low=lows if banded else None,
                high=highs if banded else None,
                n=row.n,
                relative=unit is not None,
                dense=run.not_dense(row) is None,
            )
        )
    return found


def floor(
    metric: str, t: Sequence[float | None], losses: Sequence[float | None]
) -> tuple[float, float] | tuple[None, None]:
    """What a curve's rise is measured from, as its level at 0 and its slope: the chord of a path between its ends at 0
    and 1, else the loss at the model itself. (None, None) without any loss."""
    known = {
        position: loss for position, loss in zip(t, losses, strict=True) if position is not None and loss is not None
    }
    if not known:
        return None, None
    if metric.endswith("_path"):
        start, end = min(known, key=abs), min(known, key=lambda position: abs(position - 1))
        slope = (known[end] - known[start]) / (end - start) if end != start else 0.0
        return known[start] - slope * start, slope
    return known.get(0.0, min(known.values())), 0.0


def last_barriers(run: RunRecord, metric: str = "method_barrier", step: int | None = None) -> dict[str, Measurement]:
    """The barriers of `run` by baseline, at `step` or the last step that each has."""
    rows = run.model_rows(metric)
    return {row.baseline: row for row in rows
            if row.has_value and row.baseline and step in (None, row.step)}  # fmt: skip


@dataclass(frozen=True)
class Plane:
    """Losses in nats over two directions: `loss[i][j]` at (x[j], y[i]), None where nothing was measured; `dense` as
    for a curve."""

    step: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: tuple[tuple[float | None, ...], ...]
    dense: bool


def plane(run: RunRecord, step: int | None = None) -> Plane | None:
    """The loss on a plane through the weights at `step` (the last measured one for None), None without any."""
    sweeps: dict[int, dict[str, list[Measurement]]] = {}
    for row in run.rows:
        if row.metric == PLANE and all(isinstance(row.settings.get(key), int | float) for key in "xy"):
            rest = json.dumps({key: value for key, value in row.settings.items() if key not in "xy"}, sort_keys=True)
            sweeps.setdefault(row.step, {}).setdefault(rest, []).append(row)
    if not sweeps or (step is not None and step not in sweeps):
        return None
    chosen = max(sweeps) if step is None else step
    rows = list(sweeps[chosen].values())[-1]  # the last measured one if a step has several settings
    found = {(float(row.settings["x"]), float(row.settings["y"])): finite_number(row.value) for row in rows}
    xs, ys = sorted({x for x, _ in found}), sorted({y for _, y in found})
    losses = tuple(tuple(found.get((x, y)) for x in xs) for y in ys)
    return Plane(chosen, tuple(xs), tuple(ys), losses, run.not_dense(rows[-1]) is None)


def _relative_unit(settings: Mapping[str, Any], line: Iterable[float]) -> float | None:
    """The root-mean-square weight of a sweep whose radius was given in units of it, so that sizes compare."""
    radius, furthest = settings.get("radius"), max(abs(t) for t in line)
    if settings.get("relative") is not True or not isinstance(radius, int | float) or not radius or not furthest:
        return None
    return furthest / float(radius)
