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
    """

    step: int
    baseline: str | None
    t: tuple[float, ...]
    mean: tuple[float | None, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    n: int | None
    relative: bool


def curves(run: RunRecord, metric: str) -> list[Curve]:
    """The curves of `metric`, in step order; the last measured one if a step has several settings."""
    sweeps: dict[tuple[int, str | None], dict[str, dict[float, tuple[float | None, ...]]]] = {}
    counts: dict[tuple[int, str | None], int | None] = {}
    for row in run.rows:
        t = row.settings.get("t")
        if row.metric != metric or row.scope != "model" or isinstance(t, bool) or not isinstance(t, int | float):
            continue
        if not math.isfinite(t):
            continue
        rest = json.dumps({key: value for key, value in row.settings.items() if key != "t"}, sort_keys=True)
        line = sweeps.setdefault((row.step, row.baseline), {}).setdefault(rest, {})
        line[float(t)] = (finite_number(row.value), finite_number(row.ci_low), finite_number(row.ci_high))
        counts[row.step, row.baseline] = row.n
    found = []
    for (step, baseline), by_settings in sorted(sweeps.items(), key=lambda item: (item[0][0], item[0][1] or "")):
        settings, line = list(by_settings.items())[-1]
        unit = _relative_unit(json.loads(settings), line)
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
                n=counts[step, baseline],
                relative=unit is not None,
            )
        )
    return found


def center(metric: str, t: Sequence[float | None], losses: Sequence[float | None]) -> float | None:
    """What a curve's rise is measured from: the mean of both ends of a path, else the loss at the model itself."""
    known = {
        position: loss for position, loss in zip(t, losses, strict=True) if position is not None and loss is not None
    }
    if not known:
        return None
    if metric.endswith("_path"):
        return (known[min(known)] + known[max(known)]) / 2
    return known.get(0.0, min(known.values()))


def last_barriers(run: RunRecord, metric: str = "method_barrier", step: int | None = None) -> dict[str, Measurement]:
    """The barriers of `run` by baseline, at `step` or the last step that each has."""
    rows = run.model_rows(metric)
    return {row.baseline: row for row in rows
            if row.has_value and row.baseline and step in (None, row.step)}  # fmt: skip


@dataclass(frozen=True)
class Plane:
    """Losses in nats over two directions: `loss[i][j]` at (x[j], y[i]), None where nothing was measured."""

    step: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: tuple[tuple[float | None, ...], ...]


def plane(run: RunRecord, step: int | None = None) -> Plane | None:
    """The loss on a plane through the weights at `step` (the last measured one for None), None without any."""
    points: dict[int, dict[tuple[float, float], float | None]] = {}
    for row in run.rows:
        x, y = row.settings.get("x"), row.settings.get("y")
        if row.metric == PLANE and isinstance(x, int | float) and isinstance(y, int | float):
            points.setdefault(row.step, {})[float(x), float(y)] = finite_number(row.value)
    if not points or (step is not None and step not in points):
        return None
    chosen = max(points) if step is None else step
    found = points[chosen]
    xs, ys = sorted({x for x, _ in found}), sorted({y for _, y in found})
    return Plane(chosen, tuple(xs), tuple(ys), tuple(tuple(found.get((x, y)) for x in xs) for y in ys))


def _relative_unit(settings: Mapping[str, Any], line: Iterable[float]) -> float | None:
    """The root-mean-square weight of a sweep whose radius was given in units of it, so that sizes compare."""
    radius, furthest = settings.get("radius"), max(abs(t) for t in line)
    if settings.get("relative") is not True or not isinstance(radius, int | float) or not radius or not furthest:
        return None
    return furthest / float(radius)
