"""The arithmetic against scipy and numpy in float64."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from hf_lowrank.claims.verdicts import (
    holm,
    paired_test,
    sign_flip_p_value,
    slope,
    tau_interval,
)
from hf_lowrank.statistics import kendall_tau


@pytest.mark.parametrize("n", [2, 3, 5, 9, 30])
@pytest.mark.parametrize("level", [0.0, 0.4])
def test_paired_t_is_that_of_scipy(n, level):
    values = np.random.default_rng(n).normal(0.3, 1.0, n)
    tested = paired_test(values.tolist(), level=level, confidence=0.9)
    reference = scipy.stats.ttest_1samp(values, level)
    low, high = reference.confidence_interval(0.9)
    assert tested.effect == pytest.approx(values.mean(), rel=1e-12)
    assert (tested.low, tested.high) == pytest.approx((low, high), rel=1e-9)
    assert tested.p_value == pytest.approx(reference.pvalue, rel=1e-9)
    greater = scipy.stats.ttest_1samp(values, level, alternative="greater").pvalue
    less = scipy.stats.ttest_1samp(values, level, alternative="less").pvalue
    assert tested.p_above == pytest.approx(min(1, 2 * greater), rel=1e-9)
    assert tested.p_below == pytest.approx(min(1, 2 * less), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_sign_flips_are_those_of_scipy(n):
    values = np.random.default_rng(n).normal(0.5, 1.0, n)
    every = [np.dot(signs, values) for signs in itertools.product((-1, 1), repeat=n)]
    assert sign_flip_p_value(values) == np.mean(np.abs(every) >= abs(values.sum()) - 1e-12)
    if n > 1:
        reference = scipy.stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert sign_flip_p_value(values) == pytest.approx(reference.pvalue)


def test_five_seeds_allow_no_smaller_sign_flip_p_value_than_a_sixteenth():
    assert sign_flip_p_value([3.0, 2.9, 3.1, 3.05, 2.95]) == 2 / 2**5
    assert paired_test([3.0, 2.9, 3.1, 3.05, 2.95]).p_value < 1e-6


def test_many_seeds_are_flipped_at_random_and_come_near_the_normal_limit():
    values = np.random.default_rng(0).normal(0.3, 1.0, 40)
    normal = 2 * scipy.stats.norm.sf(abs(values.sum()) / np.sqrt((values**2).sum()))
    assert sign_flip_p_value(values) == pytest.approx(normal, abs=0.01)


def test_one_seed_and_equal_seeds_have_no_interval():
    single = paired_test([0.7])
    assert (single.effect, single.low, single.p_value, single.n) == (0.7, None, None, 1)
    equal = paired_test([0.7] * 5)
    assert (equal.low, equal.high, equal.p_value) == (None, None, 2 / 2**5)
    nothing = paired_test([0.0] * 5)
    assert (nothing.effect, nothing.p_value) == (0.0, 1.0)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_holm_keeps_the_chance_of_any_false_finding():
    p_values = np.random.default_rng(0).uniform(size=(4000, 7))
    found = np.mean([min(holm({str(i): p for i, p in enumerate(row)}).values()) < 0.05 for row in p_values])
    assert found == pytest.approx(1 - (1 - 0.05 / 7) ** 7, abs=0.012)


def test_slope_is_that_of_a_fitted_line():
    x, y = np.random.default_rng(0).normal(size=(2, 9))
    assert slope(x.tolist(), y.tolist()) == pytest.approx(np.polyfit(x, y, 1)[0])
    assert math.isnan(slope([1.0, 1.0], [0.0, 2.0]))


def test_the_interval_of_tau_covers_what_it_says():
    truth = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    second = np.array([0.5, 0.0, 1.0, 2.0, 1.5])
    tau = float(kendall_tau(truth, second))
    draw, covered = np.random.default_rng(0), 0
    for _ in range(150):
        sides = [side[:, None] + draw.normal(0, 0.3, (5, 5)) for side in (truth, second)]
        low, high = tau_interval(*sides, resamples=400)
        covered += low - 1e-12 <= tau <= high + 1e-12
    assert covered / 150 >= 0.93
