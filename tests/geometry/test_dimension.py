import numpy as np
import pytest
import torch

from hf_lowrank.geometry.dimension import intrinsic_dimension, neighbour_ratios


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swiss_roll(n):
    t, height = 1.5 * np.pi * (1 + 2 * uniform(n, seed=1)), 21 * uniform(n, seed=2)
    return torch.stack([t * t.cos(), height, t * t.sin()], dim=1)


@pytest.mark.parametrize(
    ("points", "dimension"),
    [
        (uniform(3000, 2) @ normal(2, 50, seed=5), 2),  # a plane in 50 dimensions
        (normal(3000, 5) @ normal(5, 64, seed=5), 5),
        (torch.nn.functional.normalize(normal(3000, 4), dim=1), 3),  # a sphere
        (swiss_roll(3000), 2),
        (uniform(3000, 1).matmul(torch.ones(1, 7, dtype=torch.float64)), 1),
    ],
    ids=["plane", "gaussian", "sphere", "swiss roll", "line"],
)
def test_manifolds_of_known_dimension(points, dimension):
    found = intrinsic_dimension(points)
    assert found.value == pytest.approx(dimension, rel=0.1)
    assert found.low < found.value < found.high


def test_ratios_are_those_of_sorted_distances():
    x = normal(40, 6)
    distances = np.sqrt(((x.numpy()[:, None] - x.numpy()[None]) ** 2).sum(-1))
    np.fill_diagonal(distances, np.inf)
    distances.sort(axis=1)
    np.testing.assert_allclose(neighbour_ratios(x).numpy(), distances[:, 1] / distances[:, 0], rtol=1e-12)


def test_scale_rotation_and_duplicates_change_nothing():
    x = normal(500, 3) @ normal(3, 10, seed=3)
    found = intrinsic_dimension(x)
    turned = 7 * x @ torch.linalg.qr(normal(10, 10, seed=4)).Q
    assert intrinsic_dimension(turned).value == pytest.approx(found.value, rel=1e-6)
    assert intrinsic_dimension(torch.cat([x, x[:50]])).value == pytest.approx(found.value, rel=1e-12)


def test_the_interval_covers_the_dimension_of_a_flat_torus():
    covered = 0
    for seed in range(40):
        angles = 2 * np.pi * uniform(600, 2, seed=seed)  # uniform and without edges
        points = torch.cat([angles.cos(), angles.sin()], dim=1)
        found = intrinsic_dimension(points)
        covered += found.low <= 2 <= found.high
    assert covered >= 34


@pytest.mark.parametrize(
    ("points", "discard", "message"),
    [
        (normal(30), 0.1, "must be a matrix"),
        (normal(30, 2), 1.0, "discard"),
        (torch.full((30, 2), torch.nan), 0.1, "NaN or Inf"),
        (normal(5, 2).repeat(10, 1), 0.1, "at least 20 distinct points, got 5"),
    ],
)
def test_bad_input(points, discard, message):
    with pytest.raises(ValueError, match=message):
        intrinsic_dimension(points, discard=discard)
