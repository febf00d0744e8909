"""The answer: which runs can be compared, the tables of runs and methods, and the sentence above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_lowrank.claims.titles import method_order
from hf_lowrank.formats import big_count, join_words, pluralize
from hf_lowrank.report.run_table import Cell, Column, mixed, table
from hf_lowrank.report.standings import BASELINE, Standings, standings
from hf_lowrank.report.verdicts import trade_off, verdict
from hf_lowrank.runs.records import RunRecord, finished_or_all

# Unfinished runs that a sentence names.
MOST_NAMED = 4


@dataclass(frozen=True)
class Group:
    """Runs of one size that were evaluated on the same sequences, so that they can be compared.

    Attributes:
        id: the group's number.
        fingerprint: of the evaluation sequences; None where runs carry none.
        size: width and depth of the models; None where unknown.
        scale: the size in words.
        runs: by final loss, best first, then those without one, then unfinished ones.
        columns: those that at least one run fills.
        cells: one row per run, one cell per column.
        mixed: metrics measured with different settings or at different steps in these runs.
        headline, standfirst: the answer in a sentence and its basis: the finished runs, if there are any.
        trade: what is lost and saved compared with the baseline; empty without one.
        standings: the table of methods.
    """

    id: int
    fingerprint: str | None
    size: tuple[int, int] | None
    scale: str
    runs: tuple[RunRecord, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]
    mixed: tuple[str, ...]
    headline: str
    standfirst: str
    trade: str
    standings: Standings


def groups(runs: Sequence[RunRecord], baseline: str = BASELINE) -> list[Group]:
    """The runs by evaluation set and size, the largest group first; runs without a set form a group of their own.

    `baseline` names the method that the others are compared with.
    """
    sets: dict[tuple[str | None, tuple[int, int] | None], list[RunRecord]] = {}
    for run in runs:
        sets.setdefault((run.fingerprint, run.size), []).append(run)
    ordered = sorted(
        sets.items(), key=lambda item: (item[0][0] is None, -len(item[1]), item[0][0] or "", item[0][1] or ())
    )
    result = []
    for position, ((fingerprint, size), members) in enumerate(ordered):
        members.sort(
            key=lambda run: (
                bool(run.unfinished),
                run.final_loss is None,
                run.final_loss or 0.0,
                method_order(run.method),
                run.seed or 0,
                run.name,
            )
        )
        columns, cells = table(members)
        ranked = finished_or_all(members)
        headline, standfirst = verdict(ranked)
        methods = standings(ranked, baseline)
        result.append(
            Group(
                id=position,
                fingerprint=fingerprint,
                size=size,
                scale=_scale(members, size, baseline),
                runs=tuple(members),
                columns=tuple(columns),
                cells=tuple(cells),
                mixed=mixed(members, columns),
                headline=headline,
                standfirst=" ".join([standfirst, *_remarks(members)]),
                trade=trade_off(ranked, methods),
                standings=methods,
            )
        )
    return result


def _remarks(runs: Sequence[RunRecord]) -> list[str]:
    """Which runs are unfinished, and at which steps the others end if these differ."""
    behind = [f"{run.name} ({run.unfinished})" for run in runs if run.unfinished]
    more = [f"{len(behind) - MOST_NAMED} more"] if len(behind) > MOST_NAMED else []
    ends = sorted({run.steps[-1] for run in runs if run.steps and not run.unfinished})
    remarks = []
    names = join_words([*behind[:MOST_NAMED], *more]) if behind else ""
    if len(behind) == len(runs):
        remarks.append(f"Unfinished: {names}.")
    elif behind:
        remarks.append(f"Left out as unfinished: {names}.")
    if len(ends) > 1:
        remarks.append(f"The runs end at different steps: {join_words([str(step) for step in ends])}.")
    return remarks


def _scale(runs: Sequence[RunRecord], size: tuple[int, int] | None, baseline: str) -> str:
    """`1.32 M parameters, 4 blocks of 128`: of the baseline where it is there, else of the largest."""
    counts = {run.method: count for run in runs if (count := run.fact("parameters")) is not None}
    parts = [f"{big_count(counts.get(baseline, max(counts.values())))} parameters"] if counts else []
    if size is not None:
        parts.append(f"{pluralize(size[1], 'block')} of width {size[0]}")
    return ", ".join(parts) or "size unknown"
