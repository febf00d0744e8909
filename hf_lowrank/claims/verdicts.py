"""How a verdict follows from differences by seed. Pure: names and numbers in, a decision out.

Two kinds of claim. "Every method …" holds only if each comparison does, so each is tested at the full α and all must
pass (an intersection–union test: the chance of saying "every" falsely is at most that of the one comparison that does
not hold, whence no correction). It is contradicted by a single method that significantly goes the other way, and as
any of them could by chance, these p-values are corrected by Holm. "On average …" is one test of the mean over methods
of each seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from hf_lowrank.claims.claim import Verdict
from hf_lowrank.claims.paired import Tested, holm, paired_test
from hf_lowrank.statistics import SEEDS_FOR_A_VERDICT

Samples = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Decision:
    """What the comparisons decide.

    Attributes:
        verdict: of these comparisons; the caller accounts for missing ones.
        tested: every comparison that has differences.
        deciding: the one that determines the verdict: the strongest against, else the weakest for; None without any.
        p_value: of the verdict; None where nothing could be tested.
        against: those that significantly go the other way.
        unsure: those that could be tested and do not decide.
        few: those of fewer than three seeds.
    """

    verdict: Verdict
    tested: Mapping[str, Tested]
    deciding: str | None
    p_value: float | None
    against: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()
    few: tuple[str, ...] = ()

    @property
    def decisive(self) -> Tested | None:
        """The test of the deciding comparison."""
        return None if self.deciding is None else self.tested[self.deciding]

    @property
    def fewest_seeds(self) -> int:
        return min((test.n for test in self.tested.values()), default=0)

    def despite(self, missing: Mapping[str, str]) -> Verdict:
        """The verdict where comparisons may be missing: only a contradiction holds without them."""
        return self.verdict if self.verdict == "contradicted" or not missing else "undecided"


def every_above(samples: Samples, *, level: float = 0.0, alpha: float = 0.05) -> Decision:
    """Whether every mean lies above `level`.

    Reproduced: each does, p < α. Contradicted: at least one lies below, p < α after Holm. Both p-values two-sided.
    """
    tested = {
        name: paired_test(values, level=level, confidence=1 - alpha) for name, values in samples.items() if values
    }
    few = tuple(name for name, test in tested.items() if test.n < SEEDS_FOR_A_VERDICT)
    above = {name: _known(test.p_above) for name, test in tested.items() if name not in few}
    below = {name: _known(test.p_below) for name, test in tested.items() if name not in few}
    against = tuple(name for name, p in holm(below).items() if p < alpha)
    unsure = tuple(name for name, p in above.items() if p >= alpha and name not in against)
    if against:
        first = min(against, key=lambda name: below[name])
        return Decision("contradicted", tested, first, holm(below)[first], against, unsure, few)
    weakest = max(above or tested, key=lambda name: (_known(tested[name].p_above), -tested[name].effect), default=None)
    verdict: Verdict = "reproduced" if above and not few and not unsure else "undecided"
    return Decision(verdict, tested, weakest, max(above.values(), default=None), (), unsure, few)


def on_average(samples: Mapping[str, Mapping[int, float]], *, alpha: float = 0.05) -> tuple[Decision, Tested | None]:
    """Whether the mean over methods lies above 0; `samples` by method, then seed.

    Only seeds that all methods have are averaged. Reproduced: the mean lies above, p < α, and no method significantly
    (Holm) below. Contradicted: the mean lies below, p < α.
    """
    each = every_above({name: list(values.values()) for name, values in samples.items()}, alpha=alpha)
    pooled = pooled_by_seed(samples)
    if not pooled:
        return replace(each, verdict="undecided", deciding=None, p_value=None), None
    test = paired_test(list(pooled.values()), confidence=1 - alpha)
    verdict: Verdict = "undecided"
    if test.n >= SEEDS_FOR_A_VERDICT:
        if _known(test.p_below) < alpha:
            verdict = "contradicted"
        elif _known(test.p_above) < alpha and not each.against:
            verdict = "reproduced"
    return replace(each, verdict=verdict, deciding=None, p_value=test.p_value), test


def pooled_by_seed(samples: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """The mean over methods of each seed that all of them have."""
    if not samples:
        return {}
    seeds = set.intersection(*(set(values) for values in samples.values()))
    return {seed: fmean(values[seed] for values in samples.values()) for seed in sorted(seeds)}


@dataclass(frozen=True)
class Difference:
    """Whether one method differs from the baseline by any of several measures.

    Attributes:
        verdict: "reproduced" if at least one difference lies outside ± margin, "contradicted" if all lie inside.
        tested: by measure.
        outside: the measures that differ by more than the margin.
    """

    verdict: Verdict
    tested: Mapping[str, Tested]
    outside: tuple[str, ...]


def differences(
    samples: Mapping[str, Samples], *, margin: float, measures: int, alpha: float = 0.05
) -> dict[str, Difference]:
    """For each method whether its measures differ from the baseline's; `samples` by method, then measure.

    A measure differs when its mean difference lies outside ± margin, p < α after Holm over all methods and measures.
    A method does not differ when the intervals of all its `measures` lie inside ± margin, at confidence 1 − α/M for M
    methods: as many chances of saying so falsely are made up for.
    """
    tested = {
        method: {name: paired_test(values, confidence=1 - alpha) for name, values in found.items() if values}
        for method, found in samples.items()
    }
    p_values = {
        (method, name): p
        for method, found in samples.items()
        for name, values in found.items()
        if len(values) >= SEEDS_FOR_A_VERDICT and (p := p_outside(values, margin)) is not None
    }
    adjusted = holm(p_values)
    result = {}
    for method, found in samples.items():
        outside = tuple(name for name in found if adjusted.get((method, name), 1.0) < alpha)
        whole = len(found) == measures and all(len(values) >= SEEDS_FOR_A_VERDICT for values in found.values())
        inside = whole and all(_inside(values, margin, alpha / len(samples)) for values in found.values())
        verdict: Verdict = "reproduced" if outside else "contradicted" if inside else "undecided"
        result[method] = Difference(verdict, tested[method], outside)
    return result


def p_outside(values: Sequence[float], margin: float) -> float | None:
    """Two-sided p-value that the mean lies outside ± margin; None for a single seed."""
    sides = (paired_test(values, level=margin).p_above, paired_test(values, level=-margin).p_below)
    return min(side for side in sides if side is not None) if None not in sides else None


def _inside(values: Sequence[float], margin: float, alpha: float) -> bool:
    test = paired_test(values, confidence=1 - alpha)
    if test.low is None or test.high is None:  # all equal: nothing to bound
        return False
    return -margin < test.low and test.high < margin


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim of several parts: contradicted if one is, reproduced if all are."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "reproduced" if verdicts and set(verdicts) == {"reproduced"} else "undecided"


def _known(p_value: float | None) -> float:
    return 1.0 if p_value is None else p_value
