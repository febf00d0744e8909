"""Two sizes side by side: whether the order of the methods and the verdicts of claims are the same at another size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_lowrank.claims.order import compare_orders
from hf_lowrank.claims.results import StudyResults, load_results
from hf_lowrank.errors import UserError
from hf_lowrank.formats import join_words, signed, significant
from hf_lowrank.report.answer import Group, groups, losses_by_method, trained_scale
from hf_lowrank.report.members import baseline_of, sweep_of, with_distinct_methods
from hf_lowrank.report.standings import Standing
from hf_lowrank.runs.records import finished_or_all, load_runs
from hf_lowrank.statistics import SEEDS_FOR_A_VERDICT


@dataclass(frozen=True)
class Size:
    """A study's methods at its one size, and what its stages found."""

    group: Group
    results: StudyResults


def read_size(study: Path) -> Size:
    """The results of a study of one size.

    Raises:
        UserError: the folder is not a study's, or its runs have several sizes or evaluation sets.
    """
    runs = sorted((path for path in (study / "runs").glob("*") if path.is_dir()), key=lambda path: path.name)
    if not runs:
        raise UserError(f"{study}: must be a study's folder, but there are no runs in {study / 'runs'}")
    records = with_distinct_methods(load_runs(runs), study)
    results = replace(load_results(study), sweep=sweep_of(records, study))
    compared = groups(records, baseline_of(records, study), results.sweep)
    if len(compared) != 1:
        raise UserError(f"{study}: its runs have {len(compared)} sizes or evaluation sets; they must have one")
    return Size(compared[0], results)


def sizes_view(first: Size, others: Sequence[Size]) -> dict[str, Any] | None:
    """What the templates show of several sizes; None without another one.

    The methods of all sizes are rows, best at the first size first. `sentences` compare each other size's order with
    the first's.
    """
    if not others:
        return None
    sizes = [first, *others]
    titles = {row.method: row.title for size in reversed(sizes) for row in size.group.standings.rows}
    order = dict.fromkeys([row.method for size in sizes for row in size.group.standings.rows])
    cells = [_perplexities(size.group) for size in sizes]
    statements = {claim.id: claim.statement for size in reversed(sizes) for claim in size.results.claims}
    claims = [{claim.id: claim for claim in size.results.claims} for size in sizes]
    return {
        "scales": [trained_scale(size.group) for size in sizes],
        "rows": [
            {"method": method, "title": titles[method], "cells": [found.get(method) for found in cells]}
            for method in order
        ],
        "claims": [
            {"statement": statement, "cells": [_verdict(found.get(id_)) for found in claims]}
            for id_, statement in statements.items()
        ],
        "sentences": [_compare(first.group, size.group, titles) for size in others],
    }


def _perplexities(group: Group) -> dict[str, dict[str, Any]]:
    """By method: perplexity, its interval, its rank, and the comparison with the baseline."""
    position = next((i for i, one in enumerate(group.standings.criteria) if one.id == "perplexity"), None)
    if position is None:
        return {}
    return {row.method: _cell(row.standings[position]) for row in group.standings.rows}


def _cell(standing: Standing) -> dict[str, Any]:
    rank = "" if standing.rank is None else f"{standing.rank}{'=' if standing.tied else ''}"
    beside = "" if standing.beside == "baseline" else standing.beside
    return {
        "text": standing.text,
        "interval": standing.interval,
        "rank": rank,
        "certain": standing.certain,
        "beside": beside,
        "beside_interval": standing.beside_interval if beside else "",
    }


def _verdict(claim: Any) -> dict[str, str] | None:
    if claim is None:
        return None
    effect = "" if claim.effect is None else f"{signed(claim.effect, significant)} {claim.unit}".strip()
    interval = ""
    if claim.ci_low is not None and claim.ci_high is not None:
        interval = f"{signed(claim.ci_low, significant)} to {signed(claim.ci_high, significant)}"
    return {"verdict": claim.verdict, "effect": effect, "interval": interval}


def _compare(first: Group, other: Group, titles: Mapping[str, str]) -> str:
    """Whether the methods of both groups have the same order of loss in each, in one or two sentences."""
    ours, theirs = (losses_by_method(finished_or_all(group.runs)) for group in (first, other))
    common = [method for method in ours if method in theirs]
    if len(common) < 2:
        return f"Fewer than two methods are there at {other.scale} too, so orders cannot be compared."
    orders = compare_orders(
        {method: ours[method] for method in common},
        {method: {seed: -loss for seed, loss in theirs[method].items()} for method in common},
    )
    text = f"Kendall's τ between the orders of {len(common)} methods here and at {other.scale} is "
    text += significant(orders.tau)
    if orders.seeds < SEEDS_FOR_A_VERDICT:
        return f"{text}; {orders.seeds} common seeds are too few to say which differences in order are not chance."
    text += f" (95 % interval {significant(orders.low)} to {significant(orders.high)})."
    if not orders.reversed:
        return f"{text} No two methods are significantly in the opposite order."
    pairs = [f"{titles[one]} – {titles[two]}" for one, two in orders.reversed]
    return f"{text} Significantly in the opposite order: {join_words(pairs)}."
