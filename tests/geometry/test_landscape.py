"""Loss curves on quadratic models, whose sharpness and variance are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_lowrank import geometry as g
from hf_lowrank.geometry.directions import row_blocks
from hf_lowrank.geometry.landscape import interval_of_draws, jackknife_interval
from hf_lowrank.geometry.sharding import local_shard
from hf_lowrank.statistics import student_t_p_value, student_t_quantile


class Parameters(nn.Module):
    """A model that is only its parameters."""

    def __init__(self, *shapes, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.values = nn.ParameterList(nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)


class Quadratic:
    """½ (θ − θ*)ᵀ H (θ − θ*) + c with diagonal H, around the minimum θ*."""

    def __init__(self, model, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.minimum = [p.detach().clone().double() for p in model.parameters()]
        self.hessian = [torch.rand(p.shape, generator=generator).double() for p in model.parameters()]
        self.trace = sum(float(h.sum()) for h in self.hessian)
        self.trace_of_square = sum(float(h.square().sum()) for h in self.hessian)

    def __call__(self, model):
        terms = zip(model.parameters(), self.minimum, self.hessian, strict=True)
        return 2.0 + 0.5 * sum(float((h * (p.double() - m).square()).sum()) for p, m, h in terms)


GRID = g.symmetric_grid(0.1, 2)


def test_sharpness_of_a_quadratic_lies_in_its_interval_in_at_least_ninety_of_a_hundred():
    model = Parameters((7, 5), (9,))
    loss = Quadratic(model)
    squares = GRID[GRID > 0].square().mean()
    truth = float(0.5 * squares * loss.trace)
    covered = 0
    for seed in range(100):
        estimate = g.random_sharpness(g.random_curve(model, loss, offsets=GRID, draws=8, seed=seed))
        covered += estimate.low <= truth <= estimate.high
        assert estimate.value == pytest.approx(truth, rel=0.6)
    assert covered >= 90


def test_variance_of_a_quadratic_lies_in_its_interval():
    model = Parameters((12, 10), (9,))
    loss = Quadratic(model)
    # Var(½ t² Σ h d²) = ½ t⁴ Σ h²
    truth = float((0.5 * GRID**4 * loss.trace_of_square).mean())
    covered = 0
    for seed in range(40):
        estimate = g.random_variance(g.random_curve(model, loss, offsets=GRID, draws=12, seed=seed))
        covered += estimate.low <= truth <= estimate.high
    assert covered >= 34


def test_each_draw_is_its_own():
    model = Parameters((7, 5), (9,))
    loss = Quadratic(model)
    few = g.random_curve(model, loss, offsets=GRID, draws=2, seed=3)
    many = g.random_curve(model, loss, offsets=GRID, draws=5, seed=3)
    assert torch.equal(few.losses, many.losses[:2])
    assert few.center == 2.0
    assert not torch.equal(many.losses[0], many.losses[1])


@pytest.mark.parametrize("memory", ["copy", "low"])
@pytest.mark.parametrize("interruption", [None, RuntimeError, KeyboardInterrupt])
def test_weights_come_back_bit_equal(memory, interruption):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 11)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calls = 0

    def loss(module):
        nonlocal calls
        calls += 1
        value = float(module(torch.arange(11)).square().mean())
        if interruption and calls == 3:
            raise interruption("now")
        return value

    def sweep():
        return g.random_curve(model, loss, offsets=GRID, draws=2, memory=memory)

    if interruption:
        with pytest.raises(interruption):
            sweep()
    else:
        assert len(set(sweep().losses.flatten().tolist())) == 9
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "forward" not in model[1].__dict__


def test_interrupted_inside_a_layer_in_low_memory_mode():
    class Failing(nn.LayerNorm):
        def forward(self, x):
            raise KeyboardInterrupt

    model = Failing(4)
    before = model.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        g.random_curve(
            model, lambda m: float(m(torch.ones(2, 4)).sum()), offsets=GRID, draws=1, memory="low", center=0.0
        )
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("normalize", ["none", "tensor", "filter"])
def test_low_memory_gives_the_same_numbers(normalize):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(700, 600), nn.Linear(600, 50), nn.LayerNorm(50), nn.Linear(50, 7, bias=False))
    ids = torch.tensor([0, 3, 699, 3, 500])
    curves = [
        g.random_curve(
            model,
            lambda m: float(m(ids).square().mean()),
            offsets=GRID,
            draws=2,
            normalize=normalize,
            memory=memory,
        ).losses
        for memory in ("copy", "low")
    ]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-6, atol=0)


def test_low_memory_refuses_what_it_would_miss():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.factors = nn.ParameterDict({"a": nn.Parameter(torch.ones(3))})
            self.around = True

        def forward(self, x):
            return nn.functional.linear(x * self.factors["a"], self.inner.weight) if self.around else self.inner(x)

    model = Scaled()

    def curve(memory):
        return g.random_curve(
            model, lambda m: float(m(torch.ones(1, 3)).sum()), offsets=GRID, draws=1, memory=memory
        ).losses

    with pytest.raises(ValueError, match="inner did not"):
        curve("low")
    curve("copy")
    Scaled.forward = lambda self, x: self.inner(x * self.factors["a"])
    torch.testing.assert_close(curve("low"), curve("copy"))
    assert not model.inner.__dict__.get("forward")


def test_normalised_directions_have_the_norms_of_the_weights():
    weight = torch.randn(900, 400, generator=torch.Generator().manual_seed(0)) * torch.rand(900, 1)
    for normalize in ("tensor", "filter"):
        direction = g.Gaussian(0, 0, normalize)
        whole = torch.cat([direction.block("w", local_shard(weight), *rows) for rows in row_blocks(*weight.shape)])
        assert float(whole.norm()) == pytest.approx(float(weight.norm()), rel=1e-5)
        if normalize == "filter":
            torch.testing.assert_close(whole.norm(dim=1), weight.norm(dim=1))
        assert direction.block("norm", local_shard(weight[0]), 0, 1) is None


def test_pca_directions_of_known_weights():
    u, _ = torch.linalg.qr(torch.randn(8, 2, generator=torch.Generator().manual_seed(1)))
    v, _ = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(2)))
    model = Parameters((8, 6), (5,))
    with torch.no_grad():
        model.values[0].copy_(3 * torch.outer(u[:, 0], v[:, 0]) + torch.outer(u[:, 1], v[:, 1]))
    before = [p.detach().clone() for p in model.parameters()]
    first, second = g.weight_pca_directions(model, 2)
    for direction, k in ((first, 0), (second, 1)):
        block = direction.block("values.0", local_shard(model.values[0].detach()), 0, 8)
        assert float((block * torch.outer(u[:, k], v[:, k])).sum().abs()) == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(direction.block("values.1", local_shard(before[1]), 0, 1)[0], before[1])
    # ½‖θ − θ*‖² along a unit matrix direction plus the vector itself: ½ t² (1 + ‖w‖²)
    loss = Quadratic(model)
    loss.hessian = [torch.ones_like(h) for h in loss.hessian]
    curve = g.pca_curve(model, loss, offsets=g.symmetric_grid(0.2, 1), count=2)
    expected = 0.5 * 0.04 * (1 + float(before[1].square().sum()))
    assert g.expected_sharpness(curve.losses) == pytest.approx(expected, rel=1e-5)


def test_trajectory_pca_finds_the_line_that_was_walked():
    generator = torch.Generator().manual_seed(0)
    start, step = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    states = [{"w": start + t * step} for t in (0.0, 1.0, 2.5, 3.0)]
    directions, shares = g.trajectory_pca_directions(states, ["w"], 2)
    block = directions[0].block("w", local_shard(start), 0, 6)
    assert float((block * step).sum().abs() / step.norm()) == pytest.approx(1, rel=1e-5)
    assert float(shares[0]) == pytest.approx(1, rel=1e-6)


def test_grids_are_symmetric_to_the_bit():
    grid = g.symmetric_grid(0.003, 12)
    assert grid.numel() == 25
    assert torch.equal(grid, -grid.flip(0))
    assert grid[12] == 0
    with pytest.raises(ValueError, match="radius"):
        g.symmetric_grid(0, 3)
    with pytest.raises(ValueError, match="symmetric"):
        g.random_curve(Parameters((2,)), lambda m: 0.0, offsets=[-1.0, 0.0, 2.0], draws=1)


def test_a_plane_holds_the_lines():
    model = Parameters((7, 5))
    loss = Quadratic(model)
    first, second = g.Gaussian(0, 0), g.Gaussian(0, 1)
    square = g.plane(model, loss, first, second, x_offsets=GRID, y_offsets=[0.0, 0.1])
    line = g.line_curve(model, loss, [first], GRID).losses[0]
    torch.testing.assert_close(square[0], line, rtol=1e-12, atol=0)


def test_lower_precision_is_refused():
    with pytest.raises(ValueError, match="float32"):
        g.random_curve(Parameters((2, 2)).bfloat16(), lambda m: 0.0, offsets=GRID, draws=1)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="nan"):
        g.random_curve(Parameters((2, 2)), lambda m: math.nan, offsets=GRID, draws=1)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (2, 4.30265), (7, 2.36462), (30, 2.04227)])
def test_student_quantiles_are_those_of_the_tables(degrees, quantile):
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, rel=1e-5)
    assert student_t_p_value(quantile, degrees) == pytest.approx(0.05, abs=1e-6)
    assert student_t_p_value(-quantile, degrees) == pytest.approx(0.05, abs=1e-6)


def test_intervals_of_few_draws():
    assert interval_of_draws([3.0]).value == 3.0
    assert math.isnan(interval_of_draws([3.0]).low)
    value, low, high, draws = interval_of_draws([1.0, 2.0, 3.0])
    assert (value, draws) == (2.0, 3)
    assert high - value == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert math.isnan(jackknife_interval(lambda x: float(x.var()), torch.ones(5)).low)
    assert low < value
