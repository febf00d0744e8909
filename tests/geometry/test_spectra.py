"""Spectral quantities against numpy's float64 SVD, closed forms and planted spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_lowrank import geometry as g
from hf_lowrank.geometry.spectra import difference_factors, many_singular_values, singular_vectors


def numpy_metrics(matrix):
    sigma = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    p = sigma / sigma.sum()
    p = p[p > 0]
    return {
        "effective": math.exp(-(p * np.log(p)).sum()),
        "stable": (sigma**2).sum() / sigma[0] ** 2,
        "gap": (sigma[0] - sigma[1]) / sigma[0],
        "fraction": (sigma > 0.1).mean(),
        "norm": np.linalg.norm(matrix),
    }


def our_metrics(sigma):
    return {
        "effective": g.effective_rank(sigma),
        "stable": g.stable_rank(sigma),
        "gap": g.spectral_gap(sigma),
        "fraction": g.singular_value_fraction(sigma),
        "norm": float(sigma.square().sum().sqrt()),
    }


@pytest.mark.parametrize("shape", [(40, 40), (70, 30), (30, 70), (64, 1), (3, 50)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_metrics_agree_with_numpy_in_float64(shape, decay):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator) * torch.arange(1, shape[1] + 1.0) ** -decay * 0.3
    if min(shape) == 1:
        assert g.stable_rank(g.singular_values(matrix)) == pytest.approx(1)
        assert math.isnan(g.spectral_gap(g.singular_values(matrix)))
        return
    expected, got = numpy_metrics(matrix.numpy()), our_metrics(g.singular_values(matrix))
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def test_a_small_gap_keeps_its_digits():
    q, _ = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    sigma = torch.linspace(1, 0.01, 48, dtype=torch.float64)
    sigma[1] = 1 - 1e-5
    matrix = (q * sigma @ q.mT).float()
    assert g.spectral_gap(g.singular_values(matrix)) == pytest.approx(numpy_metrics(matrix.numpy())["gap"], rel=1e-5)


def test_planted_spectrum_comes_back():
    generator = torch.Generator().manual_seed(3)
    u, _ = torch.linalg.qr(torch.randn(60, 20, dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(40, 20, dtype=torch.float64, generator=generator))
    sigma = torch.linspace(2, 0.05, 20, dtype=torch.float64)
    got = g.singular_values(u * sigma @ v.mT)
    torch.testing.assert_close(got[:20], sigma, rtol=1e-10, atol=0)
    assert float(got[20:].max()) < 1e-7
    assert g.numerical_rank(got, (60, 40)) == 20


def test_rank_one_and_orthogonal_matrices():
    rank_one = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 6))
    sigma = g.singular_values(rank_one)
    assert g.effective_rank(sigma) == pytest.approx(1, abs=1e-6)
    assert g.stable_rank(sigma) == pytest.approx(1, abs=1e-9)
    assert g.spectral_gap(sigma) == pytest.approx(1, abs=1e-6)
    orthogonal, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    sigma = g.singular_values(orthogonal)
    assert g.effective_rank(sigma) == pytest.approx(16, rel=1e-6)
    assert g.stable_rank(sigma) == pytest.approx(16, rel=1e-5)


def test_zero_matrix_has_no_ranks():
    sigma = g.singular_values(torch.zeros(4, 3))
    assert math.isnan(g.effective_rank(sigma))
    assert math.isnan(g.stable_rank(sigma))
    assert math.isnan(g.spectral_gap(sigma))
    assert math.isnan(g.relative_norm(sigma, sigma))
    assert g.singular_value_fraction(sigma) == 0


def test_matrix_with_nan_is_refused():
    with pytest.raises(ValueError, match="finite"):
        g.singular_values(torch.tensor([[1.0, math.nan]]))


@pytest.mark.parametrize("shapes", [((50, 4), (4, 30)), ((20, 8), (8, 90)), ((6, 9), (9, 5))])
def test_products_and_their_differences_from_factors(shapes):
    generator = torch.Generator().manual_seed(4)
    b, a, b2, a2 = (torch.randn(shape, generator=generator) for shape in (*shapes, *shapes))
    expected = np.linalg.svd((0.5 * b.double() @ a.double()).numpy(), compute_uv=False)
    np.testing.assert_allclose(g.product_singular_values(b, a, 0.5).numpy(), expected, atol=1e-12 * expected[0])
    delta = (0.5 * b.double() @ a.double() - 0.25 * b2.double() @ a2.double()).numpy()
    got = g.product_singular_values(*difference_factors((b, a, 0.5), (b2, a2, 0.25)))
    expected = np.linalg.svd(delta, compute_uv=False)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12 * expected[0])


def test_vectors_and_values_from_one_decomposition():
    for shape in ((30, 12), (12, 30)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        sigma, u, v = singular_vectors(matrix, 3)
        torch.testing.assert_close(sigma, g.singular_values(matrix), rtol=1e-9, atol=0)
        torch.testing.assert_close(matrix.double() @ v, u * sigma[:3], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(u.mT @ u, torch.eye(3).double(), rtol=0, atol=1e-10)
        again = singular_vectors(matrix.clone(), 3)
        assert torch.equal(again[1], u)


def test_many_matrices_in_order():
    generator = torch.Generator().manual_seed(6)
    matrices = [torch.randn(shape, generator=generator) for shape in ((8, 5), (6, 6), (8, 5), (4, 9))]
    for got, matrix in zip(many_singular_values(matrices, workers=2), matrices, strict=True):
        torch.testing.assert_close(got, g.singular_values(matrix), rtol=0, atol=1e-12)


def test_overlap_and_angles():
    generator = torch.Generator().manual_seed(7)
    basis, _ = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64, generator=generator))
    u, same, other = basis[:, :3], basis[:, [2, 0, 1]], basis[:, 3:]
    assert g.subspace_overlap(u, same) == pytest.approx(1)
    assert g.subspace_overlap(u, other) == pytest.approx(0, abs=1e-20)
    tilt = 1e-7
    tilted = torch.stack([u[:, 0] * math.cos(tilt) + other[:, 0] * math.sin(tilt), u[:, 1], u[:, 2]], 1)
    assert float(g.principal_angles(u, tilted)[-1]) == pytest.approx(tilt, rel=1e-6)
    assert float(g.principal_angles(u, other)[0]) == pytest.approx(math.pi / 2)


def test_tail_exponent_of_a_power_law():
    # Quantiles of a Pareto law of eigenvalues with density exponent 2.5.
    quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    eigenvalues = (1 - quantiles) ** (-1 / 1.5)
    assert g.tail_exponent(eigenvalues.sqrt()) == pytest.approx(2.5, rel=0.02)
    assert math.isnan(g.tail_exponent(torch.ones(3)))
