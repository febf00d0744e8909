"""Any two methods are separated by a barrier: basins differ, though perplexities are close."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from statistics import fmean

from hf_lowrank.claims.claim import Claim
from hf_lowrank.claims.study import (
    Study,
    common,
    kind_of,
    logged_losses,
    loss_entries,
    null_reasons,
    paired_differences,
)
from hf_lowrank.claims.verdicts import Tested, every_above, paired_test
from hf_lowrank.claims.words import (
    decided,
    detail,
    details_of,
    interval,
    listed,
    nats,
    seeds_and_step,
    undecided_reason,
)
from hf_lowrank.formats import loss_text
from hf_lowrank.runs.measurements import OWN_BASELINE, UNDEFINED, Measurement

# A perplexity 5 % higher: what no reader would call the same loss, and several times what seeds differ by.
MARGIN = 0.05
TEST = (
    "For each pair of methods of equal seed: how far the path between their dense weights rises above the worse of "
    "its two ends, which is the barrier (above the mean of the ends) less half the difference of their losses, at "
    "the last common step, by Student's t over seeds against a margin of {margin:g} nats (a perplexity 5 % higher). "
    "Reproduced if every pair's rise lies above the margin with two-sided p < {alpha:g} (intersection–union, no "
    "correction) and all pairs with dense weights were measured; contradicted if at least one lies below it, p < "
    "{alpha:g} after Holm; else undecided. Methods without dense weights are listed and not tested."
)
Pair = tuple[str, str]


def barriers(study: Study) -> Claim:
    """Effects: the rise above the worse end, in nats."""
    statement = "Any two methods are separated by a loss barrier: their basins differ, though perplexities are close."
    test = TEST.format(margin=MARGIN, alpha=study.alpha)
    pairs = list(itertools.combinations(study.titles, 2))
    undefined = _without_dense_weights(study)
    found = common(_entries(study), pairs, {})
    losses = _losses(study, found.step, found.kind)
    rises: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    listed_only: dict[str, str] = {}
    for pair in pairs:
        label = _label(study, pair)
        values = {
            seed: height - abs(losses[pair[0], seed] - losses[pair[1], seed]) / 2
            for seed, height in found.values.get(pair, {}).items()
            if (pair[0], seed) in losses and (pair[1], seed) in losses
        }
        if values:
            rises[label] = list(values.values())
        elif why := next((undefined[method] for method in pair if method in undefined), None):
            listed_only[label] = why
        else:
            has = pair in found.values
            missing[label] = (
                "no losses to compare the barrier with" if has else found.missing.get(pair, "not measured")
            )
    decision = every_above(rises, level=MARGIN, alpha=study.alpha)
    verdict = decision.despite(missing)
    details = details_of(decision, {**missing, **listed_only}, "nats")
    if (spread := _spread(study, losses)) is not None:
        of_losses = detail("largest difference of mean losses", spread[1], "nats", reason=f"{spread[0]}: not a test")
        details = (*details, of_losses)
    if not pairs:
        reason = "fewer than two methods"
    elif verdict == "contradicted":
        reason = f"no barrier between {listed(list(decision.against))}"
    elif verdict == "reproduced":
        reason = f"all {len(rises)} pairs with dense weights rise by more than {MARGIN:g} nats above their worse end"
    elif not rises and not missing:
        reason = "no two methods have dense weights to interpolate"
    else:
        below = (f"reaches below {MARGIN:g} nats", f"reach below {MARGIN:g} nats")
        known = f"{len(rises)} of {len(rises) + len(missing)} pairs were measured; " if missing and rises else ""
        reason = known + undecided_reason(decision, missing, study, inside=below, title=str)
    sentence = f"Not tested: {reason}."
    if decision.decisive is not None:
        higher = sum(tested.effect > MARGIN for tested in decision.tested.values())
        sentence = (
            f"Between {higher} of {len(rises)} pairs the loss rises by more than {MARGIN:g} nats above the worse end; "
            f"least so between {decision.deciding}, by {interval(decision.decisive, nats, study.confidence)}; "
            f"{seeds_and_step(decision.fewest_seeds, found.step)}."
        )
        if spread is not None:
            sentence += f" The methods' mean losses lie within {loss_text(spread[1].effect)} nats."
    return decided(
        decision, verdict, id="barriers", statement=statement, unit="nats", test=test, reason=reason,
        sentence=sentence, details=details,
    )  # fmt: skip


def _label(study: Study, pair: Pair) -> str:
    return f"{study.title(pair[0])} – {study.title(pair[1])}"


def _entries(study: Study) -> Iterable[tuple[Pair, int, int, str, float]]:
    """Barriers of pairs of equal seed; a pair measured from both ends counts by the mean of the two."""
    order = list(study.titles)
    by_name: dict[tuple[str, int], list[str]] = {}
    for (method, seed), run in study.runs.items():
        by_name.setdefault((run.path.resolve().name, seed), []).append(method)
    heights: dict[tuple[Pair, int, int, str], list[float]] = {}
    for (method, seed), run in study.runs.items():
        for row in run.model_rows("method_barrier"):
            partners = by_name.get((row.baseline or "", seed), [])
            if not row.has_value or len(partners) != 1 or partners[0] == method:
                continue
            first, second = sorted((method, partners[0]), key=order.index)
            heights.setdefault(((first, second), seed, row.step, kind_of(row.settings)), []).append(row.value)
    for (pair, seed, step, kind), values in heights.items():
        yield pair, seed, step, kind, fmean(values)


def _without_dense_weights(study: Study) -> dict[str, str]:
    """The methods that measuring found to have none, and what it said."""

    def about_itself(row: Measurement) -> bool:
        why = (row.reason or "").removeprefix(UNDEFINED)
        return why != (row.reason or "") and not why.startswith(("the baseline", OWN_BASELINE))

    found = null_reasons(study, "method_barrier", about_itself)
    return {method: why.removeprefix(UNDEFINED) for method, why in found.items() if why.startswith(UNDEFINED)}


def _losses(study: Study, step: int, kind: str) -> dict[tuple[str, int], float]:
    """Losses by method and seed at the barriers' step and on their sequences; else as training logged them."""
    evaluation = json.loads(kind).get("evaluation") if kind else None
    logged = {(method, seed): value for method, seed, at, _, value in logged_losses(study) if at == step}
    found = {(m, seed): value for m, seed, at, _, value in loss_entries(study, evaluation) if at == step}
    return found or logged


def _spread(study: Study, losses: Mapping[tuple[str, int], float]) -> tuple[str, Tested] | None:
    """The two methods whose mean losses are furthest apart, and their difference."""
    by_method: dict[str, dict[int, float]] = {}
    for (method, seed), value in losses.items():
        by_method.setdefault(method, {})[seed] = value
    if len(by_method) < 2:
        return None
    means = {method: fmean(values.values()) for method, values in by_method.items()}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    found = paired_differences(by_method[low], by_method[high])
    if not found:
        return None
    tested = paired_test(list(found.values()), confidence=study.confidence)
    return f"{study.title(high)} over {study.title(low)}", tested
