"""The page's data: what the pictures draw, as plain JSON in columns, with numbers rounded to the digits that show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from hf_lowrank.claims.results import QUESTIONS, StudyResults
from hf_lowrank.formats import finite_number
from hf_lowrank.metrics import CURVES, POINTWISE, SECTIONS, describe, metric_order
from hf_lowrank.report.answer import Group
from hf_lowrank.report.curves import curves, floor, last_barriers, plane
from hf_lowrank.report.means import method_means
from hf_lowrank.report.members import TitledLook
from hf_lowrank.report.schema import (
    Barrier,
    Curve,
    Line,
    MethodMeans,
    Numbers,
    Payload,
    Plane,
    Prediction,
    Run,
    Task,
    Trend,
    Trial,
    short,
    shorts,
)
from hf_lowrank.report.standings import downstream
from hf_lowrank.runs.records import RunRecord, finished_or_all
from hf_lowrank.statistics import without_outliers

# More points than this change nothing about a line of a few hundred pixels.
POINTS_PER_LINE = 400


def thinned(points: Sequence[tuple[int, float]], limit: int = POINTS_PER_LINE) -> list[tuple[float, float]]:
    """At most `limit` points: the means of equal runs of neighbours, x and y alike; the last point stays."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit - 1))
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(fmean(x for x, _ in block), fmean(y for _, y in block)) for block in blocks]
    return [*means[:-1], points[-1]]


def _line(points: Sequence[tuple[float, float]]) -> Line:
    return {"x": shorts((x for x, _ in points), 8), "y": shorts(y for _, y in points)}


def _metrics(run: RunRecord, scopes: dict[str, int]) -> dict[str, Trend]:
    """Per metric: the model's values over steps with intervals, and per layer one row of values for each step.

    `scopes` numbers the layers' paths, so that each is written once.
    """
    found: dict[str, Trend] = {}
    layered: dict[str, dict[int, dict[str, float | None]]] = {}
    for row in sorted(run.rows, key=lambda row: row.step):
        if row.metric in POINTWISE:
            continue
        entry = found.setdefault(row.metric, {"x": [], "y": [], "lo": [], "hi": [], "why": None, "base": row.baseline})
        if row.baseline != entry["base"]:  # trends follow one baseline, the first; `_barriers` has them all
            continue
        if row.scope != "model":
            layered.setdefault(row.metric, {}).setdefault(row.step, {})[row.scope] = finite_number(row.value)
        elif not row.has_value:
            entry["why"] = row.reason
        else:
            columns = (entry["x"], entry["y"], entry["lo"], entry["hi"])
            if entry["x"] and entry["x"][-1] == row.step:  # other settings: the last measured is drawn
                for column in columns:
                    column.pop()
            for column, value in zip(columns, (row.step, *shorts((row.value, row.ci_low, row.ci_high))), strict=True):
                column.append(value)
            if run.not_dense(row) is not None:
                entry["own"] = 1
    for metric, by_step in layered.items():
        names = list(dict.fromkeys(scope for layers in by_step.values() for scope in layers))
        found[metric]["layers"] = {
            "steps": list(by_step),
            "scopes": [scopes.setdefault(name, len(scopes)) for name in names],
            "values": [shorts((layers.get(name) for name in names), 4) for layers in by_step.values()],
        }
    for entry in found.values():
        if not any(value is not None for value in entry["lo"]):
            del entry["lo"], entry["hi"]
    return found


def _curves(run: RunRecord) -> dict[str, list[Curve]]:
    found: dict[str, list[Curve]] = {}
    for metric in CURVES:
        for curve in curves(run, metric):
            y = shorts(curve.mean, 6)
            level, slope = floor(metric, curve.t, y)
            entry: Curve = {"step": curve.step, "t": shorts(curve.t), "y": y, "center": short(level, 9)}
            if slope:
                entry["slope"] = short(slope, 9)
            if curve.low is not None and curve.high is not None:
                entry["lo"], entry["hi"] = shorts(curve.low, 6), shorts(curve.high, 6)
            if curve.relative:
                entry["relative"] = 1
            if not curve.dense:
                entry["own"] = 1
            if curve.baseline:
                entry["base"] = curve.baseline
            found.setdefault(metric, []).append(entry)
    return found


def _plane(run: RunRecord) -> Plane | None:
    found = plane(run)
    if found is None:
        return None
    losses = [shorts(row, 4) for row in found.loss]
    drawn: Plane = {"step": found.step, "x": shorts(found.x), "y": shorts(found.y), "loss": losses}
    return drawn if found.dense else {**drawn, "own": 1}


def _add_scores(entries: Sequence[Run], groups: Sequence[Group]) -> list[Task]:
    """Gives each run its above-chance means over steps, with the loss there, and its tasks' last scores; returns the
    tasks."""
    runs = {run.name: run for group in groups for run in group.runs}
    means = {name: steps for group in groups for name, steps in downstream(group.runs)[0].items()}
    tasks: dict[str, Task] = {}
    for entry in entries:
        run = runs[entry["name"]]
        losses = {
            **dict(run.logged("eval_loss")),
            **{r.step: r.value for r in run.model_rows("loss") if finite_number(r.value)},
        }
        steps = sorted(means.get(run.name, {}).items())
        if steps:
            entry["metrics"]["downstream"] = {**_line(steps), "why": None, "base": None}
        both = [(losses[step], value, step) for step, value in steps if step in losses]
        entry["above"] = {
            "x": shorts(x for x, _, _ in both),
            "y": shorts(y for _, y, _ in both),
            "step": [step for _, _, step in both],
        }
        for score in sorted(run.scores, key=lambda score: (score.limit is None, score.step)):
            if score.group is None:
                key = f"{score.task}:{score.metric}"
                if key not in tasks:
                    tasks[key] = {
                        "id": key,
                        "task": score.task,
                        "metric": score.metric,
                        "chance": short(score.chance),
                        "higher": score.higher_is_better,
                    }
                entry["tasks"][key] = [*shorts((score.value, score.ci_low, score.ci_high)), score.step]
    return sorted(tasks.values(), key=lambda task: (task["chance"] is None, task["id"]))


def _prefer_finished(entries: Sequence[Run], unfinished: set[str]) -> list[Run]:
    """The entries without what an unfinished run has in common with a finished one of its method: a mean of both would
    end where the unfinished one does."""
    for entry in entries:
        if entry["name"] not in unfinished:
            continue
        same = (entry["method"], entry["group"])
        twins = [e for e in entries if (e["method"], e["group"]) == same and e["name"] not in unfinished]
        for kind in ("eval", "train"):
            if any(twin["loss"][kind]["x"] for twin in twins):
                entry["loss"][kind] = _line([])
        for part in ("metrics", "curves", "tasks"):
            for key in [key for key in entry[part] if any(key in twin[part] for twin in twins)]:
                del entry[part][key]
        if any(twin["plane"] for twin in twins):
            entry["plane"] = None
        if any(twin["above"]["x"] for twin in twins):
            entry["above"] = {"x": [], "y": [], "step": []}
    return [entry for entry in entries if entry["name"] not in unfinished or _has_pictures(entry)]


def _has_pictures(entry: Run) -> bool:
    lines = any(line["x"] for line in (*entry["loss"].values(), entry["above"]))  # type: ignore[index]
    return bool(lines or entry["metrics"] or entry["curves"] or entry["tasks"] or entry["plane"])


def _barriers(groups: Sequence[Group], entries: Sequence[Run], numbers: Mapping[str, int]) -> list[Barrier]:
    """The mean barrier between every two methods that were measured against each other, either one as baseline."""
    shown = {entry["name"] for entry in entries if "method_barrier" in entry["metrics"]}
    barriers: list[Barrier] = []
    for group in groups:
        method_of = {run.name: numbers[run.method] for run in group.runs}
        found: dict[tuple[int | str, int | str], list[float]] = {}
        columns = set()
        for run in group.runs:
            for baseline, row in last_barriers(run).items() if run.name in shown else ():
                own, other = method_of[run.name], method_of.get(baseline, baseline)
                columns.add(other)
                for pair in {(own, other), (other, own)}:
                    found.setdefault(pair, []).append(short(row.value) or 0.0)
        barriers += [
            {"group": group.id, "row": row, "column": column, "value": short(sum(values) / len(values), 7)}
            for (row, column), values in found.items()
            if column in columns
        ]
    return barriers


def _heat_scales(entries: Sequence[Run], means: Sequence[MethodMeans]) -> dict[str, Numbers]:
    """Both ends of the scale of each metric's heat maps, by group and metric, from what is drawn: means, or runs."""
    averaged = {(entry["group"], entry["method"]) for entry in means}
    drawn = [*means, *(entry for entry in entries if (entry["group"], entry["method"]) not in averaged)]
    found: dict[str, list[float]] = {}
    for entry in drawn:
        for metric, trend in entry["metrics"].items():
            layers = trend.get("layers")
            values = [
                value for column in (layers["values"] if layers else []) for value in column if value is not None
            ]
            found.setdefault(f"{entry['group']} {metric}", []).extend(values)
    return {key: [*without_outliers(values)] for key, values in found.items() if values}


def _trials(study: StudyResults, numbers: Mapping[str, int]) -> list[Trial]:
    return [
        {
            "method": numbers[trial.member],
            "rate": short(trial.rate),
            "loss": short(trial.loss, 6),
            "chosen": trial.chosen,
            "edge": bool(trial.at_edges),
            "varied": len(trial.tried) > 1,
        }
        for trial in study.sweep
    ]


def _predictions(study: StudyResults) -> list[Prediction]:
    """Predicted against observed scores, per question that has an answer."""
    content = study.prediction or {}
    found = (_prediction(name, content[name]) for name in QUESTIONS if name in content)
    return [prediction for prediction in found if prediction is not None]


def _prediction(name: str, found: Mapping[str, Any]) -> Prediction | None:
    """None if the file has no lists of one length."""
    sides = [found.get(key) for key in ("observed", "predicted_perplexity", "predicted_both")]
    if not all(isinstance(side, list) and side for side in sides) or len({len(side) for side in sides if side}) != 1:
        return None
    observed, alone, both = (shorts(finite_number(value) for value in side or ()) for side in sides)
    rows = found.get("rows")
    rows = rows if isinstance(rows, list) and len(rows) == len(observed) else []
    return {
        "question": name,
        "observed": observed,
        "predicted_perplexity": alone,
        "predicted_both": both,
        "rows": [[str(row[0]).rsplit("/", 1)[-1], row[1]] for row in rows],
    }


def _claims(study: StudyResults) -> list[list[Any]]:
    """One row per claim and per comparison, for the CSV."""
    return [
        [
            *(claim.id, claim.statement, claim.verdict, part.part, part.label),
            *(part.effect, part.ci_low, part.ci_high, part.unit or claim.unit, part.p_value, part.n or None),
        ]
        for claim in study.claims
        for part in (claim.overall, *claim.details)
    ]


def payload(groups: Sequence[Group], study: StudyResults, chosen: Mapping[str, TitledLook]) -> Payload:
    """Everything the pictures need; `chosen` gives every method's look, and by its order its number."""
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
    scopes: dict[str, int] = {}
    entries: list[Run] = [
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
            "above": {"x": [], "y": [], "step": []},
            "tasks": {},
        }
        for group, run in runs
    ]
    tasks = _add_scores(entries, groups)
    entries = _prefer_finished(entries, {run.name for _, run in runs if run.unfinished})
    metrics = sorted({metric for entry in entries for metric in entry["metrics"]}, key=metric_order)
    means = method_means(entries)
    return {
        "methods": [
            {"name": name, "title": look.title, "dash": list(look.dash), "marker": look.marker}
            for name, look in chosen.items()
        ],
        "runs": entries,
        "means": means,
        "barriers": _barriers(groups, entries, numbers),
        "scopes": list(scopes),
        "tasks": tasks,
        "sweep": _trials(study, numbers),
        "predictions": _predictions(study),
        "claims": _claims(study),
        "heats": _heat_scales(entries, means),
        "quantities": {
            column.id: {
                "title": describe(column.id).title if column.id in metrics else column.title,
                "unit": column.unit,
                "help": f"{column.help.removesuffix('.')}.",
                "dimension": SECTIONS[column.group],
            }
            for column in columns.values()
        },
        "dimensions": dict(SECTIONS.items()),
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
    """JSON that is safe inside a `<script>` element, whatever strings it holds.

    `<`, `>` and `&` are written as escapes, so that no string can end the element or open a comment; the two line
    separators that old JavaScript refuses are escaped too.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
