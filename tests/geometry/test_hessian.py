"""Curvature on quadratics with a known Hessian and on a small network against autograd's full one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import geometry as g


class Vector(nn.Module):
    def __init__(self, size=30):
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def hessian():
    q, _ = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(1)))
    return q * torch.linspace(-2, 5, 30) @ q.mT


def terms_of(hessian):
    def terms(model):
        for share in (0.25, 0.75):
            yield share * 0.5 * model.w @ hessian @ model.w

    return terms


def test_top_eigenvalue_and_trace_of_a_quadratic(hessian):
    model = Vector()
    top, error = g.hessian_top_eigenvalue(model, terms_of(hessian), iterations=30)
    assert top == pytest.approx(5, rel=1e-3)
    assert error < 0.01
    covered = 0
    for seed in range(20):
        estimate = g.hessian_trace(model, terms_of(hessian), probes=12, seed=seed)
        covered += estimate.low <= float(hessian.trace()) <= estimate.high
    assert covered >= 17


def test_gradient_and_critical_sharpness_of_a_quadratic(hessian):
    model = Vector()
    hessian = hessian @ hessian
    slope = g.gradient(model, terms_of(hessian))
    torch.testing.assert_close(slope["w"], hessian @ model.w.detach())
    direction = slope["w"].double()
    expected = float(direction @ hessian.double() @ direction / (direction @ direction))

    def loss(m):
        return float(0.5 * m.w.double() @ hessian.double() @ m.w.double())

    calls = []
    got = g.critical_sharpness(model, loss, slope, tolerance=0.01, progress=lambda: calls.append(1))
    assert got == pytest.approx(expected, rel=0.01)
    assert len(calls) < 25
    uphill = {"w": -slope["w"]}
    with pytest.raises(ValueError, match="no critical step"):
        g.critical_sharpness(model, loss, uphill)


def test_a_transformer_against_the_full_hessian():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, vocab_size=6)
    model = LlamaForCausalLM(config).eval()
    loss = g.TokenLoss(torch.randint(0, 6, (4, 5), generator=torch.Generator().manual_seed(0)), batch_tokens=10)
    names = [name for name, _ in model.named_parameters()]

    def of_flat(flat):
        parts = flat.split([p.numel() for p in model.parameters()])
        state = {n: part.view(p.shape) for n, part, p in zip(names, parts, model.parameters(), strict=True)}
        logits = torch.func.functional_call(model, state, kwargs={"input_ids": loss.input_ids}).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), loss.input_ids[:, 1:].flatten())

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        full = torch.autograd.functional.hessian(of_flat, flat)
    top, _ = g.hessian_top_eigenvalue(model, loss.terms, iterations=60, tolerance=1e-5)
    assert top == pytest.approx(float(torch.linalg.eigvalsh(full)[-1]), rel=1e-3)
    vector = torch.randn(flat.shape, generator=torch.Generator().manual_seed(2))
    sizes = [p.numel() for p in model.parameters()]
    parts = [v.view(p.shape) for v, p in zip(vector.split(sizes), model.parameters(), strict=True)]
    product = torch.cat([v.flatten() for v in g.hessian_vector_product(model, loss.terms, parts)])
    torch.testing.assert_close(product, full @ vector, rtol=1e-3, atol=1e-5)


def test_nothing_to_differentiate_is_an_error(hessian):
    with pytest.raises(ValueError, match="requires a gradient"):
        g.hessian_trace(Vector().requires_grad_(False), terms_of(hessian))
