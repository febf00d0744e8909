"""Estimates, intervals and tests against tables, closed forms and brute force."""

import itertools
import math

import numpy as np
import pytest

from hf_lowrank.statistics import (
    kendall_tau,
    mcnemar,
    mean_difference,
    mean_interval,
    spearman,
    student_t_p_value,
    student_t_quantile,
)


@pytest.mark.parametrize(
    ("probability", "degrees", "tabulated"),
    # Abramowitz and Stegun, table 26.10
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.995, 10, 3.169),
        (0.9995, 5, 6.869),
        (0.975, 1e7, 1.96),
    ],
)
def test_t_quantiles_are_the_tabulated_ones(probability, degrees, tabulated):
    assert student_t_quantile(probability, degrees) == pytest.approx(tabulated, abs=6e-4)
    assert student_t_p_value(tabulated, degrees) == pytest.approx(2 * (1 - probability), rel=6e-3)


def test_t_has_its_closed_form_for_one_degree():
    for probability in (0.6, 0.9, 0.999):
        t = math.tan(math.pi * (probability - 0.5))
        assert student_t_quantile(probability, 1) == pytest.approx(t, rel=1e-9)
        assert student_t_p_value(-t, 1) == pytest.approx(2 * (1 - probability), rel=1e-9)


def test_intervals_cover_as_often_as_they_say():
    generator = np.random.default_rng(0)
    samples = generator.normal(3.0, 0.2, size=(2000, 5))
    found = [mean_interval(list(sample)) for sample in samples]
    share = np.mean([estimate.low <= 3.0 <= estimate.high for estimate in found])
    assert 0.935 < share < 0.965


def test_pairs_see_through_what_seeds_share():
    shared = {0: 3.0, 1: 3.5, 2: 4.0}
    better = {seed: loss - 0.1 - 0.001 * seed for seed, loss in shared.items()}
    difference = mean_difference(better, shared)
    assert difference.low > 0
    assert difference.value == pytest.approx(0.101)
    welch = mean_difference(better, {seed + 10: loss for seed, loss in shared.items()})
    assert welch.low < 0 < welch.high
    assert mean_difference({0: 1.0}, {1: 2.0, 2: 3.0}) is None
    assert not mean_interval([2.0]).has_interval
    assert mean_interval([2.0]).bounds == (None, None)


def test_without_common_seeds_the_interval_is_welch_s():
    ours, theirs = {0: 3.0, 1: 3.5, 2: 4.1}, {10: 2.0, 11: 2.1}
    squares = [np.var(list(side.values()), ddof=1) / len(side) for side in (ours, theirs)]
    degrees = sum(squares) ** 2 / sum(s**2 / (len(side) - 1) for s, side in zip(squares, (ours, theirs), strict=True))
    half = student_t_quantile(0.95, degrees) * math.sqrt(sum(squares))
    found = mean_difference(ours, theirs, confidence=0.9)
    expected = 2.05 - np.mean(list(ours.values()))
    assert found[:3] == pytest.approx((expected, expected - half, expected + half), rel=1e-12)
    assert found.n == 2
    equal = mean_difference({0: 1.0, 1: 1.0}, {2: 3.0, 3: 3.0})
    assert (equal.value, equal.low, equal.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("ties", [False, True])
def test_kendall_tau_counts_pairs(ties):
    pairs = np.random.default_rng(3).normal(size=(6, 2, 8))
    pairs = np.round(pairs) if ties else pairs
    for value, (a, b) in zip(kendall_tau(pairs[:, 0], pairs[:, 1]), pairs, strict=True):
        signs = [np.sign(((a[i] - a[j]), (b[i] - b[j]))) for i, j in itertools.combinations(range(8), 2)]
        concordance = sum(x * y for x, y in signs)
        weight = math.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs))
        assert value == pytest.approx(concordance / weight)
    assert math.isnan(float(kendall_tau(np.ones(4), np.arange(4.0))))


def test_spearman_correlates_ranks_and_ties_share_theirs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 50).astype(float), rng.normal(size=50)
    ranks = [[np.mean(np.flatnonzero(np.sort(side) == value)) for value in side] for side in (a, b)]
    assert spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    assert math.isnan(spearman(a, np.ones(50)))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 9), (30, 30), (70, 80), (5, 200)])
def test_mcnemar_is_the_binomial_tail_of_a_fair_coin(first, second):
    total = first + second
    tail = sum(math.comb(total, k) for k in range(min(first, second) + 1)) / 2**total
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
