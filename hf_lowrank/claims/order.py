"""The order of the methods by perplexity is not their order downstream."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from hf_lowrank.claims.claim import Claim, Verdict
from hf_lowrank.claims.study import Common, Study, common, logged_losses, loss_entries, paired_differences
from hf_lowrank.claims.verdicts import Tested, holm, paired_test, tau_interval
from hf_lowrank.claims.words import detail, listed, seeds_and_step, too_few_seeds, untested
from hf_lowrank.formats import p_text, pluralize, significant
from hf_lowrank.runs.scores import above_chance, comparable_scores, shared_tasks
from hf_lowrank.statistics import SEEDS_FOR_A_VERDICT, kendall_tau

# Above this the two orders are practically the same: at most two of 28 pairs of eight methods are reversed.
SAME_ORDER = 0.8
TEST = (
    "Methods are ordered by mean loss and by mean above-chance score over the tasks that all runs have, at the last "
    "common step. Reproduced if at least one pair of methods is significantly reversed: the one with the lower loss "
    "scores lower, both differences paired by seed, the larger of the two p-values counting (intersection–union), p "
    "< {alpha:g} after Holm over all pairs. Contradicted if no pair is and the interval of Kendall's τ between the "
    "two orders (bootstrap over seeds, widened for their small number) lies above {same:g}; else undecided."
)
Values = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Orders:
    """Two orders compared.

    Attributes:
        verdict: of the claim that they differ.
        tau, low, high: Kendall's τ of the orders by means and its interval over seeds; NaN where it is not defined.
        pairs: for each pair the test of its loss (second less first) and of its score.
        adjusted: the p-value of each pair's reversal after Holm: 1 where the two agree.
        reversed: the pairs that are significantly reversed.
        seeds: that all methods have.
    """

    verdict: Verdict
    tau: float
    low: float
    high: float
    pairs: Mapping[tuple[str, str], tuple[Tested, Tested]]
    adjusted: Mapping[tuple[str, str], float]
    reversed: tuple[tuple[str, str], ...]
    seeds: int


def compare_orders(losses: Values, scores: Values, *, alpha: float = 0.05) -> Orders:
    """Compares the order by loss (low is good) with that by score (high is good), both by method and seed. Pure.

    The false-alarm rate of the reversals is at most α whatever the number of methods; the bootstrap's interval of τ is
    approximate.
    """
    methods = [method for method in losses if method in scores]
    pairs: dict[tuple[str, str], tuple[Tested, Tested]] = {}
    p_values: dict[tuple[str, str], float] = {}
    for first, second in itertools.combinations(methods, 2):
        by_loss = paired_differences(losses[first], losses[second])
        by_score = paired_differences(scores[first], scores[second])
        seeds = sorted(set(by_loss) & set(by_score))
        if not seeds:
            continue
        loss, score = (paired_test([by[seed] for seed in seeds], confidence=1 - alpha) for by in (by_loss, by_score))
        pairs[first, second] = loss, score
        if len(seeds) >= SEEDS_FOR_A_VERDICT:
            reverse = loss.effect * score.effect > 0  # higher loss and higher score
            p_values[first, second] = max(loss.p_value or 0.0, score.p_value or 0.0) if reverse else 1.0
    adjusted = holm(p_values)
    turned = tuple(pair for pair, p in adjusted.items() if p < alpha)
    shared = set.intersection(*(set(losses[m]) & set(scores[m]) for m in methods)) if methods else set()
    tau, low, high = math.nan, math.nan, math.nan
    if len(methods) > 1 and shared:
        ours, theirs = (
            np.array([[values[m][s] for s in sorted(shared)] for m in methods]) for values in (losses, scores)
        )
        tau = float(kendall_tau(-ours.mean(1), theirs.mean(1)))
        if len(shared) > 1:
            low, high = tau_interval(-ours, theirs, confidence=1 - alpha)
    verdict: Verdict = "undecided"
    if turned:
        verdict = "reproduced"
    elif len(shared) >= SEEDS_FOR_A_VERDICT and low > SAME_ORDER:
        verdict = "contradicted"
    return Orders(verdict, tau, low, high, pairs, adjusted, turned, len(shared))


def downstream_order(study: Study) -> Claim:
    """Effect: Kendall's τ between the two orders."""
    about: dict[str, Any] = {
        "id": "downstream_order",
        "statement": "The order of the methods by perplexity is not their order downstream.",
        "unit": "Kendall's τ",
        "test": TEST.format(alpha=study.alpha, same=SAME_ORDER),
    }
    scores, tasks, problem = scores_above_chance(study)
    found = _both(study, scores)
    if problem or len(found.values) < 2:
        return untested(problem or _why_missing(study, found), **about)
    losses, downstream = (
        {m: {seed: value[side] for seed, value in seeds.items()} for m, seeds in found.values.items()}
        for side in (0, 1)
    )
    orders = compare_orders(losses, downstream, alpha=study.alpha)
    names = {pair: study.pair_title(pair) for pair in orders.pairs}
    details = tuple(
        replace(detail(f"{names[pair]}, {what}", test, unit, part=what),
                reason="reversed" if pair in orders.reversed else None)
        for pair, tests in orders.pairs.items()
        for what, unit, test in zip(("loss", "score"), ("nats", "above chance"), tests, strict=True)
    )  # fmt: skip
    left = "".join(f"; {study.title(m)}: {why}" for m, why in found.missing.items())
    number = None if math.isnan(orders.tau) else orders.tau
    bounds = [None if math.isnan(bound) else bound for bound in (orders.low, orders.high)]
    best_loss = min(losses, key=lambda m: fmean(losses[m].values()))
    best_score = max(downstream, key=lambda m: fmean(downstream[m].values()))
    tau = "undefined" if number is None else significant(number)
    if number is not None and not math.isnan(orders.low):
        tau += f" ({100 * study.confidence:g} % interval {significant(orders.low)} to {significant(orders.high)})"
    sentence = (
        f"Kendall's τ between the two orders of {len(losses)} methods is {tau}; "
        f"{pluralize(len(orders.reversed), 'pair')} of {len(orders.pairs)} "
        f"{'is' if len(orders.reversed) == 1 else 'are'} significantly reversed. Lowest loss: "
        f"{study.title(best_loss)}; best downstream: {study.title(best_score)} (mean of "
        f"{pluralize(len(tasks), 'task')}, {seeds_and_step(orders.seeds, found.step)})."
    )
    return Claim(
        **about, verdict=orders.verdict, effect=number, ci_low=bounds[0], ci_high=bounds[1],
        p_value=min(orders.adjusted.values(), default=None), n=orders.seeds, reason=_reason(orders, names) + left,
        sentence=sentence, details=details,
    )  # fmt: skip


def _reason(orders: Orders, names: Mapping[tuple[str, str], str]) -> str:
    if orders.verdict == "reproduced":
        p = max(orders.adjusted[pair] for pair in orders.reversed)
        return f"reversed: {listed([names[pair] for pair in orders.reversed])} ({p_text(p)} after Holm)"
    if orders.verdict == "contradicted":
        return f"no pair is reversed and the interval of τ lies above {SAME_ORDER:g}"
    if orders.seeds < SEEDS_FOR_A_VERDICT:
        return too_few_seeds(orders.seeds, " that all methods have")
    if math.isnan(orders.tau):
        return "all methods have the same mean loss or score"
    return f"no pair is significantly reversed, and the interval of τ reaches below {SAME_ORDER:g}"


def _why_missing(study: Study, found: Common[str, tuple[float, float]]) -> str:
    if len(study.titles) < 2:
        return "fewer than two methods"
    said = "; ".join(f"{study.title(m)}: {why}" for m, why in found.missing.items())
    return f"fewer than two methods have a loss and a downstream score at one step ({said})"


def _both(study: Study, scores: Iterable[tuple[str, int, int, float]]) -> Common[str, tuple[float, float]]:
    """Loss and score at the last common step: the loss that training logged if it has it, else the measured one."""
    table = {(method, seed, step): value for method, seed, step, value in scores}
    reasons = dict.fromkeys(study.titles, "no loss and downstream score at one step")
    scored = {method for method, _, _ in table}
    reasons |= {method: "no downstream scores" for method in study.titles if method not in scored}
    reasons |= study.notes
    results = []
    for source in (logged_losses(study), loss_entries(study)):
        entries = [
            (method, seed, step, kind, (loss, table[method, seed, step]))
            for method, seed, step, kind, loss in source
            if (method, seed, step) in table
        ]
        results.append(common(entries, list(study.titles), reasons))
    return max(results, key=lambda found: (len(found.values), found.step))


def scores_above_chance(study: Study) -> tuple[list[tuple[str, int, int, float]], list[str], str | None]:
    """(method, seed, step, mean of `(score − chance)/(1 − chance)`), the tasks, and why there is nothing."""
    scored, _ = comparable_scores({run.name: run.scores for run in study.runs.values()})
    if not scored:
        return [], [], "no downstream scores above a known level of chance"
    tasks = shared_tasks(scored, [])
    if not tasks:
        return [], [], "the runs have no task of equal items in common"
    means = above_chance(scored, [])
    entries = [
        (method, seed, step, value)
        for (method, seed), run in study.runs.items()
        for step, value in sorted(means.get(run.name, {}).items())
    ]
    return entries, tasks, None
