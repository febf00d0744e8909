"""The loss landscape: sharpness compared with the baseline's, and barriers between any two methods."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from statistics import fmean

from hf_lowrank.claims.claim import Claim
from hf_lowrank.claims.study import (
    Study,
    common,
    kind_of,
    logged_losses,
    loss_entries,
    model_values,
    null_reasons,
    paired_differences,
)
from hf_lowrank.claims.verdicts import Tested, every_above, paired_test
from hf_lowrank.claims.words import (
    LN_RATIO,
    decided,
    detail,
    details_of,
    interval,
    listed,
    listed_are,
    nats,
    seeds_and_step,
    times,
    undecided_reason,
    untested,
)
from hf_lowrank.formats import loss_text
from hf_lowrank.runs.measurements import NO_EQUIVALENT, OWN_BASELINE, UNDEFINED, Measurement

SHARPNESS_TEST = (
    "For each method the difference of {what} of {metric} with the baseline at the last common step, paired by "
    "seed, by Student's t. Reproduced if every method's difference lies on the claimed side with two-sided p < "
    "{alpha:g} (an intersection–union test, so no correction); contradicted if at least one lies on the other side, "
    "p < {alpha:g} after Holm; else undecided. The claim's p-value is that of the comparison which decides. Details "
    "give the exact sign-flip p-value too, which cannot fall below 2/2ⁿ for n seeds. Only numbers of dense weights "
    "are compared; methods that have none are listed and not tested."
)
# A perplexity 5 % higher: what no reader would call the same loss, and several times what seeds differ by.
MARGIN = 0.05
BARRIER_TEST = (
    "For each pair of methods of equal seed: the barrier, the highest rise of the loss above the chord on the "
    "straight path between their dense weights, at the last common step, by Student's t over seeds against a margin "
    "of {margin:g} nats (a perplexity 5 % higher). "
    "Reproduced if every pair's barrier lies above the margin with two-sided p < {alpha:g} (intersection–union, no "
    "correction) and all pairs with dense weights were measured; contradicted if at least one lies below it, p < "
    "{alpha:g} after Holm; else undecided. Methods without dense weights are listed and not tested."
)
Pair = tuple[str, str]


def random_sharpness(study: Study) -> Claim:
    """Full-rank is sharper than every low-rank method along random directions; effects: ln (baseline/method)."""
    statement = f"{study.title(study.baseline)} is sharper than every other method along random directions."
    return _sharper(study, "random_sharpness", statement, "along random directions", baseline_sharper=True)


def pca1_sharpness(study: Study) -> Claim:
    """Along the top-1 PCA direction every low-rank method is sharper than full-rank; effects: ln (method/baseline)."""
    statement = (
        f"Along the top-1 PCA direction the order is reversed: every other method is sharper than "
        f"{study.title(study.baseline)}."
    )
    return _sharper(study, "pca1_sharpness", statement, "along the top-1 PCA direction", baseline_sharper=False)


def _sharper(study: Study, metric: str, statement: str, where: str, *, baseline_sharper: bool) -> Claim:
    found = model_values(study, metric)
    logs = all(value > 0 for values in found.values.values() for value in values.values())
    unit = LN_RATIO if logs else "nats"
    test = SHARPNESS_TEST.format(what="the logarithm" if logs else "the value", metric=metric, alpha=study.alpha)
    if not logs:
        test += " Not all values are positive, so differences are in nats instead of ratios."
    plain_values = {
        method: {seed: math.log(value) if logs else value for seed, value in values.items()}
        for method, values in found.values.items()
    }
    base_title, base = study.title(study.baseline), plain_values.get(study.baseline, {})
    why_not = study.no_baseline or (
        f"{base_title}: {found.missing[study.baseline]}" if study.baseline in found.missing else None
    )
    if why_not:
        return untested(why_not, id=metric, statement=statement, unit=unit, test=test)
    sides = {method: (plain_values.get(method, {}), base) for method in study.others}
    samples = {
        method: list(paired_differences(*(pair if baseline_sharper else pair[::-1])).values())
        for method, pair in sides.items()
    }
    decision = every_above(samples, alpha=study.alpha)
    missing = {
        method: found.missing.get(method, "no seed in common with the baseline")
        for method in study.others
        if method not in decision.tested
    }
    without = {method: why for method, why in missing.items() if why.endswith(NO_EQUIVALENT)}
    missing = {method: why for method, why in missing.items() if method not in without}
    verdict = decision.despite(missing)
    if verdict == "contradicted":
        names = listed_are([study.title(method) for method in decision.against])
        reason = f"{names} {'sharper' if baseline_sharper else 'less sharp'} than {base_title}"
    elif verdict == "reproduced":
        reason = f"the interval of every method lies on the claimed side ({len(decision.tested)} methods)"
    elif without and not decision.tested and not missing:
        reason = "no other method has dense weights"
    else:
        reason = undecided_reason(decision, missing, study)
    sentence = f"Not tested: {reason}."
    if decision.decisive is not None and decision.deciding is not None:
        claimed = sum(test_.effect > 0 for test_ in decision.tested.values())
        title = study.title(decision.deciding)
        sharp, other = (base_title, title) if baseline_sharper else (title, base_title)
        found_in = (
            f"{base_title} is on average sharper than {claimed} of {len(decision.tested)} methods"
            if baseline_sharper
            else f"{claimed} of {len(decision.tested)} methods are on average sharper than {base_title}"
        )
        number = interval(decision.decisive, times if logs else nats, study.confidence)
        weakest = "most against it" if verdict == "contradicted" else "weakest for it"
        sentence = (
            f"{where[0].upper()}{where[1:]} {found_in}; {weakest}, {sharp} {'has' if logs else 'less'} "
            f"{f'{number} the sharpness of {other}' if logs else f'{other} is {number}'}; "
            f"{seeds_and_step(decision.fewest_seeds, found.step)}."
        )
    if without:
        names = listed_are([study.title(method) for method in without])
        sentence += f" {names} left out: no dense equivalent."
    return decided(
        decision, verdict, id=metric, statement=statement, unit=unit, test=test, reason=reason, sentence=sentence,
        details=details_of(decision, {**missing, **without}, unit, study.title),
    )  # fmt: skip


def barriers(study: Study) -> Claim:
    """Effects: the barriers, in nats."""
    statement = "Any two methods are separated by a loss barrier: their basins differ, though perplexities are close."
    test = BARRIER_TEST.format(margin=MARGIN, alpha=study.alpha)
    pairs = list(itertools.combinations(study.titles, 2))
    undefined = _without_dense_weights(study)
    found = common(_entries(study), pairs, {})
    losses = _losses(study, found.step, found.kind)
    rises: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    listed_only: dict[str, str] = {}
    for pair in pairs:
        label = study.pair_title(pair)
        if values := [*found.values.get(pair, {}).values()]:
            rises[label] = values
        elif why := next((undefined[method] for method in pair if method in undefined), None):
            listed_only[label] = why
        else:
            missing[label] = found.missing.get(pair, "not measured")
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
        reason = f"all {len(rises)} pairs with dense weights have a barrier above {MARGIN:g} nats"
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
            f"Between {higher} of {len(rises)} pairs the loss rises by more than {MARGIN:g} nats above the chord; "
            f"least so between {decision.deciding}, by {interval(decision.decisive, nats, study.confidence)}; "
            f"{seeds_and_step(decision.fewest_seeds, found.step)}."
        )
        if spread is not None:
            sentence += f" The methods' mean losses lie within {loss_text(spread[1].effect)} nats."
    return decided(
        decision, verdict, id="barriers", statement=statement, unit="nats", test=test, reason=reason,
        sentence=sentence, details=details,
    )  # fmt: skip


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


def _losses(study: Study, step: int, kind: str) -> dict[str, dict[int, float]]:
    """Losses by method and seed at the barriers' step and on their sequences; else as training logged them."""
    evaluation = json.loads(kind).get("evaluation") if kind else None
    found: dict[str, dict[int, float]] = {}
    for source in (loss_entries(study, evaluation), logged_losses(study)):
        for method, seed, at, _, value in source if not found else ():
            if at == step:
                found.setdefault(method, {})[seed] = value
    return found


def _spread(study: Study, losses: Mapping[str, Mapping[int, float]]) -> tuple[str, Tested] | None:
    """The two methods whose mean losses are furthest apart, and their difference."""
    if len(losses) < 2:
        return None
    means = {method: fmean(values.values()) for method, values in losses.items()}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    found = paired_differences(losses[low], losses[high])
    if not found:
        return None
    tested = paired_test(list(found.values()), confidence=study.confidence)
    return f"{study.title(high)} over {study.title(low)}", tested
