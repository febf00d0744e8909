"""The page's data: what the pictures draw, as plain JSON in columns, numbers cut to the digits that show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_lowrank.metrics import CURVES, POINTWISE, SECTIONS, describe, metric_order
from hf_lowrank.report.answer import Group
from hf_lowrank.report.colours import Look
from hf_lowrank.report.curves import curves, plane
from hf_lowrank.report.standings import downstream
from hf_lowrank.report.study import Study
from hf_lowrank.runs.records import RunRecord, finished_or_all

# Beyond this many points a line of a few hundred pixels does not change.
POINTS_OF_A_LINE = 400
DIGITS = 5


def short(value: float | None, digits: int = DIGITS) -> float | None:
    """`value` to `digits` significant digits; None for what JSON cannot hold."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def shorts(values: Iterable[float | None], digits: int = DIGITS) -> list[float | None]:
    return [short(value, digits) for value in values]


def thinned(points: Sequence[tuple[int, float]], limit: int = POINTS_OF_A_LINE) -> list[tuple[float, float]]:
    """At most `limit` points: the means of equal runs of neighbours, x and y alike; the last point stays."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit - 1))
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    means = [
        (math.fsum(x for x, _ in block) / len(block), math.fsum(y for _, y in block) / len(block)) for block in blocks
    ]
    return [*means[:-1], points[-1]]


def _line(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    return {"x": shorts((x for x, _ in points), 8), "y": shorts(y for _, y in points)}


class _Scopes:
    """Layer paths by number, so that each is written once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, scope: str) -> int:
        return self.numbers.setdefault(scope, len(self.numbers))


def _metrics(run: RunRecord, scopes: _Scopes) -> dict[str, Any]:
    """Per metric: the model's values over steps with intervals, and per layer one row of values for each step."""
    found: dict[str, Any] = {}
    layered: dict[str, dict[int, dict[str, float | None]]] = {}
    for row in sorted(run.rows, key=lambda row: row.step):
        if row.metric in POINTWISE:
            continue
        entry = found.setdefault(row.metric, {"x": [], "y": [], "lo": [], "hi": [], "why": None, "base": row.baseline})
        if row.metric == "method_barrier" and row.scope == "model" and row.value is not None:
            entry.setdefault("pairs", {})[row.baseline or ""] = short(row.value)
        if row.baseline != entry["base"]:  # trends follow one baseline, the first; the matrix has them all
            continue
        if row.scope != "model":
            layered.setdefault(row.metric, {}).setdefault(row.step, {})[row.scope] = row.value
        elif row.value is None:
            entry["why"] = row.reason
        else:
            if entry["x"] and entry["x"][-1] == row.step:  # other settings: the last measured is drawn
                for key in ("x", "y", "lo", "hi"):
                    entry[key].pop()
            entry["x"].append(row.step)
            for key, value in (("y", row.value), ("lo", row.ci_low), ("hi", row.ci_high)):
                entry[key].append(short(value))
    for metric, by_step in layered.items():
        names = list(dict.fromkeys(scope for layers in by_step.values() for scope in layers))
        found[metric]["layers"] = {
            "steps": list(by_step),
            "scopes": [scopes.number(name) for name in names],
            "values": [shorts((layers.get(name) for name in names), 4) for layers in by_step.values()],
        }
    for entry in found.values():
        if "pairs" in entry:  # at the last step that each baseline has
            entry["pairs"] = list(entry["pairs"].items())
        if not any(value is not None for value in entry["lo"]):
            del entry["lo"], entry["hi"]
    return found


def _curves(run: RunRecord) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for metric in CURVES:
        for curve in curves(run, metric):
            entry: dict[str, Any] = {"step": curve.step, "t": shorts(curve.t), "y": shorts(curve.mean, 6)}
            if curve.low is not None and curve.high is not None:
                entry["lo"], entry["hi"] = shorts(curve.low, 6), shorts(curve.high, 6)
            if curve.relative:
                entry["relative"] = 1
            if curve.baseline:
                entry["base"] = curve.baseline
            found.setdefault(metric, []).append(entry)
    return found


def _plane(run: RunRecord) -> dict[str, Any] | None:
    found = plane(run)
    if found is None:
        return None
    losses = [shorts(row, 4) for row in found.loss]
    return {"step": found.step, "x": shorts(found.x), "y": shorts(found.y), "loss": losses}


def _add_scores(entries: Sequence[dict[str, Any]], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Gives each run its above-chance means over steps, beside the loss there, and its tasks' last scores; returns
    the tasks."""
    runs = {run.name: run for group in groups for run in group.runs}
    means = {name: steps for group in groups for name, steps in downstream(group.runs)[0].items()}
    tasks: dict[str, dict[str, Any]] = {}
    for entry in entries:
        run = runs[entry["name"]]
        losses = {**dict(run.logged("eval_loss")), **{r.step: r.value for r in run.model_rows("loss") if r.value}}
        steps = sorted(means.get(run.name, {}).items())
        if steps:
            entry["metrics"]["downstream"] = {
                "x": [step for step, _ in steps],
                "y": shorts(value for _, value in steps),
                "why": None,
                "base": None,
            }
        both = [(losses[step], value, step) for step, value in steps if step in losses]
        entry["above"] = {"x": shorts(x for x, _, _ in both), "y": shorts(y for _, y, _ in both)}
        entry["above"]["step"] = [step for _, _, step in both]
        entry["tasks"] = {}
        for score in sorted(run.scores, key=lambda score: (score.limit is None, score.step)):
            if score.group is None:
                key = f"{score.task}:{score.metric}"
                tasks.setdefault(
                    key,
                    {
                        "id": key,
                        "task": score.task,
                        "metric": score.metric,
                        "chance": short(score.chance),
                        "higher": score.higher_is_better,
                    },
                )
                entry["tasks"][key] = [short(v) for v in (score.value, score.ci_low, score.ci_high)] + [score.step]
    return sorted(tasks.values(), key=lambda task: (task["chance"] is None, task["id"]))


def _with_whole_lines(entries: Sequence[dict[str, Any]], unfinished: set[str]) -> list[dict[str, Any]]:
    """Takes from runs that are not finished what finished ones of their method have: the mean of both would end where
    theirs does."""
    for entry in entries:
        if entry["name"] not in unfinished:
            continue
        same = (entry["method"], entry["group"])
        twins = [e for e in entries if (e["method"], e["group"]) == same and e["name"] not in unfinished]
        for kind, line in entry["loss"].items():
            if any(twin["loss"][kind]["x"] for twin in twins):
                line.update(_line([]))
        for part in ("metrics", "curves", "tasks"):
            entry[part] = {key: v for key, v in entry[part].items() if not any(key in twin[part] for twin in twins)}
        if any(twin["plane"] for twin in twins):
            entry["plane"] = None
        if any(twin["above"]["x"] for twin in twins):
            entry["above"] = {"x": [], "y": [], "step": []}
    return [entry for entry in entries if entry["name"] not in unfinished or _draws(entry)]


def _draws(entry: Mapping[str, Any]) -> bool:
    lines = any(line["x"] for line in [*entry["loss"].values(), entry["above"]])
    return lines or any(entry[part] for part in ("metrics", "curves", "tasks", "plane"))


def _study(study: Study, numbers: dict[str, int]) -> dict[str, Any]:
    """The sweep, and what was predicted against what was seen, by number of run."""
    sweep = [
        {
            "method": numbers[rate.member],
            "rate": short(rate.learning_rate),
            "loss": short(rate.loss, 6),
            "chosen": rate.chosen,
            "edge": rate.at_edge,
        }
        for rate in study.sweep
    ]
    found = study.prediction or {}
    keys = ("seen", "predicted_perplexity", "predicted_both")
    sides = [found.get(key) for key in keys]
    whole = all(isinstance(side, list) for side in sides) and len({len(side) for side in sides if side}) == 1
    prediction: dict[str, Any] | None = None
    if whole:
        prediction = {
            key: shorts((_finite(v) for v in side), 5) for key, side in zip(keys, sides, strict=True) if side
        }
        rows = found.get("rows")
        rows = rows if isinstance(rows, list) and len(rows) == len(prediction.get("seen", ())) else []
        prediction["rows"] = [[str(row[0]).rsplit("/", 1)[-1], row[1]] for row in rows]
    claims = [
        [
            *(claim.id, claim.statement, claim.verdict, part.part, part.label),
            *(part.effect, part.low, part.high, part.unit or claim.whole.unit, part.p_value, part.n),
        ]
        for claim in study.claims
        for part in (claim.whole, *claim.details)
    ]
    return {"sweep": sweep, "prediction": prediction, "claims": claims}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def payload(groups: Sequence[Group], study: Study, chosen: Mapping[str, Look]) -> dict[str, Any]:
    """Everything the pictures need; see `figures.js` and `scores.js` for who reads what.

    `chosen` gives every method's look, and by its order its number.
    """
    runs = [(group.id, run) for group in groups for run in group.runs]
    ranked = {run.name for group in groups for run in finished_or_all(group.runs)}
    columns = {column.id: column for group in groups for column in group.columns if column.kind == "number"}
    columns.pop("seed", None)
    finals = {
        run.name: {
            column.id: short(cell.value, 7)
            for column, cell in zip(group.columns, cells, strict=True)
            if column.id in columns and isinstance(cell.value, int | float) and run.name in ranked
        }
        for group in groups
        for run, cells in zip(group.runs, group.cells, strict=True)
    }
    numbers = {name: position for position, name in enumerate(chosen)}
    scopes = _Scopes()
    entries: list[dict[str, Any]] = [
        {
            "name": run.name,
            "method": numbers[run.method],
            "seed": run.seed,
            "group": group,
            "final": finals[run.name],
            "unigram": short(run.fact("unigram_loss")),
            "loss": {
                "eval": _line(thinned(run.logged("eval_loss"))),
                "train": _line(thinned(run.logged("loss"))),
            },
            "metrics": _metrics(run, scopes),
            "curves": _curves(run),
            "plane": _plane(run),
        }
        for group, run in runs
    ]
    tasks = _add_scores(entries, groups)
    entries = _with_whole_lines(entries, {run.name for _, run in runs if run.unfinished})
    metrics = sorted({metric for entry in entries for metric in entry["metrics"]}, key=metric_order)
    return {
        "methods": [
            {"name": name, "title": look.title, "dash": list(look.dash), "marker": look.marker}
            for name, look in chosen.items()
        ],
        "runs": entries,
        "scopes": list(scopes.numbers),
        "tasks": tasks,
        **_study(study, numbers),
        "quantities": {
            column.id: {
                "title": describe(column.id).title if column.id in metrics else column.title,
                "unit": column.unit,
                "help": column.help,
                "dimension": SECTIONS[column.group],
            }
            for column in columns.values()
        },
        "dimensions": SECTIONS,
        "metrics": {
            metric: {
                "title": about.title,
                "short": about.short_title,
                "unit": about.unit,
                "dimension": about.section,
                "meaning": about.summary,
            }
            for metric in metrics
            for about in (describe(metric),)
        },
    }


def script_json(data: Any) -> str:
    """JSON that can stand inside a `<script>` element whatever strings it holds.

    `<`, `>` and `&` are written as escapes, so that no string can end the element or open a comment; the two line
    separators that old JavaScript refuses are escaped too.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
