"""Similarity of activations: invariances of CKA, an independent debiased estimator, streaming."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import geometry as g
from hf_lowrank.geometry.activations import CkaSums


@pytest.fixture
def x():
    return torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3


def rotation(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))[0]


def unbiased_hsic(k, other):
    """HSIC₁ of Song et al. 2012 from the N × N Gram matrices."""
    n = k.shape[0]
    k, other = k - np.diag(np.diag(k)), other - np.diag(np.diag(other))
    one = np.ones(n)
    first = np.trace(k @ other)
    second = (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (one @ k @ other @ one)
    return (first + second - third) / (n * (n - 3))


def test_cka_sees_neither_rotation_nor_scale_nor_shift(x):
    turned = 2.5 * x @ rotation(8) + 7
    assert g.linear_cka(x, turned) == pytest.approx(1, abs=1e-12)
    assert g.linear_cka(x, turned, debiased=True) == pytest.approx(1, abs=1e-9)
    cosine = torch.cosine_similarity(x, turned, dim=1).mean()
    assert abs(float(cosine) - 1) > 0.01


def test_cka_against_gram_matrices(x):
    y = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + x[:, :5]
    center = np.eye(60) - 1 / 60
    k, m = (center @ (side @ side.T).numpy() @ center for side in (x, y))
    expected = (k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum())
    assert g.linear_cka(x, y) == pytest.approx(expected, rel=1e-10)


def test_debiased_cka_against_unbiased_hsic(x):
    y = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5 * x[:, :5]
    k, m = ((side @ side.T).numpy() for side in (x, y))
    expected = unbiased_hsic(k, m) / math.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m))
    assert g.linear_cka(x, y, debiased=True) == pytest.approx(expected, rel=1e-8)


def test_debiased_cka_of_independent_features_is_near_zero():
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(100, 200, generator=generator) for _ in range(2))
    assert g.linear_cka(x, y) > 0.5
    assert abs(g.linear_cka(x, y, debiased=True)) < 0.05


def test_portions_make_no_difference(x):
    y = x.square()
    whole, parts = CkaSums(), CkaSums()
    whole.update(x, y)
    for rows in (slice(0, 1), slice(1, 40), slice(40, 60)):
        parts.update(x[rows], y[rows])
    for debiased in (False, True):
        assert parts.value(debiased=debiased) == pytest.approx(whole.value(debiased=debiased), rel=1e-10)


def test_constant_or_short_input_is_an_error(x):
    with pytest.raises(ValueError, match="second side is constant"):
        g.linear_cka(x, torch.full((60, 3), 0.1))
    with pytest.raises(ValueError, match="rows"):
        g.linear_cka(x[:3], x[:3], debiased=True)
    with pytest.raises(ValueError, match="the same number of rows"):
        g.linear_cka(x, x[:4])


def model(seed, **changes):
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 50,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()


def batches(size):
    ids = torch.randint(0, 50, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[4, 5:] = 0
    return [(ids[i : i + size], mask[i : i + size]) for i in range(0, 6, size)]


def test_layers_of_two_models_against_direct_computation():
    ours, base = model(0), model(1)
    got = g.activation_similarity(ours, base, batches(6))
    again = g.activation_similarity(ours, base, batches(2))
    ((ids, mask),) = batches(6)
    with torch.no_grad():
        states = [m(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states for m in (ours, base)]
    assert len(got) == 3
    for index, layer in enumerate(got):
        x, y = (side[index][mask == 1] for side in states)
        assert layer.l2 == pytest.approx(float(((x - y).norm(dim=1) / y.norm(dim=1).mean()).mean()), rel=1e-5)
        assert layer.cosine == pytest.approx(float(torch.cosine_similarity(x, y, dim=1).mean()), abs=1e-6)
        assert layer.cka == pytest.approx(g.linear_cka(x, y), rel=1e-5)
        assert layer.cka_debiased == pytest.approx(g.linear_cka(x, y, debiased=True), rel=1e-4, abs=1e-4)
        assert again[index].cka == pytest.approx(layer.cka, rel=1e-5)


def test_a_model_against_itself():
    same = model(0)
    for layer in g.activation_similarity(same, same, batches(3)):
        assert layer.l2 == 0
        assert layer.cosine == pytest.approx(1, abs=1e-6)
        assert layer.cka == pytest.approx(1)


def test_different_depths_and_widths_are_errors():
    with pytest.raises(ValueError, match="layers"):
        g.activation_similarity(model(0), model(0, num_hidden_layers=1), batches(6))
    with pytest.raises(ValueError, match="one size"):
        g.activation_similarity(model(0), model(0, hidden_size=32), batches(6))
