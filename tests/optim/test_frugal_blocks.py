"""FRUGAL over whole blocks, against its definition written out in float64 numpy."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from hf_lowrank.optim import FrugalAdamW

COUNT, SIZE, RANK, GAP = 6, 8, 4, 3


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(SIZE, SIZE).to(dtype)) for _ in range(COUNT)]


def make(params, **options):
    named = [(f"w{i}", param) for i, param in enumerate(params)]
    return FrugalAdamW(
        [{"params": named}], lr=1e-2, rank=RANK, update_proj_gap=GAP, subspace="blocks", weight_decay=0.1, **options
    )


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def active(optimizer, params):
    return [i for i, param in enumerate(params) if "exp_avg" in optimizer.state[param]]


@pytest.mark.parametrize("rule", ["sign", "sgd"])
def test_against_the_definition(rule):
    params = parameters()
    optimizer = make(params, state_free_rule=rule, state_free_lr_ratio=0.5)
    weights = [param.detach().double().numpy().copy() for param in params]
    moments = {}
    for step in range(3 * GAP):
        set_gradients(params, step)
        optimizer.step()
        if step % GAP == 0:
            moments = {i: [np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE)), 0] for i in active(optimizer, params)}
            assert len(moments) == COUNT * RANK // SIZE
        for i, param in enumerate(params):
            grad = param.grad.double().numpy()
            if i in moments:
                first, second, age = moments[i]
                first, second, age = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2, age + 1
                moments[i] = [first, second, age]
                rate = 1e-2 * np.sqrt(1 - 0.999**age) / (1 - 0.9**age)
                weights[i] -= rate * first / (np.sqrt(second) + 1e-6)
            else:
                weights[i] -= 1e-2 * 0.5 * (np.sign(grad) if rule == "sign" else grad)
            weights[i] *= 1 - 1e-2 * 0.1
    for param, weight in zip(params, weights, strict=True):
        np.testing.assert_allclose(param.detach().double().numpy(), weight, rtol=1e-5, atol=1e-6)


def test_the_blocks_change_at_a_refresh_and_hold_only_their_moments():
    params = parameters()
    optimizer = make(params)
    chosen = []
    for step in range(8 * GAP):
        set_gradients(params, step)
        optimizer.step()
        chosen.append(tuple(active(optimizer, params)))
    assert all(len(set(chosen[start : start + GAP])) == 1 for start in range(0, len(chosen), GAP))
    assert len(set(chosen)) > 2
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert sum(tensor.numel() for tensor in tensors) == 2 * SIZE * SIZE * COUNT * RANK // SIZE


@pytest.mark.parametrize("options", [{}, {"state_dtype": "float32"}, {"stochastic_rounding": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(options, dtype):
    if options and dtype == torch.float32:
        options = {}
    straight, stopped = parameters(dtype), parameters(dtype)
    whole, first = make(straight, **options), make(stopped, **options)
    for step in range(4):
        set_gradients(stopped, step)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again = make(stopped, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    for step in range(9):
        set_gradients(straight, step)
        whole.step()
        if step >= 4:
            set_gradients(stopped, step)
            again.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


def test_a_gradient_that_is_not_finite_is_skipped():
    params = parameters()
    optimizer = make(params)
    before = params[0].detach().clone()
    set_gradients(params, 0)
    params[0].grad[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="w0"):
        optimizer.step()
    assert torch.equal(params[0], before)
