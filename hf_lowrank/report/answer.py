"""The answer: which runs can stand in one table, what is in it, and the sentence above it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_lowrank.report.catalogue import Dimension, quantity, quantity_order
from hf_lowrank.report.colours import looks, method_order
from hf_lowrank.report.curves import SWEEPS
from hf_lowrank.report.formats import big_count, duration, loss_text, memory, plain, significant, words_list
from hf_lowrank.report.runs import RunRecord
from hf_lowrank.report.statistics import Estimate, mean_difference, mean_interval

# Claims about methods need at least this many seeds of each.
SEEDS_FOR_A_VERDICT = 3


@dataclass(frozen=True)
class Cell:
    """One value: `value` sorts and goes into the CSV, `text` is read, `low`/`high` its interval, `note` why not."""

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
    group: Dimension
    kind: Literal["text", "number"]
    unit: str
    help: str


@dataclass(frozen=True)
class Group:
    """Runs that were evaluated on the same sequences, and so may be compared.

    Attributes:
        id: position, for anchors.
        fingerprint: of the evaluation sequences; None where runs carry none.
        runs: by final loss, best first, those without one last.
        columns: those that at least one run fills.
        cells: one row per run, one cell per column.
        mixed: metrics measured with different settings or at different steps in these runs: compare with care.
        headline, standfirst: the answer in a sentence, and what it rests on.
    """

    id: int
    fingerprint: str | None
    runs: tuple[RunRecord, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]
    mixed: tuple[str, ...]
    headline: str
    standfirst: str


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
        memory,
    ),
    _train(
        "optimizer_bytes",
        "Optimizer state",
        "",
        "Bytes of optimizer state at the end of training",
        lambda run: run.fact("optimizer_state_bytes"),
        memory,
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
    if row.value is None:
        return Cell(None, "—", note=row.reason or "no value")
    note = f"at step {row.step}" + (f", n = {row.n}" if row.n else "")
    if row.ci_low is None or row.ci_high is None:
        return Cell(row.value, significant(row.value), note=note)
    interval = f"{significant(row.ci_low)} – {significant(row.ci_high)}"
    return Cell(row.value, significant(row.value), row.ci_low, row.ci_high, interval, note)


def _table(runs: Sequence[RunRecord]) -> tuple[list[Column], list[tuple[Cell, ...]]]:
    titles = {name: look.title for name, look in looks(run.method for run in runs).items()}
    columns = _identity_columns()
    rows: list[list[Cell]] = [
        [
            Cell(run.name, run.name),
            Cell(titles[run.method], titles[run.method]),
            Cell(run.seed, "—" if run.seed is None else str(run.seed)),
        ]
        for run in runs
    ]
    for entry in _TRAINING:
        values = [entry.read(run) for run in runs]
        if any(value is not None for value in values):
            columns.append(entry.column)
            for row, value in zip(rows, values, strict=True):
                row.append(Cell(None, "—", note="not recorded") if value is None else Cell(value, entry.text(value)))
    taken = {column.id for column in columns} | {"loss", "perplexity", *SWEEPS}
    metrics = {row.metric for run in runs for row in run.rows if row.scope == "model"} - taken
    for metric in sorted(metrics, key=quantity_order):
        about = quantity(metric)
        columns.append(
            Column(
                metric,
                about.short or about.title,
                about.dimension,
                "number",
                about.unit.replace("share", ""),
                about.meaning,
            )
        )
        for run, row in zip(runs, rows, strict=True):
            row.append(_measured_cell(run, metric))
    return columns, [tuple(row) for row in rows]


def _mixed(runs: Sequence[RunRecord], columns: Sequence[Column]) -> tuple[str, ...]:
    """Titles of the metrics whose settings or steps differ between the last rows of `runs`."""
    found = []
    for column in columns:
        if column.group == "training":
            continue
        rows = [row for run in runs if (row := run.last(column.id)) is not None and row.value is not None]
        if len({(row.step, json.dumps(row.settings, sort_keys=True, default=str)) for row in rows}) > 1:
            found.append(quantity(column.id).title)
    return tuple(found)


def losses_by_method(runs: Sequence[RunRecord]) -> dict[str, dict[int, float]]:
    """Final loss by method and seed; a run without a seed counts as a seed of its own (negative)."""
    found: dict[str, dict[int, float]] = {}
    for position, run in enumerate(runs):
        if run.final_loss is not None:
            seed = run.seed if run.seed is not None else -1 - position
            found.setdefault(run.method, {})[seed] = run.final_loss
    return found


def by_method(runs: Sequence[RunRecord]) -> list[tuple[str, Estimate]]:
    """Mean final loss per method over its seeds, best first."""
    means = [(name, mean_interval(list(losses.values()))) for name, losses in losses_by_method(runs).items()]
    return sorted(means, key=lambda pair: (pair[1].mean, method_order(pair[0])))


def verdict(runs: Sequence[RunRecord]) -> tuple[str, str]:
    """The headline and the sentence under it.

    A method is called better only when both have at least three seeds and the interval of their difference, widened
    for the number of rivals (Bonferroni), leaves out zero.
    """
    ranked = by_method(runs)
    losses = losses_by_method(runs)
    title = {name: look.title for name, look in looks(losses).items()}
    if not ranked:
        return "No loss was recorded", "These runs carry no validation loss; what was measured on them follows below."
    best, estimate = ranked[0]
    at = f"{loss_text(estimate.mean)} nats per token"
    if len(ranked) == 1:
        seeds = plain(estimate.n, "seed")
        spread = _interval_words(estimate)
        return f"{title[best]} reaches a validation loss of {at}", f"One method, {seeds}{spread}."
    fewest = min(len(found) for found in losses.values())
    others = len(ranked) - 1
    gap = loss_text(ranked[-1][1].mean - estimate.mean)
    if fewest < SEEDS_FOR_A_VERDICT:
        most = max(len(found) for found in losses.values())
        few = plain(fewest, "seed")
        seeds = f"Some methods have only {few}" if most > fewest else f"Only {few} per method"
        seeds = "One seed per method" if most == 1 else seeds
        return (
            f"{title[best]} ended lowest, at {at}",
            f"{seeds}: this says how these runs came out, not which method is better. "
            f"From the lowest to the highest are {gap} nats.",
        )
    beaten: list[str] = []
    tied: list[str] = []
    for name, _ in ranked[1:]:
        difference = mean_difference(losses[best], losses[name], confidence=1 - 0.05 / others)
        (beaten if difference and difference.low is not None and difference.low > 0 else tied).append(title[name])
    seeds = f"{fewest} seeds" if fewest == max(len(found) for found in losses.values()) else f"{fewest} or more seeds"
    basis = f"Over {seeds} per method, paired where seeds are common, 95 % intervals widened for {others} comparisons."
    if not tied:
        rivals = "every other method" if others > 1 else title[ranked[1][0]]
        return f"{title[best]} ends lower than {rivals}, at {at}", basis
    headline = f"{title[best]} has the lowest mean, {at}, but cannot be told from {words_list(tied)}"
    return headline, basis + (f" It does end lower than {words_list(beaten)}." if beaten else "")


def _interval_words(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f", 95 % interval {loss_text(estimate.low)} to {loss_text(estimate.high)}"


def groups(runs: Sequence[RunRecord]) -> list[Group]:
    """The runs by evaluation set, the largest group first; runs without a set stand in one of their own."""
    sets: dict[str | None, list[RunRecord]] = {}
    for run in runs:
        sets.setdefault(run.fingerprint, []).append(run)
    ordered = sorted(sets.items(), key=lambda item: (item[0] is None, -len(item[1]), item[0] or ""))
    result = []
    for position, (fingerprint, members) in enumerate(ordered):
        members.sort(
            key=lambda run: (
                run.final_loss is None,
                run.final_loss or 0.0,
                method_order(run.method),
                run.seed or 0,
                run.name,
            )
        )
        columns, cells = _table(members)
        headline, standfirst = verdict(members)
        result.append(
            Group(
                position,
                fingerprint,
                tuple(members),
                tuple(columns),
                tuple(cells),
                _mixed(members, columns),
                headline,
                standfirst,
            )
        )
    return result
