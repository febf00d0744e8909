"""The table of runs: cost and measurements, one row per run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal, NamedTuple

from hf_lowrank.claims.study import titles
from hf_lowrank.formats import big_count, byte_size, duration, loss_text, significant
from hf_lowrank.metrics import NOT_DENSE_MARK, POINTWISE, Section, describe, metric_order
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


class _TrainingColumn(NamedTuple):
    """A column about training; `read` is a function of the run or the name of a fact."""

    id: str
    title: str
    unit: str
    help: str
    read: str | Callable[[RunRecord], float | None]
    text: Callable[[float], str]


def _seconds(run: RunRecord) -> float | None:
    """Training time; Trainer's own log has it where no facts were written, of the last session only."""
    facts = run.fact("training_seconds")
    if facts is not None:
        return facts
    logged = run.logged("train_runtime")
    return logged[-1][1] if logged else None


_TRAINING = (
    _TrainingColumn("validation_loss", "Val. loss", "nats", "Final validation loss per token; lower is better",
                    attrgetter("final_loss"), loss_text),
    _TrainingColumn("perplexity", "Perplexity", "", "exp of the validation loss; lower is better",
                    attrgetter("perplexity"), significant),
    _TrainingColumn("unigram_loss", "Unigram", "nats",
                    "Held-out loss of a unigram model fitted on the same training tokens", "unigram_loss", loss_text),
    _TrainingColumn("tokens", "Tokens", "", "Training tokens seen", "tokens_seen", big_count),
    _TrainingColumn("train_seconds", "Time", "", "Wall-clock training time", _seconds, duration),
    _TrainingColumn("peak_memory", "Peak memory", "", "Peak memory of the training process", "peak_memory_bytes",
                    byte_size),
    _TrainingColumn("optimizer_bytes", "Optimizer state", "", "Bytes of optimizer state at the end of training",
                    "optimizer_state_bytes", byte_size),
    _TrainingColumn("parameters", "Parameters", "", "Parameters of the model as trained", "parameters", big_count),
)  # fmt: skip

_Filled = Iterator[tuple[Column, list[Cell]]]  # a column and one cell for each run


def table(runs: Sequence[RunRecord]) -> tuple[list[Column], list[tuple[Cell, ...]]]:
    """The columns that at least one of `runs` fills, and a row of cells for each run."""
    found = [*_identity(runs), *_training(runs)]
    taken = {column.id for column, _ in found} | {"loss", "perplexity", *POINTWISE}
    metrics = {row.metric for run in runs for row in run.rows if row.scope == "model"} - taken
    found += [*_measured(runs, metrics), *_scored(runs)]
    return [column for column, _ in found], list(zip(*(cells for _, cells in found), strict=True))


def _identity(runs: Sequence[RunRecord]) -> _Filled:
    title = titles(run.method for run in runs)
    yield (
        Column("run", "Run", "training", "text", "", "The run's folder"),
        [Cell(run.name, f"{run.name} ({run.unfinished})" if run.unfinished else run.name) for run in runs],
    )
    yield (
        Column("method", "Method", "training", "text", "", "How it was trained"),
        [Cell(title[run.method], title[run.method]) for run in runs],
    )
    yield (
        Column("seed", "Seed", "training", "number", "", "Fixes the initial weights and the order of the data"),
        [Cell(run.seed, "—" if run.seed is None else str(run.seed)) for run in runs],
    )


def _training(runs: Sequence[RunRecord]) -> _Filled:
    some_finished = not all(run.unfinished for run in runs)

    def cell(entry: _TrainingColumn, run: RunRecord, value: float | None) -> Cell:
        if value is None:
            return Cell(None, "—", note="not recorded")
        if run.unfinished and some_finished and entry.id in ENDS:
            # Displayed, but not ranked among the values of finished runs.
            return Cell(None, entry.text(value), note=f"at {run.unfinished}")
        return Cell(value, entry.text(value))

    for entry in _TRAINING:
        values = [run.fact(entry.read) if isinstance(entry.read, str) else entry.read(run) for run in runs]
        if any(value is not None for value in values):
            column = Column(entry.id, entry.title, "training", "number", entry.unit, entry.help)
            yield column, [cell(entry, run, value) for run, value in zip(runs, values, strict=True)]


def _measured(runs: Sequence[RunRecord], metrics: Iterable[str]) -> _Filled:
    def cell(run: RunRecord, metric: str) -> Cell:
        row = run.last(metric)
        if row is None or not row.has_value:
            return Cell(None, "—", note="not measured" if row is None else row.reason or "no value")
        note = f"at step {row.step}" + (f", n = {row.n}" if row.n else "")
        interval = (row.ci_low, row.ci_high) if row.has_interval else ()
        if (why := run.not_dense(row)) is None:
            return _number_cell(row.value, note, *interval)
        marked = _number_cell(row.value, f"{note}; {why}", *interval)
        return replace(marked, text=f"{marked.text} {NOT_DENSE_MARK}")

    for metric in sorted(metrics, key=metric_order):
        about = describe(metric)
        unit = about.unit.replace("share", "")
        yield (
            Column(metric, about.short_title, about.section, "number", unit, about.summary),
            [cell(run, metric) for run in runs],
        )


def _scored(runs: Sequence[RunRecord]) -> _Filled:
    """The mean above-chance score and every task's own, each at the run's last scored step."""
    means, _ = downstream(runs)
    if means:
        help_ = "Mean above-chance score over the tasks that all scored runs have: 0 is guessing, 1 is perfect"
        steps = [max(means.get(run.name) or {}, default=None) for run in runs]
        yield (
            Column("downstream", "Above chance", "downstream", "number", "", help_),
            [
                _not_scored() if step is None else _score_cell(means[run.name][step], f"at step {step}")
                for run, step in zip(runs, steps, strict=True)
            ],
        )
    kinds = {(row.task, row.metric): row for run in runs for row in run.scores if row.group is None}
    for (task, metric), one in sorted(kinds.items(), key=lambda item: item[0]):
        chance = "" if one.chance is None else f"; guessing scores {significant(one.chance, 2)}"
        better = "higher" if one.higher_is_better else "lower"
        help_ = f"{task}, {metric}: {better} is better{chance}; the interval is over its items"
        yield (
            Column(f"{task}:{metric}", f"{task} {metric}", "downstream", "number", "", help_),
            [_last_score(run, task, metric) for run in runs],
        )


def _last_score(run: RunRecord, task: str, metric: str) -> Cell:
    found = [s for s in run.scores if (s.task, s.metric, s.group) == (task, metric, None)]
    if not found:
        return _not_scored()
    last = max(found, key=lambda s: (s.limit is None, s.step))
    cut = f", only {last.limit} items asked for" if last.limit is not None else ""
    return _score_cell(last.value, f"at step {last.step}, {last.n} items{cut}", last.ci_low, last.ci_high)


def _not_scored() -> Cell:
    return Cell(None, "—", note="not scored")


def _score_cell(value: float, note: str, low: float | None = None, high: float | None = None) -> Cell:
    if not math.isfinite(value):
        return Cell(None, "—", note=f"not a number {note}")
    return _number_cell(value, note, low, high)


def _number_cell(value: float, note: str, low: float | None = None, high: float | None = None) -> Cell:
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
