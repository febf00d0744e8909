"""A figure of predicted scores, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hf_lowrank.downstream.prediction import Prediction, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8


def prediction_figure(table: Table, prediction: Prediction) -> Figure:
    """Actual against predicted scores of all checkpoints, with a marker for each run and the line of equality; one
    panel for perplexity alone and one for perplexity and geometry.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    panels = (
        ("Perplexity alone", prediction.predicted_perplexity, prediction.r2_perplexity),
        ("Perplexity and geometry", prediction.predicted_both, prediction.r2_both),
    )
    runs = table.run_of_row
    both = [prediction.seen, prediction.predicted_perplexity, prediction.predicted_both]
    low, high = min(float(v.min()) for v in both), max(float(v.max()) for v in both)
    for axis, (title, predicted, r2) in zip(axes, panels, strict=True):
        axis.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
        for number, name in enumerate(table.runs):
            rows = runs == number
            marker = "osD^v<>P"[number % 8]
            axis.plot(predicted[rows], prediction.seen[rows], marker, markersize=5, alpha=0.8, label=str(name))
        axis.set_title(f"{title}: R² = {r2:.2f}")
        axis.set_xlabel("predicted above-chance score")
    axes[0].set_ylabel("actual above-chance score")
    if len(table.runs) <= 16:
        axes[1].legend(fontsize=6, loc="best")
    gain = f"gain {prediction.gain:+.2f} [{prediction.gain_low:+.2f}, {prediction.gain_high:+.2f}]"
    figure.suptitle(f"Runs left out in turn, {gain}, p = {prediction.p_value:.3f}", fontsize=10)
    return figure


def prediction_tables(prediction: Prediction) -> list[Any]:
    """Tables for rich: the two regressions, the largest coefficients, the best single metrics."""
    p, interval = prediction, f"[{prediction.gain_low:+.3f}, {prediction.gain_high:+.3f}]"
    fits = [
        ("perplexity", f"{p.r2_perplexity:.3f}", f"{p.spearman_perplexity:.3f}"),
        ("perplexity + geometry", f"{p.r2_both:.3f}", f"{p.spearman_both:.3f}"),
        ("gain", f"{p.gain:+.3f} {interval}", f"permutation p = {p.p_value:.3f}"),
    ]
    weights = [(each.name, f"{each.mean:+.4f}", f"{each.spread:.4f}") for each in p.coefficients[:SHOWN]]
    single = [
        (each.metric, f"{each.r2_alone:.3f}", f"{each.gain:+.3f}", f"{each.spearman:.3f}")
        for each in p.ranking[:SHOWN]
    ]
    title = f"Downstream scores of {p.checkpoints} checkpoints, {p.runs} runs"
    return [
        _table(title, ("predictors", "R²", "Spearman ρ"), fits),
        _table("Standardised coefficients", ("predictor", "mean", "spread over fits"), weights),
        _table("Single metrics", ("metric", "R² alone", "gain over perplexity", "Spearman ρ"), single),
    ]


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    from rich.table import Table as RichTable

    table = RichTable(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def score_table(rows: Any, *, last_only: bool = True) -> Any:
    """A table of scores for rich: a line for each run and step (`last_only`: its last step), a column for each task.

    It shows a task's primary metric, the first that it has of acc, mcc and acc_norm, else its first, with ± half the
    95 % interval over items; the others are in `downstream.jsonl`. Of a group it shows the mean, not the members.
    """
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    from hf_lowrank.runs.scores import PRIMARY

    shown = [row for row in rows if row.group is None]
    metrics: dict[str, list[str]] = {}
    for row in shown:
        metrics.setdefault(row.task, []).append(row.metric)
    primary = {task: next((m for m in PRIMARY if m in found), found[0]) for task, found in metrics.items()}
    cells = {(row.run, row.step, row.task): row for row in shown if row.metric == primary[row.task]}
    lines = sorted({(row.run, row.step) for row in shown}, key=lambda line: (line[0], line[1]))
    if last_only:
        lines = list({run: (run, step) for run, step in lines}.values())
    families = {task.partition("_")[0] for task in primary}
    family = families.pop() if len(primary) > 1 and len(families) == 1 else ""
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.title, table.title_justify = Text(f"Downstream, {family}" if family else "Downstream"), "left"
    table.caption, table.caption_justify = "± is half the 95 % interval over items.", "left"
    table.add_column("run@step", overflow="fold")
    for task, metric in primary.items():
        chance = next((r.chance for r in shown if (r.task, r.metric) == (task, metric)), None)
        guess = "" if chance is None else f"\nchance {chance:.2f}"
        name = task.removeprefix(f"{family}_") if family else task
        suffix = "" if name == metric else f"\n{metric}"
        table.add_column(Text(f"{name}{suffix}{guess}"), justify="right", overflow="fold")
    for run, step in lines:
        found = [cells.get((run, step, task)) for task in primary]
        table.add_row(Text(f"{run}@{step}"), *(Text("—" if one is None else _score_text(one)) for one in found))
    return table


def _score_text(row: Any) -> str:
    if row.ci_low is None or row.ci_high is None:
        return f"{row.value:.3f}"
    return f"{row.value:.3f} ±{(row.ci_high - row.ci_low) / 2:.3f}"
