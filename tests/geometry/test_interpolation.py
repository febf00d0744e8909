"""Paths between models: straight lines on quadratics, whose barrier is known."""

from __future__ import annotations

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


def test_barrier_against_both_references():
    positions = [0.0, 0.25, 0.5, 0.75, 1.0]
    losses = [2.0, 1.75, 1.5, 1.25, 1.0]
    assert g.loss_barrier(losses, positions) == pytest.approx(0.25)
    assert g.loss_barrier(losses, positions, reference="interpolated") == pytest.approx(0)
    with pytest.raises(ValueError, match="between"):
        g.loss_barrier([1.0, 1.0])


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


def test_different_models_are_refused_by_name():
    with pytest.raises(ValueError, match="weight"):
        g.interpolation_curve(line(0.0), line(0.0, size=5), lambda m: 0.0, positions=g.path_grid(1))
