"""Tests on paired differences, one number for each seed, and the verdicts that follow. Pure: no run, no file.

A seed fixes the initial weights and the order of the data for every method, so methods are compared within seeds.
With n seeds there are 2ⁿ ways of flipping the signs of the differences, and the smallest two-sided p-value of that
exact test is 2/2ⁿ: 0.0625 for five seeds, which no correction for several comparisons survives. Decisions
therefore rest on Student's t, which assumes roughly normal differences; the exact sign-flip p-value, which assumes
only that they are as likely above as below, is reported as well.

Two kinds of claim. "Every method …" holds only if each comparison does, so each is tested at the full α and all must
pass (an intersection–union test: the chance of saying "every" falsely is at most that of the one comparison that does
not hold, so no correction is needed). It is contradicted by a single method that significantly goes the other way, and
since any of them could by chance, these p-values are corrected by Holm. "On average …" is one test of the mean over
methods of each seed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from hf_lowrank.claims.claim import Verdict
from hf_lowrank.statistics import (
    SEEDS_FOR_A_VERDICT,
    Array,
    kendall_tau,
    mean_interval,
    student_t_p_value,
    student_t_quantile,
)

Name = TypeVar("Name", bound=Hashable)
Samples = Mapping[str, Sequence[float]]

# Up to this many seeds all sign flips are enumerated; beyond, this many random ones.
EXACT_SEEDS = 14
FLIPS = 2**EXACT_SEEDS


@dataclass(frozen=True)
class Tested:
    """The mean of n differences, tested against a level.

    Attributes:
        effect: the mean itself, not its distance from the level.
        low, high: its t interval; None for a single seed, and where all seeds give the same number.
        p_above, p_below: twice the one-sided p-value that the mean lies above (below) the level, at most 1; the
            smaller of the two is the two-sided one. None for a single seed.
        p_sign_flip: the exact two-sided sign-flip p-value about the level; None for a single seed.
        n: seeds.
    """

    effect: float
    low: float | None
    high: float | None
    p_above: float | None
    p_below: float | None
    p_sign_flip: float | None
    n: int

    @property
    def p_value(self) -> float | None:
        """Two-sided."""
        return None if self.p_above is None or self.p_below is None else min(self.p_above, self.p_below)

    @property
    def estimate(self) -> dict[str, Any]:
        """The effect and its interval, as fields of a claim or a detail."""
        return {"effect": self.effect, "ci_low": self.low, "ci_high": self.high}


def paired_test(differences: Sequence[float], *, level: float = 0.0, confidence: float = 0.95) -> Tested:
    """Tests the mean of at least one difference against `level`.

    Differences that are all equal have no spread to judge by: they get the p-value of the sign flips and no interval.
    """
    estimate = mean_interval(differences, confidence)
    n = estimate.n
    if n == 1:
        return Tested(estimate.value, None, None, None, None, None, 1)
    flips = sign_flip_p_value([value - level for value in differences])
    deviation = math.sqrt(math.fsum((value - estimate.value) ** 2 for value in differences) / (n - 1))
    distance = estimate.value - level
    low, high = estimate.bounds
    if deviation <= 1e-12 * max(abs(value) for value in (*differences, level)):
        two_sided, low, high = flips, None, None
    else:
        two_sided = student_t_p_value(distance / (deviation / math.sqrt(n)), n - 1)
    above, below = (two_sided, 1.0) if distance > 0 else (1.0, two_sided)
    return Tested(estimate.value, low, high, above, below, flips, n)


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Share of sign flips, the observed signs among them, whose mean is as far from 0; exact up to 14 differences."""
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    exact = n <= EXACT_SEEDS
    if exact:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(FLIPS, n))
    as_far = np.abs(signs @ values) >= abs(values.sum()) - 1e-12 * np.abs(values).sum()
    return float(as_far.mean() if exact else (1 + as_far.sum()) / (1 + FLIPS))


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's adjusted p-values: comparing them with α bounds the chance of any false one among them by α."""
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for position, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of y over x; NaN where x does not vary."""
    centred = np.asarray(x, dtype=np.float64) - np.mean(x)
    weight = float(centred @ centred)
    return float(centred @ np.asarray(y, dtype=np.float64)) / weight if weight > 0 else math.nan


def tau_interval(
    first_MS: Array, second_MS: Array, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Interval of Kendall's τ between the means over seeds, by the bootstrap over seeds.

    Whole seeds are drawn, the same ones for every method and both sides. Means of so few resampled seeds vary too
    little, so their deviations are widened by `√(S/(S−1))` and by the ratio of Student's quantile to the normal one.
    """
    seeds = first_MS.shape[1]
    picked = np.random.default_rng(seed).integers(seeds, size=(resamples, seeds))
    # The order within a draw changes no mean, and few seeds allow few different draws.
    picked, which = np.unique(np.sort(picked, axis=1), axis=0, return_inverse=True)
    probability = 0.5 + confidence / 2
    wider = math.sqrt(seeds / (seeds - 1)) * (
        student_t_quantile(probability, seeds - 1) / student_t_quantile(probability, 1e6)
    )
    sides = []
    for values in (first_MS, second_MS):
        centre = values.mean(1)
        sides.append(centre + wider * (values[:, picked].mean(2).T - centre))
    taus = kendall_tau(sides[0], sides[1])[which]
    taus = taus[np.isfinite(taus)]
    if len(taus) < resamples // 2:
        return math.nan, math.nan
    low, high = np.quantile(taus, [1 - probability, probability])
    return float(low), float(high)


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
    A method does not differ when the intervals of all its `measures` lie inside ± margin, at confidence 1 − α/M, which
    corrects for M methods (Bonferroni).
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
