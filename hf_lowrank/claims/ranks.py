"""Per method: the rank structure of weights and of updates differs from full-rank's; which, and by how much."""

from __future__ import annotations

import math

from hf_lowrank.claims.claim import Claim, Detail
from hf_lowrank.claims.study import Study, model_values, paired_differences
from hf_lowrank.claims.verdicts import all_of, differences
from hf_lowrank.claims.words import (
    LN_RATIO,
    Part,
    claim_of_parts,
    detail,
    listed_are,
    percent,
    seeds_and_step,
    too_few_seeds,
    untested,
)
from hf_lowrank.statistics import SEEDS_FOR_A_VERDICT

# One percent: smaller differences barely show in tables of three digits.
MARGIN = math.log(1.01)
PARTS = {
    "weights": ("weight_effective_rank", "weight_stable_rank"),
    "updates": ("update_effective_rank", "update_stable_rank"),
}
WORDS = {"effective_rank": "effective rank", "stable_rank": "stable rank"}
TEST = (
    "For each method the ln ratio to the baseline of effective and of stable rank, of weights and of updates, at "
    "the last common step, paired by seed, by Student's t. A measure differs if its mean lies outside ± 1 %, "
    "two-sided p < {alpha:g} after Holm over all methods and both measures. A part is reproduced if every method "
    "differs in at least one of its two measures; contradicted if for some method the intervals of both (Bonferroni "
    "over methods) lie inside ± 1 %; else undecided. The claim is reproduced if both parts are, contradicted if one "
    "is."
)


def rank_structure(study: Study) -> Claim:
    """Two parts, each with a verdict among the details; the claim itself has no one effect."""
    baseline = study.title(study.baseline)
    about = {
        "id": "rank_structure",
        "statement": f"Rank structure differs from {baseline}'s with every method, of weights and of updates.",
        "unit": LN_RATIO,
        "test": TEST.format(alpha=study.alpha),
    }
    if why_not := study.no_baseline:
        return untested(why_not, **about)
    parts = [_part(study, part, metrics) for part, metrics in PARTS.items()]
    return claim_of_parts(parts, **about, n=min(part.head.n for part in parts))


def _part(study: Study, part: str, metrics: tuple[str, str]) -> Part:
    samples: dict[str, dict[str, list[float]]] = {}
    missing: dict[tuple[str, str], str] = {}
    steps = set()
    for metric in metrics:
        found = model_values(study, metric)
        steps.add(found.step)
        logs = {m: {s: math.log(v) for s, v in values.items() if v > 0} for m, values in found.values.items()}
        for method in study.others:
            pairs = paired_differences(logs.get(study.baseline, {}), logs.get(method, {}))
            if pairs:
                samples.setdefault(method, {})[metric] = list(pairs.values())
            else:
                whose = method if method in found.missing else study.baseline
                missing[method, metric] = found.missing.get(whose, "no seed in common with the baseline")
    answers = differences(samples, margin=MARGIN, measures=len(metrics), alpha=study.alpha)
    differ = [method for method, answer in answers.items() if answer.verdict == "reproduced"]
    same = [method for method, answer in answers.items() if answer.verdict == "contradicted"]
    open_ = [method for method in study.others if method not in differ and method not in same]
    verdict = all_of([answers[m].verdict if m in answers else "undecided" for m in study.others])
    fewest = min((len(v) for measures in samples.values() for v in measures.values()), default=0)
    if verdict == "contradicted":
        reason = f"{listed_are([study.title(m) for m in same])} within 1 % of the baseline"
    elif verdict == "reproduced":
        reason = f"every method differs by more than 1 % ({len(differ)})"
    elif missing:
        (method, metric), why = next(iter(missing.items()))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        reason = f"{metric} of {study.title(method)}: {why}{more}"
    elif fewest < SEEDS_FOR_A_VERDICT:
        reason = too_few_seeds(fewest)
    else:
        names = listed_are([study.title(m) for m in open_])
        reason = f"{names} shown neither to differ from the baseline nor to equal it"
    head = Detail(label=part, n=fewest, unit=LN_RATIO, part=part, verdict=verdict, reason=f"{part}: {reason}")
    details = []
    for method in study.others:
        for metric in metrics:
            label = f"{study.title(method)}, {metric.replace('_', ' ')}"
            if method in answers and metric in answers[method].tested:
                answer = answers[method]
                remark = "differs" if metric in answer.outside else _surrogate(study, method, metric)
                details.append(detail(label, answer.tested[metric], LN_RATIO, part=part, reason=remark))
            else:
                details.append(Detail(label=label, unit=LN_RATIO, part=part, reason=missing[method, metric]))
    return Part(head, details, _sentence(study, part, answers, differ, fewest, max(steps)))


def _surrogate(study: Study, method: str, metric: str) -> str | None:
    """The remark on this method's values (CoLA's spectra are of a surrogate for its dense weights)."""
    for (name, _), run in study.runs.items():
        row = run.last(metric) if name == method else None
        if row is not None and row.has_value and row.reason:
            return row.reason
    return None


def _sentence(study: Study, part: str, answers: dict, differ: list[str], seeds: int, step: int) -> str:
    effects = [
        (abs(test.effect), test.effect, method, metric)
        for method, answer in answers.items()
        for metric, test in answer.tested.items()
    ]
    if not effects:
        return f"{part.capitalize()}: not tested."
    _, effect, method, metric = max(effects)
    name = WORDS[metric.split("_", 1)[1]]
    return (
        f"{part.capitalize()}: {len(differ)} of {len(study.others)} methods are shown to differ from "
        f"{study.title(study.baseline)} by more than 1 %; the largest difference is {study.title(method)}'s {name}, "
        f"{percent(effect)}; {seeds_and_step(seeds, step)}."
    )
