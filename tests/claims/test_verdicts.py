"""Decisions on simulated differences: what was put there is found, and what is not there is not."""

import numpy as np
import pytest

from hf_lowrank.claims.order import compare_orders
from hf_lowrank.claims.verdicts import all_of, differences, every_above, on_average

SIMULATIONS = 200
ALPHA = 0.05
# Verdicts on nothing among 200: twice α, and what chance adds to that (1.64 standard errors).
MOST = SIMULATIONS * 2 * ALPHA + 1.64 * np.sqrt(SIMULATIONS * 2 * ALPHA * (1 - 2 * ALPHA))
NAMES = "abcdefg"


def by_name(values):
    return {name: row.tolist() for name, row in zip(NAMES, values, strict=False)}


def by_seed(values):
    return {name: dict(enumerate(row.tolist())) for name, row in zip(NAMES, values, strict=False)}


def shared_noise(draw, methods, seeds):
    """Differences with a common baseline: correlated, as they are in a study."""
    return draw.normal(size=(methods, seeds)) - draw.normal(size=(1, seeds))


def test_every_method_must_lie_above():
    draw = np.random.default_rng(0)
    above = draw.normal(3, 0.3, (4, 5))
    assert every_above(by_name(above)).verdict == "reproduced"
    assert every_above(by_name(-above)).verdict == "contradicted"
    one_against = above * np.array([1, 1, -1, 1])[:, None]
    decision = every_above(by_name(one_against))
    assert (decision.verdict, decision.against, decision.deciding) == ("contradicted", ("c",), "c")
    one_unsure = above.copy()
    one_unsure[1] = [-1, 1, -1, 1, 0.1]
    decision = every_above(by_name(one_unsure))
    assert (decision.verdict, decision.unsure, decision.deciding) == ("undecided", ("b",), "b")


def test_the_level_moves_the_line():
    values = by_name(np.random.default_rng(0).normal(0.10, 0.005, (3, 5)))
    assert every_above(values, level=0.05).verdict == "reproduced"
    assert every_above(values, level=0.2).verdict == "contradicted"


def test_two_seeds_decide_nothing():
    assert every_above({"a": [3.0, 3.1]}).verdict == "undecided"
    assert every_above({"a": [3.0, 3.1]}).few == ("a",)
    assert every_above({}).verdict == "undecided"


@pytest.mark.parametrize("methods", [1, 3, 7])
def test_every_above_seldom_errs_on_nothing(methods):
    draw = np.random.default_rng(methods)
    wrong = sum(
        every_above(by_name(shared_noise(draw, methods, 5))).verdict != "undecided" for _ in range(SIMULATIONS)
    )
    assert wrong <= MOST


def test_every_above_seldom_says_every_when_one_does_not():
    draw = np.random.default_rng(1)
    wrong = 0
    for _ in range(SIMULATIONS):
        values = draw.normal(5, 1, (7, 5))
        values[3] -= 5
        wrong += every_above(by_name(values)).verdict != "undecided"
    assert wrong <= MOST


def test_a_mean_over_methods():
    draw = np.random.default_rng(0)
    growing = draw.normal(1, 0.2, (4, 5))
    assert on_average(by_seed(growing))[0].verdict == "reproduced"
    assert on_average(by_seed(-growing))[0].verdict == "contradicted"
    mixed = growing * np.array([1, 3, 3, -1])[:, None]
    decision, pooled = on_average(by_seed(mixed))
    assert pooled.p_above < ALPHA
    assert (decision.verdict, decision.against) == ("undecided", ("d",))
    missing = by_seed(growing)
    del missing["b"][2], missing["a"][4]
    assert on_average(missing)[1].n == 3
    assert on_average({})[1] is None


def test_a_mean_over_methods_seldom_errs_on_nothing():
    draw = np.random.default_rng(5)
    wrong = sum(on_average(by_seed(shared_noise(draw, 7, 5)))[0].verdict != "undecided" for _ in range(SIMULATIONS))
    assert wrong <= MOST


def rank_samples(draw, centres, scale=0.002):
    return {
        name: {"eff": draw.normal(e, scale, 5).tolist(), "stable": draw.normal(s, scale, 5).tolist()}
        for name, (e, s) in zip(NAMES, centres, strict=False)
    }


def test_methods_differ_are_equal_or_neither():
    draw = np.random.default_rng(0)
    found = differences(rank_samples(draw, [(0.2, 0), (0, -0.3), (0, 0)], 0.001), margin=0.01, measures=2)
    assert [found[name].verdict for name in "abc"] == ["reproduced", "reproduced", "contradicted"]
    assert (found["a"].outside, found["b"].outside) == (("eff",), ("stable",))
    noisy = differences(rank_samples(draw, [(0, 0)], 0.05), margin=0.01, measures=2)
    assert noisy["a"].verdict == "undecided"
    half = {"a": {"eff": [0.0001, 0.0002, -0.0001]}}
    assert differences(half, margin=0.01, measures=2)["a"].verdict == "undecided"


@pytest.mark.parametrize("scale", [0.004, 0.05])
def test_differences_seldom_err_at_the_margin(scale):
    """At ± the margin neither "differs" nor "does not" is right: the hardest place."""
    draw, wrong = np.random.default_rng(2), 0
    for _ in range(SIMULATIONS):
        found = differences(rank_samples(draw, [(0.01, -0.01)] * 4, scale), margin=0.01, measures=2)
        wrong += any(answer.verdict != "undecided" for answer in found.values())
    assert wrong <= MOST


def simulated_orders(draw, losses, scores, noise=0.02):
    sides = (np.asarray(losses), np.asarray(scores))
    return [by_seed(side[:, None] + draw.normal(0, noise, (len(side), 5))) for side in sides]


def test_reversed_pairs_make_the_orders_differ():
    draw = np.random.default_rng(0)
    found = compare_orders(*simulated_orders(draw, [1.0, 2.0, 3.0, 4.0], [0.5, 0.9, 0.3, 0.1]))
    assert (found.verdict, found.reversed) == ("reproduced", (("a", "b"),))
    assert found.tau == pytest.approx(4 / 6)


def test_equal_orders_contradict_the_claim():
    draw = np.random.default_rng(0)
    found = compare_orders(*simulated_orders(draw, [1.0, 2.0, 3.0, 4.0], [0.9, 0.7, 0.5, 0.3]))
    assert (found.verdict, found.tau, found.reversed) == ("contradicted", 1.0, ())


def test_orders_of_equal_methods_are_left_open():
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(SIMULATIONS):
        methods = int(draw.integers(2, 8))
        verdict = compare_orders(*simulated_orders(draw, np.zeros(methods), np.zeros(methods))).verdict
        wrong += verdict != "undecided"
    assert wrong <= MOST


def test_clear_losses_and_equal_scores_are_seldom_called_reversed():
    """The hardest place for a reversal: one half of it is certain."""
    draw = np.random.default_rng(4)
    wrong = sum(
        compare_orders(*simulated_orders(draw, np.arange(5.0), np.zeros(5))).verdict != "undecided"
        for _ in range(SIMULATIONS)
    )
    assert wrong <= MOST


def test_orders_of_few_seeds_or_methods_are_left_open():
    two = {name: {0: i, 1: i + 0.1} for i, name in enumerate("abc")}
    assert compare_orders(two, two).verdict == "undecided"
    assert compare_orders({"a": {0: 1.0}}, {"a": {0: 1.0}}).verdict == "undecided"
    assert compare_orders({}, {}).verdict == "undecided"


def test_parts_make_a_whole():
    assert all_of(["reproduced", "contradicted", "undecided"]) == "contradicted"
    assert all_of(["reproduced", "reproduced"]) == "reproduced"
    assert all_of(["reproduced", "undecided"]) == "undecided"
    assert all_of([]) == "undecided"
