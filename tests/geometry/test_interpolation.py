"""Paths between models: straight lines on quadratics, whose barrier is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_lowrank import geometry as g


def line(value, size=4):
    module = nn.Linear(size, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


@pytest.mark.parametrize("memory", ["copy", "low"])
def test_barrier_of_a_concave_parabola(memory):
    # L(w) = 1 − w² at w = −1 … 1: L(0) = 1 in the middle, 0 at the ends.
    def loss(model):
        if memory == "low":  # reads the weights through the layer, as they exist only there
            return 1 - float(model(torch.eye(4)).sub(model(torch.zeros(1, 4))).square().mean())
        return 1 - float(model.weight.square().mean())

    start, end = line(-1.0), line(1.0)
    grid = g.path_grid(3)
    losses = g.interpolation_curve(start, end, loss, positions=grid, memory=memory)
    torch.testing.assert_close(losses, 1 - (2 * grid - 1).square(), rtol=0, atol=1e-6)
    assert g.loss_barrier(losses) == pytest.approx(1, abs=1e-6)
    assert start.weight[0, 0].item() == -1


def test_barrier_and_imib_of_given_losses():
    positions = [0.0, 0.25, 0.5, 0.75, 1.0]
    straight = [2.0, 1.75, 1.5, 1.25, 1.0]
    assert g.loss_barrier(straight, positions) == 0
    assert g.imib(straight, positions) == pytest.approx(0.25)
    hill = [2.0, 1.5, 2.5, 1.0, 1.0]
    assert g.loss_barrier(hill, positions) == g.loss_barrier(hill) == pytest.approx(1.0)
    assert g.imib(hill) == pytest.approx(1.0)
    beyond = [9.0, 2.0, 1.5, 2.5, 1.0, 1.0, 9.0]  # outside of the path
    assert g.loss_barrier(beyond, [-0.25, *positions, 1.25]) == pytest.approx(1.0)
    assert g.imib(beyond, [-0.25, *positions, 1.25]) == pytest.approx(1.0)
    for bad in ([1.0, float("nan"), 1.0], [1.0, 2.0, float("inf")]):
        assert not math.isfinite(g.loss_barrier(bad))
    for function in (g.loss_barrier, g.imib):
        with pytest.raises(ValueError, match="between"):
            function([1.0, 1.0])


def chord_barrier(curve):
    """The barrier of a function on 100 001 points, by numpy."""
    t = np.linspace(0, 1, 100_001)
    y = curve(t)
    return float((y - ((1 - t) * y[0] + t * y[-1])).max())


def refined(curve, points):
    calls = []

    def losses_at(positions):
        calls.extend(positions)
        return torch.from_numpy(curve(np.asarray(positions)))

    positions, losses = g.refined_path(losses_at, g.path_grid(points))
    assert len(calls) == len(set(calls)) == len(positions) <= points + 6
    assert positions.tolist() == sorted(calls)
    np.testing.assert_array_equal(losses.numpy(), curve(positions.numpy()))
    return positions, losses


DESCENTS = {
    "exponential": lambda t: 7.6 - 3 * (1 - np.exp(-6 * t)),
    "line": lambda t: 5.0 - 2 * t,
    "root": lambda t: 4.0 - 1.5 * np.sqrt(t),
    "steep": lambda t: 2.0 / (1 + 40 * t),
}


@pytest.mark.parametrize("points", [9, 18])
@pytest.mark.parametrize("descent", DESCENTS.values(), ids=DESCENTS)
def test_a_descent_has_no_barrier_and_the_imib_of_its_grid(descent, points):
    for curve in (descent, lambda t: descent(1 - t)):
        positions, losses = refined(curve, points)
        assert g.loss_barrier(losses, positions) == pytest.approx(0, abs=1e-12)
        even = g.path_grid(points)
        highest = max(curve(np.array([1, points]) / (points + 1)))
        ends = curve(np.array([0.0, 1.0])).mean()
        assert g.imib(curve(even.numpy())) == pytest.approx(highest - ends, rel=1e-9)


HILLS = {
    "parabola": lambda t: 3.0 - t + 0.8 * 4 * t * (1 - t),
    "gaussian": lambda t: 3.0 - t + 0.5 * np.exp(-(((t - 0.633) / 0.12) ** 2) / 2),
    "near an end": lambda t: 2.0 + 0.3 * np.exp(-(((t - 0.06) / 0.08) ** 2) / 2),
    "skewed": lambda t: 4.0 + t**2 * (1 - t) * 6 - 1.3 * t,
    "sine": lambda t: np.sin(np.pi * t) + 0.2 * t,
}


@pytest.mark.parametrize("points", [9, 18, 19])
@pytest.mark.parametrize("hill", HILLS.values(), ids=HILLS)
def test_a_planted_hill_has_its_height(hill, points):
    positions, losses = refined(hill, points)
    assert g.loss_barrier(losses, positions) == pytest.approx(chord_barrier(hill), rel=0.01)


@pytest.mark.parametrize("place", [0.03, 0.97])
def test_a_hill_within_the_first_or_last_interval_is_not_missed(place):
    """As a descent may begin: no point of the grid is above the chord."""

    def hill(t):
        return 5.0 - t + 0.1 * np.exp(-(((t - place) / 0.02) ** 2) / 2)

    grid = g.path_grid(9)
    assert g.loss_barrier(hill(grid.numpy()), grid) == 0
    positions, losses = refined(hill, 9)
    assert 0.7 * chord_barrier(hill) < g.loss_barrier(losses, positions) <= chord_barrier(hill)


def test_a_loss_that_is_not_finite_ends_the_refinement():
    positions, losses = g.refined_path(lambda t: torch.tensor(t).log(), [0.0, 0.5, 1.0])
    assert positions.tolist() == [0.0, 0.5, 1.0]
    assert not math.isfinite(g.loss_barrier(losses, positions))


def test_known_ends_are_not_evaluated_again():
    seen = []

    def loss(model):
        seen.append(1)
        return float(model.weight.mean())

    losses = g.interpolation_curve(line(0.0), line(1.0), loss, positions=g.path_grid(1), ends=(5.0, 6.0))
    assert losses.tolist() == [5.0, 0.5, 6.0]
    assert len(seen) == 1


def test_extrapolation_range():
    grid = g.path_grid(3, -0.5, 1.25)
    assert grid.tolist() == pytest.approx([-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25])
    losses = g.interpolation_curve(line(0.0), line(1.0), lambda m: float(m.weight.mean()), positions=grid)
    torch.testing.assert_close(losses, grid, rtol=0, atol=1e-6)


def test_other_names_in_a_mapping_are_refused():
    end = {**dict(line(1.0).named_parameters()), "scale": torch.ones(1), "lm_head.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"missing in the first: scale, lm_head\.weight$"):
        g.interpolation_curve(line(0.0), end, lambda m: 0.0, positions=g.path_grid(1))
    many = {**dict(line(1.0).named_parameters()), **{f"x{i}": torch.ones(1) for i in range(6)}}
    with pytest.raises(ValueError, match="x0, x1, x2, x3 and 2 more"):
        g.interpolation_curve(line(0.0), many, lambda m: 0.0, positions=g.path_grid(1))


def test_different_models_are_refused_by_name():
    with pytest.raises(ValueError, match="weight"):
        g.interpolation_curve(line(0.0), line(0.0, size=5), lambda m: 0.0, positions=g.path_grid(1))
