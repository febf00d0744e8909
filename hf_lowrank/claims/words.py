"""Sentences and reasons with their numbers, as they are displayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hf_lowrank.claims.claim import Claim, Detail, Verdict
from hf_lowrank.claims.study import Study
from hf_lowrank.claims.verdicts import Decision, Tested, all_of
from hf_lowrank.formats import join_words, pluralize, significant
from hf_lowrank.statistics import SEEDS_FOR_A_VERDICT

# Names listed in a sentence before "and … more".
NAMED = 4
LN_RATIO = "ln ratio"

Number = Callable[[float], str]


def times(log_ratio: float) -> str:
    """A ln ratio as `1.21 times`."""
    return f"{significant(math.exp(log_ratio))} times"


def percent(log_ratio: float) -> str:
    """A ln ratio as `+12 %`, `−0.8 %`."""
    change = 100 * math.expm1(log_ratio)
    return f"{'+' if change > 0 else ''}{significant(change, 2)} %"


def nats(value: float) -> str:
    return f"{significant(value)} nats"


def interval(test: Tested, number: Number, confidence: float) -> str:
    """`1.21 times (95 % interval 1.10 to 1.30)`: the unit is written once."""
    if test.low is None or test.high is None:
        return number(test.effect)
    whole, low, high = number(test.effect), number(test.low), number(test.high)
    unit = next((f" {word}" for word in ("times", "nats") if whole.endswith(f" {word}")), "")
    return f"{whole} ({100 * confidence:g} % interval {low.removesuffix(unit)} to {high.removesuffix(unit)})"


def listed(names: Sequence[str]) -> str:
    """All names, or the first few and how many more."""
    if len(names) <= NAMED + 1:
        return join_words(names) if names else "none"
    return ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more"


def listed_are(names: Sequence[str]) -> str:
    """`GaLore is`, `GaLore and Fira are`."""
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"


def too_few_seeds(n: int, whose: str = "") -> str:
    return f"too few seeds{whose}: {n}, at least {SEEDS_FOR_A_VERDICT} are needed"


def undecided_reason(
    decision: Decision,
    missing: Mapping[str, str],
    study: Study,
    *,
    inside: tuple[str, str] = ("includes no difference", "include no difference"),
    title: Callable[[str], str] | None = None,
) -> str:
    """Why comparisons give no verdict.

    Args:
        missing: missing comparisons, and why.
        inside: what one unclear interval does, and what several do.
        title: how a comparison is spelled; None: as a method.
    """
    spell = title or study.title
    parts = []
    for why in dict.fromkeys(missing.values()):
        parts.append(f"{listed([spell(name) for name, other in missing.items() if other == why])}: {why}")
    if decision.few:
        fewest = min(decision.tested[name].n for name in decision.few)
        whose = "" if len(decision.few) == len(decision.tested) else f" of {listed([spell(n) for n in decision.few])}"
        parts.append(too_few_seeds(fewest, whose))
    tested = {name: decision.tested[name] for name in decision.unsure}
    flat = [name for name, test in tested.items() if test.low is None]
    other_way = [n for n, t in tested.items() if n not in flat and t.p_below is not None and t.p_below < study.alpha]
    if flat:
        parts.append(f"all seeds give the same number for {listed([spell(name) for name in flat])}")
    if other_way:
        goes = "goes" if len(other_way) == 1 else "go"
        names = listed([spell(name) for name in other_way])
        parts.append(
            f"{names} {goes} the other way, but not significantly so among {len(decision.tested)} comparisons"
        )
    if rest := [spell(name) for name in tested if name not in flat and name not in other_way]:
        several = len(rest) > 1
        parts.append(f"the interval{'s' if several else ''} of {listed(rest)} {inside[several]}")
    return "; ".join(parts) or "nothing to compare"


def detail(label: str, test: Tested, unit: str, *, part: str = "", reason: str | None = None) -> Detail:
    """A comparison as it is shown."""
    if test.n > 1 and test.low is None and reason is None:
        reason = "all seeds give the same number"
    return Detail(
        label=label, **test.estimate, p_value=test.p_value, p_sign_flip=test.p_sign_flip, n=test.n, unit=unit,
        part=part, reason=reason,
    )  # fmt: skip


def details_of(
    decision: Decision, missing: Mapping[str, str], unit: str, title: Callable[[str], str] = str
) -> tuple[Detail, ...]:
    """The comparisons that were tested, then the missing ones with the reason."""
    tested = [detail(title(name), test, unit) for name, test in decision.tested.items()]
    return (*tested, *(Detail(label=title(name), unit=unit, reason=why) for name, why in missing.items()))


def untested(reason: str, **about: Any) -> Claim:
    """A claim for which nothing could be compared; `about`: its other fields."""
    return Claim(verdict="undecided", reason=reason, sentence=f"Not tested: {reason}.", **about)


def decided(decision: Decision, verdict: Verdict, **about: Any) -> Claim:
    """A claim that one of several comparisons decides; `about`: its other fields."""
    effect = decision.decisive.estimate if decision.decisive else {}
    return Claim(verdict=verdict, **effect, p_value=decision.p_value, n=decision.fewest_seeds, **about)


class Part(NamedTuple):
    """A part of a claim: its verdict with the reason, its comparisons, and what was found."""

    head: Detail
    details: Sequence[Detail]
    sentence: str


def claim_of_parts(parts: Sequence[Part], remark: str = "", **about: Any) -> Claim:
    """A claim that holds if all its parts do; the reason is that of the deciding parts, then `remark`."""
    verdict = all_of([part.head.verdict or "undecided" for part in parts])
    reasons = dict.fromkeys(part.head.reason or "" for part in parts if part.head.verdict == verdict)
    return Claim(
        verdict=verdict, reason="; ".join(reasons) + remark, sentence=" ".join(part.sentence for part in parts),
        details=tuple(detail for part in parts for detail in (part.head, *part.details)), **about,
    )  # fmt: skip


def seeds_and_step(n: int, step: int) -> str:
    return f"{pluralize(n, 'seed')}, step {step}"
