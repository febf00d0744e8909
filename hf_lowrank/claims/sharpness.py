"""Full-rank is sharper than every other method along random directions; along the top PCA direction it is less so."""

from __future__ import annotations

import math

from hf_lowrank.claims.claim import Claim
from hf_lowrank.claims.study import Study, model_values, paired_differences
from hf_lowrank.claims.verdicts import every_above
from hf_lowrank.claims.words import (
    LN_RATIO,
    decided,
    details_of,
    interval,
    listed_are,
    nats,
    seeds_and_step,
    times,
    undecided_reason,
    untested,
)

TEST = (
    "For each method the difference of {what} of {metric} with the baseline at the last common step, paired by "
    "seed, by Student's t. Reproduced if every method's difference lies on the claimed side with two-sided p < "
    "{alpha:g} (an intersection–union test, so no correction); contradicted if at least one lies on the other side, "
    "p < {alpha:g} after Holm; else undecided. The claim's p-value is that of the comparison which decides. Details "
    "give the exact sign-flip p-value too, which cannot fall below 2/2ⁿ for n seeds."
)


def random_sharpness(study: Study) -> Claim:
    """Full-rank is sharper than every low-rank method along random directions; effects: ln (baseline/method)."""
    statement = f"{study.title(study.baseline)} is sharper than every other method along random directions."
    return _sharper(study, "random_sharpness", statement, "along random directions", baseline_sharper=True)


def pca1_sharpness(study: Study) -> Claim:
    """Along the top-1 PCA direction every low-rank method is sharper than full-rank; effects: ln (method/baseline)."""
    statement = (
        f"Along the top-1 PCA direction the order turns round: every other method is sharper than "
        f"{study.title(study.baseline)}."
    )
    return _sharper(study, "pca1_sharpness", statement, "along the top-1 PCA direction", baseline_sharper=False)


def _sharper(study: Study, metric: str, statement: str, where: str, *, baseline_sharper: bool) -> Claim:
    found = model_values(study, metric)
    logs = all(value > 0 for values in found.values.values() for value in values.values())
    unit = LN_RATIO if logs else "nats"
    test = TEST.format(what="the logarithm" if logs else "the value", metric=metric, alpha=study.alpha)
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
    verdict = decision.despite(missing)
    if verdict == "contradicted":
        names = listed_are([study.title(method) for method in decision.against])
        reason = f"{names} {'sharper' if baseline_sharper else 'less sharp'} than {base_title}"
    elif verdict == "reproduced":
        reason = f"the interval of every method lies on the claimed side ({len(decision.tested)} methods)"
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
    return decided(
        decision, verdict, id=metric, statement=statement, unit=unit, test=test, reason=reason, sentence=sentence,
        details=details_of(decision, missing, unit, study.title),
    )  # fmt: skip
