"""The pictures as matplotlib figures, for papers and notebooks: the page's data, colours and line styles.

Every function takes runs (folders, objects with a `path`, or records of runs as they are), draws methods as means over
their seeds with 95 % intervals where there are several, and returns a `matplotlib.figure.Figure` that belongs to no
window; save it with `figure.savefig(path)`. All raise `UserError` if a folder is not a run or nothing was measured to
draw.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.formats import finite_number
from hf_lowrank.metrics import CURVES, NOT_DENSE_MARK, NOT_DENSE_MEANING, describe, metric_order
from hf_lowrank.report.curves import Plane, curves, floor, last_barriers, plane
from hf_lowrank.report.members import LIGHT_GROUND, looks, with_distinct_methods
from hf_lowrank.runs.measurements import Measurement
from hf_lowrank.runs.records import RunRecord, finished_or_all, load_runs
from hf_lowrank.statistics import mean_interval, without_outliers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Mapping[float, float]
_MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "up": "^", "down": "v", "cross": "X", "plus": "P", "hexagon": "h",
    "pentagon": "p", "star": "*",
}  # fmt: skip
_INK, _SOFT, _RULE = "#1f1d1a", "#5c574f", "#dcd7cc"
_MOST_MARKS = 24
# One metric of each dimension.
SOLUTIONS = ("random_sharpness", "weight_effective_rank", "update_norm", "activation_cka")


def loss_curves(runs: Iterable[Any], *, train: bool = False) -> Figure:
    """Validation loss (or the training loss) in nats per token by step."""
    records = _comparable(runs)
    key = "loss" if train else "eval_loss"
    lines = {run.name: {float(step): loss for step, loss in run.logged(key)} for run in records}
    figure, (axes,) = _figure(1)
    _by_method(axes, records, lines, "no loss was logged")
    axes.set(xlabel="step", ylabel=f"{'training' if train else 'validation'} loss (nats per token)")
    return _finished(figure, records)


def line_curves(
    runs: Iterable[Any],
    metric: str = "random_curve",
    *,
    step: int | None = None,
    rise: bool = True,
    baseline: str | None = None,
) -> Figure:
    """Loss along a line in weight space with its band: random or PCA directions, or the path between two models.

    Args:
        runs: the runs.
        metric: `random_curve`, `pca1_curve`, `pcak_curve`, `step_path`, `method_path`, `aligned_method_path` or
            `curved_method_path`.
        step: the checkpoint; None for each run's last measured one.
        rise: draw the rise above the trained model (above the chord for a path), not the loss itself.
        baseline: draw only paths to the run of this name; None for each run's last measured one.
    """
    if metric not in CURVES:
        raise UserError(f"metric must be a curve, got {metric!r}; {nearest(metric, CURVES)}")
    records = _comparable(runs)
    lines: dict[str, Points] = {}
    bands: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] = {}
    along = CURVES[metric].axis
    own = set()
    for run in records:
        found = [c for c in curves(run, metric) if step in (None, c.step) and baseline in (None, c.baseline)]
        curve = found[-1] if found else None
        known = {t: v for t, v in zip(curve.t, curve.mean, strict=True) if v is not None} if curve else {}
        if curve is None or not known:
            continue
        level, slope = floor(metric, curve.t, curve.mean) if rise else (0.0, 0.0)
        under = {t: (level or 0.0) + (slope or 0.0) * t for t in curve.t}
        lines[run.name] = {t: value - under[t] for t, value in known.items()}
        if curve.low is not None and curve.high is not None:
            low, high = (
                tuple(value - under[t] for t, value in zip(curve.t, side, strict=True))
                for side in (curve.low, curve.high)
            )
            bands[run.name] = (curve.t, low, high)
        if curve.relative:
            along = "distance, in root-mean-square weights"
        if not curve.dense:
            own.add(run.name)
    figure, (axes,) = _figure(1)
    _by_method(axes, records, lines, f"no {metric} was measured", bands=bands, marks=False, own=own)
    axes.set(xlabel=along, ylabel="rise of the loss (nats)" if rise else "loss (nats per token)")
    return _finished(figure, records)


def interpolation_paths(
    runs: Iterable[Any], *, step: int | None = None, metric: str = "method_path", baseline: str | None = None
) -> Figure:
    """Loss above the chord on the straight line from each run to its baseline, by position."""
    return line_curves(runs, metric, step=step, baseline=baseline)


def landscapes(runs: Iterable[Any], *, step: int | None = None) -> Figure:
    """The loss on a plane of two directions, one picture for each method (its best run), all on one scale."""
    records = _comparable(runs)
    best: dict[str, tuple[RunRecord, Plane]] = {}
    for run in sorted(records, key=lambda run: (run.final_loss is None, run.final_loss or 0.0), reverse=True):
        if (one := plane(run, step)) is not None:
            best[run.method] = (run, one)
    planes = [best[method] for method in looks(best)]
    if not planes:
        raise UserError("no random_plane was measured in these runs; measure with --metrics random_plane")
    grids = [np.array(one.loss, dtype=float) for _, one in planes]
    rises = [grid - np.nanmin(grid) for grid in grids]
    levels = np.linspace(0, 1, 13) ** 2 * max(float(np.nanmax(rise)) for rise in rises)
    figure, axes = _figure(len(planes), size=(3.0, 2.9))
    for (run, one), rise, axis in zip(planes, rises, axes, strict=True):
        drawn = axis.contourf(one.x, one.y, rise, levels=levels, cmap="Blues")
        axis.contour(one.x, one.y, rise, levels=levels[1:], colors=_SOFT, linewidths=0.4)
        axis.plot(0, 0, marker="+", color=_INK, markersize=7)
        title = _title(run, records) if one.dense else f"{_title(run, records)} {NOT_DENSE_MARK}"
        axis.set(title=title, aspect="equal")
        axis.grid(visible=False)
    figure.colorbar(drawn, ax=list(axes), label="rise of the loss (nats)", shrink=0.8, format="%.2g")
    return _finished(figure, ())


def trends(runs: Iterable[Any], metrics: Sequence[str] | None = None) -> Figure:
    """Metrics of the whole model over steps, in small multiples; None for the spectral ones that were measured."""
    records = _comparable(runs)
    measured = {row.metric for run in records for row in run.rows if row.scope == "model" and row.has_value}
    chosen = [m for m in sorted(measured, key=metric_order) if describe(m).section == "spectra"]
    if metrics is not None:
        chosen = list(metrics)
        for metric in chosen:
            if metric not in measured:
                raise UserError(f"metric {metric!r} was not measured in these runs; {nearest(metric, measured)}")
    if not chosen:
        raise UserError("no spectral metric was measured in these runs; measure them first")
    figure, axes = _figure(len(chosen), size=(3.2, 2.4))
    for metric, axis in zip(chosen, axes, strict=True):
        rows = {run.name: [row for row in run.model_rows(metric) if row.has_value] for run in records}
        lines = {name: {float(r.step): r.value for r in found} for name, found in rows.items()}
        bands = {
            name: ([r.step for r in found], [r.ci_low for r in found], [r.ci_high for r in found])
            for name, found in rows.items()
            if found and all(r.has_interval for r in found)
        }
        own = {run.name for run in records if any(run.not_dense(row) for row in rows[run.name])}
        _by_method(axis, records, lines, f"no {metric} was measured", bands=bands, own=own)
        axis.set_title(describe(metric).title_with_unit)
        axis.set_xlabel("step")
    return _finished(figure, records)


def layer_profiles(runs: Iterable[Any], metric: str = "weight_effective_rank", *, step: int | None = None) -> Figure:
    """A spectral metric of every kind of matrix over the depth of the network, at one step (None: each run's last)."""
    from matplotlib.ticker import MaxNLocator

    records = _comparable(runs)
    profiles: dict[str, dict[str, dict[float, float]]] = {}
    for run in records:
        for (kind, block), value in _layers(run, metric, step).items():
            profiles.setdefault(kind, {}).setdefault(run.name, {})[float(block)] = value
    if not profiles:
        raise UserError(f"metric {metric!r} has no layers in these runs; measure it first")
    figure, axes = _figure(len(profiles), size=(2.8, 2.2))
    for (kind, lines), axis in zip(profiles.items(), axes, strict=True):
        _by_method(axis, records, lines, "")
        axis.set_title(kind)
        axis.set_xlabel("block")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supylabel(describe(metric).title, fontsize=9, color=_SOFT)
    return _finished(figure, records)


def layer_step_map(runs: Iterable[Any], metric: str = "activation_cka") -> Figure:
    """Layer × step heat maps of a metric, one for each method (mean over its runs), all on one scale; triangles mark
    values beyond it."""
    records = _comparable(runs)
    tables: dict[str, dict[tuple[str, int], list[float]]] = {}
    for run in records:
        for row in _layer_rows(run, metric):
            tables.setdefault(run.method, {}).setdefault((row.scope, row.step), []).append(row.value)
    if not tables:
        raise UserError(f"metric {metric!r} has no layers in these runs; measure it first")
    means = {m: {key: float(np.mean(values)) for key, values in table.items()} for m, table in tables.items()}
    low, high = without_outliers([value for table in means.values() for value in table.values()])
    chosen = {method: look for method, look in looks(run.method for run in records).items() if method in means}
    figure, axes = _figure(len(chosen), size=(2.6, 2.4))
    for (method, look), axis in zip(chosen.items(), axes, strict=True):
        table = means[method]
        scopes = list(dict.fromkeys(scope for scope, _ in table))
        steps = sorted({step for _, step in table})
        grid = np.array([[table.get((scope, step), np.nan) for step in steps] for scope in scopes])
        drawn = axis.imshow(grid, aspect="auto", cmap="Blues", vmin=low, vmax=high)
        for (i, j), value in np.ndenumerate(grid):
            if value < low or value > high:
                marks: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6}
                axis.text(j, i, "▴" if value > high else "▾", color="white" if value > high else "black", **marks)
        axis.set_xticks(range(len(steps)), [str(step) for step in steps], rotation=45 if len(steps) > 6 else 0)
        axis.set_yticks(range(len(scopes)), [scope.removeprefix("model.") for scope in scopes])
        axis.set(title=look.title, xlabel="step")
        axis.grid(visible=False)
    figure.colorbar(drawn, ax=list(axes), label=describe(metric).title, shrink=0.8)
    return _finished(figure, ())


def barrier_matrix(runs: Iterable[Any], *, step: int | None = None, metric: str = "method_barrier") -> Figure:
    """The barrier in nats between every two methods that were measured against each other, mean over runs."""
    records = _comparable(runs)
    by_name = {run.name: run for run in records}
    pairs: dict[tuple[str, str], list[float]] = {}
    for run in records:
        for baseline, row in last_barriers(run, metric, step).items():
            other = by_name[baseline].method if baseline in by_name else baseline
            for pair in {(run.method, other), (other, run.method)}:
                pairs.setdefault(pair, []).append(row.value)
    if not pairs:
        raise UserError(f"no {metric} was measured in these runs; measure it with a baseline first")
    chosen = looks(name for pair in pairs for name in pair)
    names = list(chosen)
    grid = np.array([[float(np.mean(pairs[a, b])) if (a, b) in pairs else np.nan for b in names] for a in names])
    figure, (axes,) = _figure(1, size=(1.6 + 0.75 * len(names), 1.2 + 0.6 * len(names)))
    drawn = axes.imshow(grid, cmap="Blues", vmin=0.0)
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            dark = value > 0.6 * np.nanmax(grid)
            axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=8, color="white" if dark else _INK)
    titles = [look.title for look in chosen.values()]
    axes.set_xticks(range(len(names)), titles, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), titles)
    axes.grid(visible=False)
    figure.colorbar(drawn, ax=axes, label="barrier (nats)", shrink=0.8)
    return _finished(figure, ())


def solutions(runs: Iterable[Any], metrics: Sequence[str] = SOLUTIONS) -> Figure:
    """What kind of solution each method found: a metric at the last step against the perplexity, in small multiples.

    A mark is a method's mean over its runs, a cross its 95 % intervals; equal perplexity, different height: different
    solutions. Metrics that no run has are left out, and unfinished runs of a method that has finished ones.
    """
    records = [run for run in _comparable(runs) if run.perplexity is not None]
    heights = {
        metric: {run.name: finite_number(row.value) for run in records if (row := run.last(metric)) is not None}
        for metric in metrics
    }
    drawn = [metric for metric, found in heights.items() if any(value is not None for value in found.values())]
    if not drawn:
        raise UserError(f"none of {', '.join(metrics)} was measured in these runs; measure them first")
    figure, axes = _figure(len(drawn), size=(3.4, 3.0))
    for metric, axis in zip(drawn, axes, strict=True):
        for method, look in looks(run.method for run in records).items():
            having = [run for run in records if run.method == method and heights[metric].get(run.name) is not None]
            points = [(run.perplexity, heights[metric][run.name]) for run in finished_or_all(having)]
            if points:
                x, y = (mean_interval([float(side) for side in values]) for values in zip(*points, strict=True))
                bars = [[[e.value - e.low], [e.high - e.value]] if e.has_interval else None for e in (x, y)]
                own = any((row := run.last(metric)) is not None and run.not_dense(row) for run in having)
                axis.errorbar(
                    x.value, y.value, xerr=bars[0], yerr=bars[1], color=look.light, marker=_MARKERS[look.marker],
                    markersize=6, linestyle="none", elinewidth=1, label=look.title,
                )  # fmt: skip
                if own:
                    _mark(axis, x.value, y.value, look.light)
        axis.set(xlabel="perplexity", title=describe(metric).title_with_unit)
    return _finished(figure, records)


PLOTS: dict[str, Callable[..., Figure]] = {
    function.__name__: function
    for function in (
        loss_curves, line_curves, interpolation_paths, landscapes, trends, layer_profiles, layer_step_map,
        barrier_matrix, solutions,
    )
}  # fmt: skip


def _comparable(runs: Iterable[Any]) -> list[RunRecord]:
    """The records of runs, which must share one evaluation set; other settings of a method are another one."""
    given = [runs] if isinstance(runs, str | os.PathLike) else [*runs]
    records = [run for run in given if isinstance(run, RunRecord)]
    records = with_distinct_methods(records if records and len(records) == len(given) else load_runs(given))
    marks = sorted({run.fingerprint[:12] if run.fingerprint else "none" for run in records})
    if len(marks) > 1:
        raise UserError(f"runs must share one evaluation set to be drawn together, got {', '.join(marks)}")
    return records


def _title(run: RunRecord, records: Sequence[RunRecord]) -> str:
    title = looks([run.method])[run.method].title
    twins = [other for other in records if other.method == run.method]
    return title if len(twins) == 1 else f"{title}, {run.name if run.seed is None else f'seed {run.seed}'}"


def _mark(axes: Axes, x: float, y: float, colour: str) -> None:
    """Marks a point whose number is of the model's own parameters instead of dense weights."""
    axes.annotate(NOT_DENSE_MARK, (x, y), (3, 3), textcoords="offset points", color=colour, fontsize=10)


def _layer_rows(run: RunRecord, metric: str) -> list[Measurement]:
    return [row for row in run.rows if row.metric == metric and row.scope != "model" and row.has_value]


def _layers(run: RunRecord, metric: str, step: int | None) -> dict[tuple[str, int], float]:
    """Values by (kind of layer, block) at `step` or the last step that has any."""
    rows = _layer_rows(run, metric)
    at = max((row.step for row in rows), default=0) if step is None else step
    found = {}
    for row in rows:
        parts = row.scope.split(".")
        block = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if row.step == at and block is not None:
            found[".".join(parts[block + 1 :]) or parts[0], int(parts[block])] = row.value
    return found


def _figure(count: int, size: tuple[float, float] = (7.2, 4.0)) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes of `size` inches each in rows of up to four."""
    from matplotlib.figure import Figure

    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained", facecolor=LIGHT_GROUND)
    axes = [figure.add_subplot(rows, columns, number + 1, facecolor=LIGHT_GROUND) for number in range(count)]
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(_SOFT)
        axis.grid(axis="y", color=_RULE, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(colors=_SOFT, labelsize=8, length=0)
    return figure, axes


def _by_method(
    axes: Axes,
    records: Sequence[RunRecord],
    lines: Mapping[str, Points],
    empty: str,
    *,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] | None = None,
    marks: bool = True,
    own: Collection[str] = (),
) -> None:
    """One line for each method: its run with its own band, or the mean over its runs with the t interval; `own`: runs
    whose own parameters were moved instead of dense weights."""
    drawn = False
    for method, look in looks(run.method for run in records).items():
        having = [run for run in records if run.method == method and lines.get(run.name)]
        members = [run.name for run in finished_or_all(having)]
        if not members:
            continue
        drawn = True
        common = sorted(set.intersection(*(set(lines[name]) for name in members)))
        estimates = [mean_interval([lines[name][x] for name in members]) for x in common]
        axes.plot(
            common, [estimate.value for estimate in estimates], label=look.title, color=look.light, linewidth=1.6,
            linestyle=(0, look.dash) if look.dash else "-",
            marker=_MARKERS[look.marker] if marks and len(common) <= _MOST_MARKS else None, markersize=4,
        )  # fmt: skip
        if common and any(name in own for name in members):
            _mark(axes, common[-1], estimates[-1].value, look.light)
        if len(members) > 1:
            low, high = zip(*((e.low, e.high) for e in estimates), strict=True)
            axes.fill_between(common, low, high, color=look.light, alpha=0.16, linewidth=0)
        elif bands and members[0] in bands:
            axes.fill_between(*bands[members[0]], color=look.light, alpha=0.16, linewidth=0)
    if not drawn and empty:
        raise UserError(f"{empty} in these runs; measure them first")


def _finished(figure: Figure, records: Sequence[RunRecord]) -> Figure:
    """Sets the type, and adds one legend for the whole figure where more than one method is drawn."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set(fontsize=9, color=_INK)
        axes.tick_params(labelsize=8)
        handles, labels = axes.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            entries.setdefault(str(label), handle)
    if any(text.get_text().endswith(NOT_DENSE_MARK) for axes in figure.axes for text in (axes.title, *axes.texts)):
        note = f"{NOT_DENSE_MARK} {NOT_DENSE_MEANING}"
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color=_SOFT)
    if len({run.method for run in records}) > 1:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside upper left",
            ncols=min(len(entries), int(figure.get_figwidth() / 1.25)),
            frameon=False,
            fontsize=8.5,
            labelcolor=_INK,
        )
    return figure
