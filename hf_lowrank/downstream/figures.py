"""A figure of predicted scores, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_lowrank.downstream.prediction import Answer, Prediction, QuestionName, Table
from hf_lowrank.formats import pluralize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8


TITLES: dict[QuestionName, str] = {
    "unseen_method": "A method not seen",
    "unseen_run": "A run not seen, of a known method",
}


def prediction_figure(table: Table, prediction: Prediction) -> Figure:
    """Actual against predicted scores of all checkpoints, with a marker per method and the line of equality.

    A row per question that has an answer; one panel for perplexity alone and one for perplexity and geometry.
    """
    from matplotlib.figure import Figure

    answers = [answer for answer in prediction.answers if answer.reason is None]
    figure = Figure(figsize=(9, 4.6 * len(answers)), layout="constrained")
    for part, answer in zip(figure.subfigures(len(answers), 1, squeeze=False).flat, answers, strict=True):
        _draw(part, table, answer)
    return figure


def _draw(figure: Any, table: Table, answer: Answer) -> None:
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    panels = (
        ("Perplexity alone", answer.predicted_perplexity, answer.r2_perplexity),
        ("Perplexity and geometry", answer.predicted_both, answer.r2_both),
    )
    methods = table.method_N[answer.rows]
    both = [answer.observed, answer.predicted_perplexity, answer.predicted_both]
    low, high = min(float(v.min()) for v in both), max(float(v.max()) for v in both)
    centred = ", centred within methods" if answer.question == "unseen_run" else ""
    for axis, (title, predicted, r2) in zip(axes, panels, strict=True):
        axis.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
        for number in np.unique(methods):
            rows, marker = methods == number, "osD^v<>P"[number % 8]
            axis.plot(
                predicted[rows], answer.observed[rows], marker, markersize=5, alpha=0.8, label=table.methods[number]
            )
        axis.set_title(f"{title}: R² = {r2:.2f}")
        axis.set_xlabel(f"predicted above-chance score{centred}")
    axes[0].set_ylabel(f"actual above-chance score{centred}")
    axes[1].legend(fontsize=6, loc="best")
    gain = f"gain {answer.gain:+.2f} [{answer.gain_low:+.2f}, {answer.gain_high:+.2f}]"
    counts = f"{pluralize(answer.methods, 'method')}, {pluralize(answer.runs, 'run')}"
    figure.suptitle(f"{TITLES[answer.question]}: {gain}, p = {answer.p_value:.3f} ({counts})", fontsize=10)


def prediction_tables(prediction: Prediction) -> list[Any]:
    """Tables for rich, per question: the two regressions, the largest coefficients, the best single metrics."""
    return [table for answer in prediction.answers for table in _answer_tables(answer)]


def _answer_tables(answer: Answer) -> list[Any]:
    counts = ((answer.methods, "method"), (answer.runs, "run"), (answer.checkpoints, "checkpoint"))
    title = f"{TITLES[answer.question]} ({', '.join(pluralize(count, noun) for count, noun in counts)})"
    if answer.reason is not None:
        return [_table(title, ("not tested",), [(answer.reason,)])]
    interval = f"[{answer.gain_low:+.3f}, {answer.gain_high:+.3f}]"
    fits = [
        ("perplexity", f"{answer.r2_perplexity:.3f}", f"{answer.spearman_perplexity:.3f}"),
        ("perplexity + geometry", f"{answer.r2_both:.3f}", f"{answer.spearman_both:.3f}"),
        ("gain", f"{answer.gain:+.3f} {interval}", f"permutation p = {answer.p_value:.3f}"),
    ]
    weights = [(each.name, f"{each.mean:+.4f}", f"{each.spread:.4f}") for each in answer.coefficients[:SHOWN]]
    single = [
        (each.metric, f"{each.r2_alone:.3f}", f"{each.gain:+.3f}", f"{each.spearman:.3f}")
        for each in answer.ranking[:SHOWN]
    ]
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
