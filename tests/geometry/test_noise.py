import math

import numpy as np
import pytest
import torch

from hf_lowrank.geometry.noise import noise_scale


def quadratic_gradients(seed, batches, batch_size, mean, deviations):
    """Gradients of ½‖w − x‖² at w = 0, averaged over batches of examples x ~ N(−mean, diag(deviations²))."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batches, batch_size, len(mean), generator=generator, dtype=torch.float64) * deviations
    return (mean + noise.mean(1)).unbind()


def of(rows):
    return lambda: ([row[:3], row[3:].view(1, -1)] for row in rows)


MEAN = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0], dtype=torch.float64)
DEVIATIONS = torch.tensor([1.0, 3.0, 0.5, 2.0, 4.0], dtype=torch.float64)
TRUTH = float(DEVIATIONS.square().sum() / MEAN.square().sum())


def test_a_quadratic_with_known_covariance():
    rows = quadratic_gradients(0, 4000, 4, MEAN, DEVIATIONS)
    assert noise_scale(of(rows), 4).value == pytest.approx(TRUTH, rel=0.05)


def test_the_formula_by_numpy():
    rows = quadratic_gradients(1, 6, 2, MEAN, DEVIATIONS)
    g = np.stack([row.numpy() for row in rows])
    k, b = g.shape[0], 2
    # The unbiased covariance of batch gradients is Σ/b; ‖mean‖² overestimates ‖G‖² by its trace over k.
    trace = g.var(0, ddof=1).sum() * b
    signal = (g.mean(0) ** 2).sum() - g.var(0, ddof=1).sum() / k
    assert noise_scale(of(rows), b).value == pytest.approx(trace / signal, rel=1e-12)


def test_the_interval_covers():
    covered = sum(
        found.low <= TRUTH <= found.high
        for found in (noise_scale(of(quadratic_gradients(seed, 24, 16, MEAN, DEVIATIONS)), 16) for seed in range(100))
    )
    assert covered >= 88


def test_without_signal_there_is_no_value():
    rows = torch.tensor([[1.0, 0, 0, 0, 0], [-1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, -1, 0, 0, 0]]).double().unbind()
    assert math.isnan(noise_scale(of(rows), 1).value)


@pytest.mark.parametrize(("count", "size", "message"), [(2, 1, "at least 3 batches, got 2"), (4, 0, "batch_size")])
def test_bad_input(count, size, message):
    with pytest.raises(ValueError, match=message):
        noise_scale(of(torch.ones(count, 5).unbind()), size)
