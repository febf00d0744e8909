import numpy as np
import pytest
import torch
from torch import nn

from hf_lowrank.geometry.curves import Bezier, bezier_losses, train_bezier


class Point(nn.Module):
    """Two coordinates as a model."""

    def __init__(self, x, y):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))


def ring(model, step=0):
    """Loss of the unit circle: 0 on it, high in its middle and outside of it."""
    return (model.w.square().sum() - 1) ** 2


ENDS = torch.tensor([1.0, 0.0], dtype=torch.float64)


def test_a_curve_goes_round_the_hill_that_a_straight_line_crosses():
    model = Point(-0.9, 0.3)
    start = model.w.detach().clone()
    straight = train_bezier(model, {"w": ENDS}, ring, steps=0, lr=0.1, seed=0)
    bent = train_bezier(model, {"w": ENDS}, ring, steps=300, lr=0.05, seed=0)
    t = np.linspace(0, 1, 21)
    line, curve = (bezier_losses(model, found, ring, t).numpy() for found in (straight, bent))
    a, b = start.numpy(), ENDS.numpy()
    by_hand = [((((1 - s) * a + s * b) ** 2).sum() - 1) ** 2 for s in t]
    np.testing.assert_allclose(line, by_hand, atol=1e-12)
    middle = bent.middle["w"].numpy()
    by_hand = [((((1 - s) ** 2 * a + 2 * s * (1 - s) * middle + s * s * b) ** 2).sum() - 1) ** 2 for s in t]
    np.testing.assert_allclose(curve, by_hand, atol=1e-12)
    assert line.max() > 0.8
    assert curve.max() < 0.2 * line.max()
    assert torch.equal(model.w, start)
    assert model.w.grad is None


def test_end_points_are_exact_and_positions_are_drawn_from_the_seed():
    model = Point(-1.0, 0.1)
    found = [train_bezier(model, {"w": ENDS}, ring, steps=20, lr=0.05, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(found[0].middle["w"], found[1].middle["w"])
    assert not torch.equal(found[0].middle["w"], found[2].middle["w"])
    losses = bezier_losses(model, found[0], lambda m: float(m.w @ torch.tensor([1.0, 10.0]).double()), [0.0, 1.0])
    np.testing.assert_allclose(losses.numpy(), [-1.0 + 1.0, 1.0], atol=1e-15)


@pytest.mark.parametrize("memory", ["copy", "low"])
def test_losses_along_a_curve_of_layers(memory):
    generator = torch.Generator().manual_seed(0)
    x, shape = torch.randn(8, 3, generator=generator, dtype=torch.float64), (2, 3)
    model = nn.Linear(3, 2, bias=False).double()
    start = model.weight.detach().clone()
    middle, end = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    losses = bezier_losses(
        model, Bezier({"weight": middle}, {"weight": end}), lambda m: m(x).square().mean(), [0.0, 0.3, 1.0],
        memory=memory,
    )  # fmt: skip
    by_hand = [(1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t * t * end for t in (0.0, 0.3, 1.0)]
    expected = [float((x @ weight.T).square().mean()) for weight in by_hand]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12)
    assert torch.equal(model.weight, start)


def test_weights_come_back_after_a_loss_that_is_not_finite():
    model = Point(-1.0, 0.1).train()
    before = model.w.detach().clone()
    with pytest.raises(ValueError, match="loss is nan at step 0"):
        train_bezier(model, {"w": ENDS}, lambda m, step: m.w.sum() * torch.nan, steps=3, lr=0.1, seed=0)
    assert torch.equal(model.w, before)
    assert model.training


def test_other_parameters_are_refused():
    with pytest.raises(ValueError, match="w differs"):
        train_bezier(Point(0.0, 0.0), {"w": torch.zeros(3)}, ring, steps=1, lr=0.1, seed=0)
    with pytest.raises(ValueError, match="v differs"):
        train_bezier(Point(0.0, 0.0), {"w": ENDS, "v": ENDS}, ring, steps=1, lr=0.1, seed=0)
