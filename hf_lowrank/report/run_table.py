"""The table of runs: cost and measurements, one row per run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_lowrank.claims.titles import titles
from hf_lowrank.formats import big_count, byte_size, duration, loss_text, significant
from hf_lowrank.metrics import POINTWISE, Section, describe, metric_order
from hf_lowrank.report.standings import downstream
from hf_lowrank.runs.records import RunRecord


@dataclass(frozen=True)
class Cell:
    """One cell: `value` for sorting and the CSV, `text` as displayed, the interval, and a `note` on any of it."""

    value: float | str | None
    text: str
    low: float | None = None
    high: float | None = None
    interval: str = ""
    note: str = ""


@dataclass(frozen=True)
class Column:
    """One column of the table of runs."""

    id: str
    title: str
    group: Section
    kind: Literal["text", "number"]
    unit: str
    help: str


# What only a finished run has.
ENDS = ("validation_loss", "perplexity")

_Read = Callable[[RunRecord], float | None]


@dataclass(frozen=True)
class _TrainingColumn:
    column: Column
    read: _Read
    text: Callable[[float], str]


def _train(id_: str, title: str, unit: str, help_: str, read: _Read, text: Callable[[float], str]) -> _TrainingColumn:
    return _TrainingColumn(Column(id_, title, "training", "number", unit, help_), read, text)


def _seconds(run: RunRecord) -> float | None:
    """Training time; Trainer's own log has it where no facts were written, of the last session only."""
    facts = run.fact("training_seconds")
    if facts is not None:
        return facts
    logged = run.logged("train_runtime")
    return logged[-1][1] if logged else None


_TRAINING = (
    _train(
        "validation_loss",
        "Val. loss",
        "nats",
        "Final validation loss per token; lower is better",
        lambda run: run.final_loss,
        loss_text,
    ),
    _train(
        "perplexity",
        "Perplexity",
        "",
        "exp of the validation loss; lower is better",
        lambda run: run.perplexity,
        significant,
    ),
    _train(
        "unigram_loss",
        "Unigram",
        "nats",
        "Held-out loss of a unigram model fitted on the same training tokens",
        lambda run: run.fact("unigram_loss"),
        loss_text,
    ),
    _train(
        "tokens",
        "Tokens",
        "",
        "Training tokens seen",
        lambda run: run.fact("tokens_seen"),
        big_count,
    ),
    _train("train_seconds", "Time", "", "Wall-clock training time", _seconds, duration),
    _train(
        "peak_memory",
        "Peak memory",
        "",
        "Peak memory of the training process",
        lambda run: run.fact("peak_memory_bytes"),
        byte_size,
    ),
    _train(
        "optimizer_bytes",
        "Optimizer state",
        "",
        "Bytes of optimizer state at the end of training",
        lambda run: run.fact("optimizer_state_bytes"),
        byte_size,
    ),
    _train(
        "parameters",
        "Parameters",
        "",
        "Parameters of the model as trained",
        lambda run: run.fact("parameters"),
        big_count,
    ),
)


def _identity_columns() -> list[Column]:
    return [
        Column("run", "Run", "training", "text", "", "The run's folder"),
        Column("method", "Method", "training", "text", "", "How it was trained"),
        Column("seed", "Seed", "training", "number", "", "Fixes the initial weights and the order of the data"),
    ]


def _measured_cell(run: RunRecord, metric: str) -> Cell:
    row = run.last(metric)
    if row is None:
        return Cell(None, "—", note="not measured")
    if not row.has_value:
        return Cell(None, "—", note=row.reason or "no value")
    note = f"at step {row.step}" + (f", n = {row.n}" if row.n else "")
    if not row.has_interval:
        return Cell(row.value, significant(row.value), note=note)
    interval = f"{significant(row.ci_low)} – {significant(row.ci_high)}"
    return Cell(row.value, significant(row.value), row.ci_low, row.ci_high, interval, note)


def table(runs: Sequence[RunRecord]) -> tuple[list[Column], list[tuple[Cell, ...]]]:
    """The columns that at least one of `runs` fills, and a row of cells for each run."""
    title = titles(run.method for run in runs)
    columns = _identity_columns()
    rows: list[list[Cell]] = [
        [
            Cell(run.name, f"{run.name} ({run.unfinished})" if run.unfinished else run.name),
            Cell(title[run.method], title[run.method]),
            Cell(run.seed, "—" if run.seed is None else str(run.seed)),
        ]
        for run in runs
    ]
    some_finished = not all(run.unfinished for run in runs)
    for entry in _TRAINING:
        values = [entry.read(run) for run in runs]
        if any(value is not None for value in values):
            columns.append(entry.column)
            for run, row, value in zip(runs, rows, values, strict=True):
                if value is None:
                    row.append(Cell(None, "—", note="not recorded"))
                elif run.unfinished and some_finished and entry.column.id in ENDS:
                    # Displayed, but not ranked among the values of finished runs.
                    row.append(Cell(None, entry.text(value), note=f"at {run.unfinished}"))
                else:
                    row.append(Cell(value, entry.text(value)))
    taken = {column.id for column in columns} | {"loss", "perplexity", *POINTWISE}
    metrics = {row.metric for run in runs for row in run.rows if row.scope == "model"} - taken
    for metric in sorted(metrics, key=metric_order):
        about = describe(metric)
        columns.append(
            Column(
                metric,
                about.short_title,
                about.section,
                "number",
                about.unit.replace("share", ""),
                about.summary,
            )
        )
        for run, row in zip(runs, rows, strict=True):
            row.append(_measured_cell(run, metric))
    _add_downstream(runs, columns, rows)
    return columns, [tuple(row) for row in rows]


def _add_downstream(runs: Sequence[RunRecord], columns: list[Column], rows: list[list[Cell]]) -> None:
    """The mean above-chance score and every task's own, each at the run's last scored step."""
    means, _ = downstream(runs)
    if means:
        help_ = "Mean above-chance score over the tasks that all scored runs have: 0 is guessing, 1 is perfect"
        columns.append(Column("downstream", "Above chance", "downstream", "number", "", help_))
        for run, row in zip(runs, rows, strict=True):
            steps = means.get(run.name)
            row.append(_scored_cell(steps[max(steps)], max(steps)) if steps else Cell(None, "—", note="not scored"))
    kinds = {(row.task, row.metric): row for run in runs for row in run.scores if row.group is None}
    for task, metric in sorted(kinds):
        one = kinds[task, metric]
        chance = "" if one.chance is None else f"; guessing scores {significant(one.chance, 2)}"
        better = "higher" if one.higher_is_better else "lower"
        help_ = f"{task}, {metric}: {better} is better{chance}; the interval is over its items"
        columns.append(Column(f"{task}:{metric}", f"{task} {metric}", "downstream", "number", "", help_))
        for run, row in zip(runs, rows, strict=True):
            found = [s for s in run.scores if (s.task, s.metric, s.group) == (task, metric, None)]
            last = max(found, key=lambda s: (s.limit is None, s.step), default=None)
            if last is None:
                row.append(Cell(None, "—", note="not scored"))
                continue
            cut = f", only {last.limit} items asked for" if last.limit is not None else ""
            row.append(_scored_cell(last.value, last.step, last.ci_low, last.ci_high, f", {last.n} items{cut}"))


def _scored_cell(value: float, step: int, low: float | None = None, high: float | None = None, more: str = "") -> Cell:
    note = f"at step {step}{more}"
    if not math.isfinite(value):
        return Cell(None, "—", note=f"not a number {note}")
    if low is None or high is None:
        return Cell(value, significant(value), note=note)
    return Cell(value, significant(value), low, high, f"{significant(low)} – {significant(high)}", note)


def mixed(runs: Sequence[RunRecord], columns: Sequence[Column]) -> tuple[str, ...]:
    """Titles of the metrics whose settings or steps differ between the last rows of `runs`."""
    found = []
    for column in columns:
        if column.group in ("training", "downstream"):
            continue
        rows = [row for run in runs if (row := run.last(column.id)) is not None and row.has_value]
        if len({(row.step, json.dumps(row.settings, sort_keys=True, default=str)) for row in rows}) > 1:
            found.append(describe(column.id).title)
    return tuple(found)
