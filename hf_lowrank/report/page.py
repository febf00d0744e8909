"""The page: one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_lowrank.claims.results import StudyResults, load_results
from hf_lowrank.errors import UserError
from hf_lowrank.formats import big_count, join_words, pluralize
from hf_lowrank.metrics import CURVES, NOT_DENSE_MARK, NOT_DENSE_MEANING, SECTIONS
from hf_lowrank.report.answer import Group, groups, losses_by_method
from hf_lowrank.report.members import (
    DARK_GROUND,
    LIGHT_GROUND,
    TitledLook,
    baseline_of,
    looks,
    sweep_of,
    with_distinct_methods,
)
from hf_lowrank.report.payload import payload, script_json
from hf_lowrank.report.schema import MetricText, Payload, Run
from hf_lowrank.report.sizes import Size, read_size, sizes_view
from hf_lowrank.report.views import claims_view, methods_view, prediction_view, sweep_view
from hf_lowrank.runs.records import RunRecord, load_runs
from hf_lowrank.storage.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

FILE_NAME = "report.html"
# In the order in which they are run; together they are one script.
SCRIPTS = (
    "core.js", "chart.js", "strip.js", "scatter.js", "heat.js", "table.js", "figures.js", "scores.js", "stage.js",
    "boards.js", "page.js",
)  # fmt: skip
_PACKAGES = ("hf-lowrank", "torch", "transformers", "accelerate", "peft")


def write_report(
    runs: Iterable[Any],
    output: str | os.PathLike[str],
    *,
    study: str | os.PathLike[str] | None = None,
    others: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """Writes `report.html` into the folder `output`, whole or not at all, and returns its path.

    The page is self-contained: it loads nothing from anywhere. Losses are compared only among runs of one
    size with the same evaluation fingerprint.

    Args:
        runs: run folders, or objects with a `path` to one.
        output: the folder; made if there is none.
        study: a study's folder, whose claims, prediction, sweep and failures are shown too.
        others: folders of studies of the same methods at other sizes, which are shown side by side.

    Raises:
        UserError: a folder is not a run or a study, has no checkpoint, or has a damaged file; nothing is written then.
    """
    folder_of_study = None if study is None else Path(study)
    sizes = [read_size(Path(other)) for other in others]
    page = render(with_distinct_methods(load_runs(runs), folder_of_study), load_results(folder_of_study), sizes)
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: output must be a folder, got a file")
    path = folder / FILE_NAME
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path


def render(runs: Sequence[RunRecord], study: StudyResults, others: Sequence[Size] = ()) -> str:
    """The page of `runs`, of the study they belong to, and of studies at other sizes, as text."""
    study = replace(study, sweep=sweep_of(runs, study.folder))
    compared = groups(runs, baseline_of(runs, study.folder), study.sweep)
    chosen = looks([*(run.method for run in runs), *(rate.member for rate in study.sweep)])
    numbers = {name: number for number, name in enumerate(chosen)}
    data = payload(compared, study, chosen)
    script = "\n".join(_asset(name) for name in SCRIPTS)
    metrics = data["metrics"]
    several_scales = len({group.size for group in compared}) > 1
    sets = len({group.fingerprint for group in compared})
    page = _environment().get_template("page.html.j2")
    return page.render(
        groups=[{"group": group, **methods_view(group), "dimensions": _dimensions(group)} for group in compared],
        group_choice=_group_choice(compared, sets > 1, several_scales),
        several_scales=several_scales,
        sizes=sizes_view(Size(compared[0], study), others),
        sets=sets,
        metric_choice=_metric_choice(metrics),
        looks=chosen,
        shown_methods=[name for name in chosen if any(run.method == name for run in runs)],
        numbers=numbers,
        style=_asset("page.css") + _asset("evidence.css") + _colours(chosen),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=script_json(data),
        measured=any(run.rows for run in runs),
        several_seeds=any(len(losses) > 1 for losses in losses_by_method(runs).values()),
        run_number={run.name: number for number, run in enumerate(runs)},
        updates={metric for metric in metrics if metric.startswith("update_")},
        losses=any(run.logged("eval_loss") or run.logged("loss") for run in runs),
        trends=_trends(data),
        pictures=_pictures(runs),
        heats=[
            (metric, about["title"], about["meaning"])
            for metric, about in metrics.items()
            if about["dimension"] == "activations" and any("layers" in _of(entry, metric) for entry in data["runs"])
        ],
        planes=any(entry["plane"] for entry in data["runs"]),
        own_parameters=f"{NOT_DENSE_MARK} {NOT_DENSE_MEANING}" if _marked(data) else "",
        layered=any("layers" in found for entry in data["runs"] for found in entry["metrics"].values()),
        barriers=len({row.baseline for run in runs for row in run.rows if row.metric == "method_barrier"}) > 1,
        tasks=data["tasks"],
        scatter=any(entry["above"]["x"] for entry in data["runs"]),
        study=study,
        claims=claims_view(study, chosen),
        prediction=prediction_view(study),
        sweep=sweep_view(study, chosen),
        sweep_rates=any(trial.rate is not None for trial in study.sweep),
        summary=_summary(runs),
        runs=[_made(run) for run in runs],
        packages=_versions(),
        ground={"light": LIGHT_GROUND, "dark": DARK_GROUND},
    )


@cache
def _environment() -> Environment:
    """Cached, since compiling its templates takes ten times as long as filling them."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("hf_lowrank.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _dimensions(group: Group) -> dict[str, str]:
    present = {column.group for column in group.columns}
    return {key: title for key, title in SECTIONS.items() if key in present}


def _group_choice(compared: Sequence[Group], sets: bool, scales: bool) -> tuple[str, list[tuple[int, str]]]:
    """The label of the choice of a group, and its options."""
    name = "Scale and evaluation set" if sets and scales else "Scale" if scales else "Evaluation set"
    options = []
    for group in compared:
        parts = [group.scale] if scales else []
        parts += [group.fingerprint[:10] if group.fingerprint else "no set recorded"] if sets else []
        options.append((group.id, f"{', '.join(parts)} ({pluralize(len(group.runs), 'run')})"))
    return name, options


def _metric_choice(metrics: Mapping[str, MetricText]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Dimensions with their metrics, for the filter by metric."""
    found: dict[str, list[tuple[str, str]]] = {dimension: [] for dimension in SECTIONS}
    for id_, about in metrics.items():
        found[about["dimension"]].append((id_, about["title"]))
    return [(key, title, found[key]) for key, title in SECTIONS.items() if key == "training" or found[key]]


def _asset(name: str) -> str:
    return (resources.files("hf_lowrank.report") / "assets" / name).read_text(encoding="utf-8")


def _colours(chosen: dict[str, TitledLook]) -> str:
    """The methods' colours as custom properties, by position: names of methods never reach the style sheet."""

    def block(tone: str) -> str:
        return "".join(f"--c{number}:{getattr(look, tone)};" for number, look in enumerate(chosen.values()))

    return (
        f":root{{{block('light')}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{block('dark')}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{{block('dark')}}}}}\n"
    )


def _marked(data: Payload) -> bool:
    """Whether anything in the page is of models' own parameters instead of dense weights."""
    found: list[Any] = []
    for run in data["runs"]:
        found += [*run["metrics"].values(), *itertools.chain(*run["curves"].values()), run["plane"] or {}]
    return any("own" in entry for entry in found)


def _of(entry: Run, metric: str) -> Mapping[str, Any]:
    return entry["metrics"].get(metric, {})


def _trends(data: Payload) -> dict[str, list[tuple[str, ...]]]:
    """Per section the pictures over steps: metric, title, meaning, unit, and why it may be empty."""
    found: dict[str, list[tuple[str, ...]]] = {dimension: [] for dimension in SECTIONS}
    for metric, about in data["metrics"].items():
        entries = [_of(entry, metric) for entry in data["runs"]]
        drawn = [entry for entry in entries if entry.get("x") or entry.get("why")]
        if drawn and metric not in ("loss", "perplexity"):
            why = next((entry["why"] for entry in drawn if entry.get("why")), "")
            found[about["dimension"]].append((metric, about["title"], about["meaning"], about["unit"], why))
    return found


def _pictures(runs: Sequence[RunRecord]) -> dict[str, list[tuple[str, ...]]]:
    """Per section the measured curves: metric, title, summary, x axis and metrics."""
    measured = {row.metric for run in runs for row in run.rows}
    found: dict[str, list[tuple[str, ...]]] = {"landscape": [], "interpolation": []}
    for metric, about in CURVES.items():
        if metric in measured:
            found[about.dimension].append((metric, about.title, about.summary, about.axis, " ".join(about.metrics)))
    return found


def _summary(runs: Sequence[RunRecord]) -> list[str]:
    """What was compared, in short phrases."""
    parts = [pluralize(len(runs), "run"), pluralize(len({run.method for run in runs}), "method")]
    if seeds := {run.seed for run in runs if run.seed is not None}:
        parts.append(pluralize(len(seeds), "seed"))
    if sizes := [size for run in runs if (size := run.fact("parameters")) is not None]:
        parts.append(" to ".join(dict.fromkeys((big_count(min(sizes)), big_count(max(sizes))))) + " parameters")
    if rows := sum(len(run.rows) for run in runs):
        parts.append(pluralize(rows, "measurement"))
    if scores := sum(len(run.scores) for run in runs):
        parts.append(pluralize(scores, "downstream score"))
    return parts


def _made(run: RunRecord) -> dict[str, Any]:
    """How a run came about, as text."""
    settings = {row.metric: _scalars(row.settings) for row in run.rows if row.settings}
    versions = run.facts.get("versions")
    return {
        "run": run,
        "method": looks([run.method])[run.method].title,
        "recipe": yaml.safe_dump(_plain(run.recipe), sort_keys=False, allow_unicode=True) if run.recipe else "",
        "facts": _scalars(run.facts),
        "versions": versions if isinstance(versions, dict) else {},
        "settings": yaml.safe_dump(_plain(settings), sort_keys=True, allow_unicode=True) if settings else "",
        "steps": join_words([str(step) for step in run.steps]),
    }


def _scalars(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if not isinstance(value, dict | list)}


def _plain(value: Any) -> Any:
    """What came from YAML or JSON, in the types that YAML can write."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
