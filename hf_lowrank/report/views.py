"""What the templates show of the answer and of a study: positions on rulers, and text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_lowrank.claims.claim import VERDICT_MEANING, VERDICTS, Claim, Detail
from hf_lowrank.claims.results import QUESTIONS, StudyResults, Trial, key_words, range_text, value_words
from hf_lowrank.formats import finite_number, join_words, loss_text, p_text, pluralize, signed, significant
from hf_lowrank.report.answer import Group, trained_scale
from hf_lowrank.report.standings import Criterion, Standing
from hf_lowrank.statistics import SEEDS_FOR_A_VERDICT

MARKS = {"reproduced": "✓", "contradicted": "✕", "undecided": "?"}


@dataclass(frozen=True)
class Track:
    """A value and its interval on a line from 0 to 100; `zero` where a reference stands."""

    at: float | None
    low: float | None
    high: float | None
    zero: float | None = None


class Ruler:
    """Positions of values on one common line with some padding at its ends."""

    def __init__(self, values: Iterable[float | None], *, zero: bool = False) -> None:
        found = [value for value in values if value is not None and math.isfinite(value)]
        found += [0.0] if zero else []
        self.low, self.high = (min(found), max(found)) if found else (0.0, 1.0)
        size = max(abs(self.low), abs(self.high))
        spread = self.high - self.low
        padding = 0.06 * spread if spread > 1e-9 * size else 0.5 * size or 0.5
        self.low, self.high = self.low - padding, self.high + padding

    def position(self, value: float | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def track(self, value: float | None, low: float | None, high: float | None, *, zero: bool = False) -> Track:
        return Track(*map(self.position, (value, low, high, 0.0 if zero else None)))


def methods_view(group: Group) -> dict[str, Any]:
    """The table of methods with every cell's position on its column's line."""
    table = group.standings
    columns = zip(*(row.standings for row in table.rows), strict=True)
    rulers = [Ruler(value for one in cells for value in (one.value, one.low, one.high)) for cells in columns]
    rows = [
        {
            "row": row,
            "cells": [
                {
                    "criterion": criterion,
                    "standing": standing,
                    "track": ruler.track(standing.value, standing.low, standing.high),
                    "said": _said(criterion, standing),
                    "rank": "" if standing.rank is None else f"{standing.rank}{'=' if standing.tied else ''}",
                }
                for criterion, standing, ruler in zip(table.criteria, row.standings, rulers, strict=True)
            ],
        }
        for row in table.rows
    ]
    return {
        "criteria": table.criteria,
        "rows": rows,
        "notes": table.notes,
        "baseline": table.baseline_title,
        "against": any(cell.beside_interval or cell.beside not in ("", "baseline")
                       for row in table.rows for cell in row.standings),
        "seeds": _seeds(group),
        "scale": trained_scale(group),
        "ties": any(cell.tied for row in table.rows for cell in row.standings),
    }  # fmt: skip


def _said(criterion: Criterion, standing: Standing) -> str:
    """The tooltip of a cell."""
    if standing.value is None:
        return standing.note
    parts = [f"{criterion.title} {standing.text}"]
    if standing.low is not None:
        parts.append(f"95 % interval {standing.interval} over {pluralize(standing.n, 'seed')}")
    if standing.note:
        parts.append(standing.note)
    if standing.rank is not None and standing.certain:
        parts.append("tied with the best" if standing.tied else f"rank {standing.rank}")
    elif standing.rank is not None:
        parts.append(f"position {standing.rank} in these runs, no verdict")
    return "; ".join(parts)


def _seeds(group: Group) -> str:
    """What the intervals and ranks are based on."""
    counts = {row.seeds for row in group.standings.rows}
    if max(counts) == 1:
        return (
            "One seed per method, so there are no intervals, and the small numbers only order these runs: "
            "another seed may order them differently."
        )
    text = (
        "Below each value is its 95 % interval over seeds, drawn on a line shared by the column; the small "
        "number is the rank."
    )
    if min(counts) < SEEDS_FOR_A_VERDICT:
        few = f"some methods have only {pluralize(min(counts), 'seed')}, {SEEDS_FOR_A_VERDICT} are needed"
        return f"{text} The ranks are not a verdict: {few}."
    return text


def claims_view(study: StudyResults, looks: Mapping[str, Any]) -> dict[str, Any]:
    """Claims with their effects placed on lines, and how many came to each verdict."""
    counts = {verdict: sum(claim.verdict == verdict for claim in study.claims) for verdict in VERDICTS}
    return {
        "claims": [_claim_view(claim, looks) for claim in study.claims],
        "counts": [(verdict, MARKS[verdict], counts[verdict], VERDICT_MEANING[verdict]) for verdict in VERDICTS],
        "alpha": study.alpha,
        "marks": MARKS,
    }


def _claim_view(claim: Claim, looks: Mapping[str, Any]) -> dict[str, Any]:
    titles = {name: look.title for name, look in looks.items()}
    kinds: dict[tuple[str, str], list[Detail]] = {}
    for part in claim.details:
        kinds.setdefault((part.part, part.unit or claim.unit), []).append(part)
    tables = []
    for (name, unit), parts in kinds.items():
        ruler = Ruler((value for part in parts for value in (part.effect, part.ci_low, part.ci_high)), zero=True)
        rows = [
            {
                "label": titles.get(part.label, part.label),
                "verdict": part.verdict,
                "mark": MARKS.get(part.verdict or "", ""),
                "reason": part.reason or "",
                **_effect_view(part, "", ruler),
            }
            for part in parts
        ]
        tables.append({"name": name, "unit": unit, "rows": rows})
    own = Ruler((claim.effect, claim.ci_low, claim.ci_high), zero=True)
    return {
        "claim": claim,
        "mark": MARKS[claim.verdict],
        "whole": _effect_view(claim.overall, claim.unit, own),
        "tables": tables,
    }


def _effect_view(part: Detail, unit: str, ruler: Ruler) -> dict[str, Any]:
    text = "—" if part.effect is None else signed(part.effect, significant)
    interval = ""
    if part.ci_low is not None and part.ci_high is not None:
        interval = f"{signed(part.ci_low, significant)} to {signed(part.ci_high, significant)}"
    return {
        "text": f"{text} {unit}".strip() if part.effect is not None else text,
        "interval": interval,
        "p": "" if part.p_value is None else p_text(part.p_value),
        "n": str(part.n or ""),
        "track": None if part.effect is None else ruler.track(part.effect, part.ci_low, part.ci_high, zero=True),
    }


def prediction_view(study: StudyResults) -> dict[str, Any] | None:
    """The prediction in words, with a view per question; None without one."""
    found = study.prediction
    if found is None:
        return None
    questions = [_question_view(name, found[name]) for name in QUESTIONS]
    if questions[0]["reason"]:
        answer = "Whether geometry and spectra add to perplexity for an unseen method is not tested"
    elif questions[0]["sure"]:
        answer = "Geometry and spectra add to perplexity: scores of methods left out are predicted better with them"
    else:
        answer = "Geometry and spectra are not shown to add to perplexity"
    return {"answer": answer, "questions": questions, "notes": [str(note) for note in found.get("notes") or []]}


def _question_view(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """One question's answer: its gain on a line, its tables; `reason` says why where there is none."""

    def number(key: str) -> float | None:
        return finite_number(found.get(key))

    gain, low, high, p = (number(key) for key in ("gain", "gain_low", "gain_high", "p_value"))
    interval = (
        f" (95 % interval {signed(low, significant)} to {signed(high, significant)})"
        if low is not None and high is not None
        else ""
    )

    def table(key: str, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        rows = found.get(key)
        shown = [row for row in rows if isinstance(row, Mapping)][:8] if isinstance(rows, list) else []
        return [(str(row.get(names[0], "")), *(_or_dash(row.get(name)) for name in names[1:])) for row in shown]

    title, explanation = QUESTIONS[name]
    return {
        "name": name,
        "title": title,
        "explanation": explanation,
        "reason": str(found.get("reason") or ("no gain is known" if gain is None else "")),
        "sure": p is not None and p < 0.05 and low is not None and low > 0,
        "gain": "—" if gain is None else signed(gain, significant),
        "interval": interval,
        "p": "" if p is None else p_text(p),
        "track": Ruler((gain, low, high), zero=True).track(gain, low, high, zero=True),
        **{key: found.get(key) for key in ("methods", "runs", "checkpoints")},
        "fits": [
            (label, _or_dash(number(f"r2_{key}")), _or_dash(number(f"spearman_{key}")))
            for label, key in (("Perplexity alone", "perplexity"), ("Perplexity and geometry", "both"))
        ],
        "coefficients": table("coefficients", ("name", "mean", "spread")),
        "ranking": table("ranking", ("metric", "r2_alone", "gain", "spearman")),
    }


def _or_dash(value: Any) -> str:
    number = finite_number(value)
    return "—" if number is None else significant(number)


def sweep_view(study: StudyResults, looks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each member of the sweep: its trials, what they tried, which one won, and how far from an edge."""
    found = []
    for member in dict.fromkeys(trial.member for trial in study.sweep):
        trials = [trial for trial in study.sweep if trial.member == member]
        chosen = next((trial for trial in trials if trial.chosen), None)
        found.append(
            {
                "title": looks[member].title if member in looks else member,
                "number": list(looks).index(member) if member in looks else None,
                "trials": _trials(trials),
                "ranges": "; ".join(f"{key_words(key)} {text}" for key, text in _ranges(trials).items()),
                "chosen": value_words(chosen.tried) if chosen else "none",
                "loss": loss_text(chosen.loss) if chosen and chosen.loss is not None else "—",
                "edge": _edge(chosen),
            }
        )
    return found


def _trials(trials: Sequence[Trial]) -> str:
    """`8, 1 beyond an edge, 2 failed`."""
    beyond, failed = (sum(flags) for flags in ([t.extension for t in trials], [t.loss is None for t in trials]))
    parts = [str(len(trials) - beyond)]
    parts += [f"{beyond} beyond an edge"] if beyond else []
    return ", ".join([*parts, *([f"{failed} failed"] if failed else [])])


def _ranges(trials: Sequence[Trial]) -> dict[str, str]:
    """What was tried, by key: the ranges of the study file, or the values where it is a list."""
    ranges = next((trial.ranges for trial in trials if trial.ranges), {})
    values: dict[str, list[Any]] = {}
    for trial in trials:
        for key, value in trial.tried.items():
            values.setdefault(key, []).append(value)
    return {
        key: range_text(ranges.get(key) or sorted(set(tried), key=lambda value: (isinstance(value, str), value)))
        for key, tried in values.items()
    }


def _edge(chosen: Trial | None) -> str:
    if chosen is None or not chosen.edges:
        return "—"
    if chosen.at_edges:
        return f"yes: {join_words([key_words(key) for key in chosen.at_edges])}; better may lie beyond"
    nearest = min(count for count in chosen.edges.values() if isinstance(count, int))
    return f"no: {pluralize(nearest, 'value')} or more beyond"
