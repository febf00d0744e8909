"""Parameters, gradients and state in other memory layouts than those of new tensors."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_lowrank.errors import UserError
from hf_lowrank.optim import GaLoreAdamW
from hf_lowrank.optim.adam import adamw_
from tests.optim.test_conformance import METHOD_CASES, make, net


def rows_of(matrix):
    return matrix[:2], matrix[2:]


def columns_of(matrix):
    return matrix[:, :2], matrix[:, 2:]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slice_of", [rows_of, columns_of])
def test_stepping_a_slice_of_a_matrix_equals_torch_and_changes_nothing_else(slice_of, transposed):
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        whole = torch.randn(6, 6).mT if transposed else torch.randn(6, 6)
        inside, outside = slice_of(whole)
        factor, target, before = nn.Parameter(inside), nn.Parameter(torch.randn(4, 4)), outside.clone()
        groups = [{"params": [target], "rank": 2}, {"params": [factor], "rank": None}]
        optimizer = (
            GaLoreAdamW(groups, lr=0.1, adam_variant="torch", eps=1e-8)
            if ours
            else torch.optim.AdamW([factor], lr=0.1, weight_decay=0.0)
        )
        x = torch.randn(5, factor.shape[0])
        for _ in range(5):
            factor.grad = target.grad = None
            ((x @ factor).square().sum() + target.square().sum()).backward()
            optimizer.step()
        assert torch.equal(outside, before)
        found.append(factor.detach().clone())
    assert torch.allclose(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", range(4))
def test_any_of_the_four_tensors_may_have_other_strides(transposed, dtype):
    torch.manual_seed(0)
    # Squares near the limit of 16 bits: rounding of intermediates would show.
    plain = [(torch.randn(4, 6).abs() * 1e-3).to(dtype) for _ in range(4)]
    other = [each.clone() for each in plain]
    other[transposed] = other[transposed].mT.contiguous().mT
    for weight, grad, mean, square in (plain, other):
        adamw_(
            [weight], [grad], [mean], [square],
            age=3, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, variant="official",
        )  # fmt: skip
    for one, same in zip(plain, other, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, same)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_age_does_not_depend_on_the_default_type(default):
    found = []
    for kind in (torch.float32, default):
        torch.manual_seed(0)
        four = [torch.randn(4, 6, dtype=torch.float32).abs() for _ in range(4)]
        torch.set_default_dtype(kind)
        try:
            adamw_(
                *([each] for each in four),
                age=257, lr=0.1, betas=(0.9, 0.99999), eps=1e-6, weight_decay=0.0, variant="torch",
            )  # fmt: skip
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(four[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("rank", [2, None])
def test_state_of_another_shape_is_refused_by_name_and_changes_nothing(rank):
    def made(rows):
        other = nn.Parameter(torch.randn(8, 8))
        matrix = nn.Parameter(torch.randn(rows, 6))
        params = [{"params": [("other", other)], "rank": 2}, {"params": [("matrix", matrix)], "rank": rank}]
        return [other, matrix], GaLoreAdamW(params)

    def stepped(rows):
        params, optimizer = made(rows)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return params, optimizer

    params, optimizer = stepped(4000)
    twin_params, twin = copy.deepcopy((params, optimizer))
    with pytest.raises(UserError, match=r"exp_avg of matrix must have shape \(4000, .*got \(10, "):
        optimizer.load_state_dict(stepped(10)[1].state_dict())
    for param, same in zip(params, twin_params, strict=True):
        param.grad, same.grad = torch.ones_like(param), torch.ones_like(param)
    optimizer.step()
    twin.step()
    for param, same in zip(params, twin_params, strict=True):
        assert torch.equal(param, same)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("name", METHOD_CASES)
def test_a_copy_of_model_and_optimizer_continues_identically(name, again):
    model = net()
    optimizer = make(name, model)

    def step(model, optimizer, number):
        model.zero_grad()
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(number))
        model(x).square().sum().backward()
        optimizer.step()

    for number in range(4):
        step(model, optimizer, number)
    other_model, other = again((model, optimizer))
    for number in range(4, 8):
        step(model, optimizer, number)
        step(other_model, other, number)
    for one, same in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(one, same)


def stepped(weight, grad):
    kernel = nn.Parameter(weight)
    optimizer = GaLoreAdamW([{"params": [("kernel", kernel)], "rank": 2}], lr=0.1)
    kernel.grad = grad
    optimizer.step()
    return kernel, optimizer


def test_a_kernels_gradient_may_be_in_another_memory_format():
    torch.manual_seed(0)
    weight, grad = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    for form in (torch.contiguous_format, torch.channels_last):
        other = torch.channels_last if form is torch.contiguous_format else torch.contiguous_format
        alike, _ = stepped(weight.clone().to(memory_format=form), grad.to(memory_format=form))
        mixed, _ = stepped(weight.clone().to(memory_format=form), grad.to(memory_format=other))
        assert torch.allclose(alike, mixed, rtol=1e-5, atol=1e-6)


def test_a_kernel_whose_memory_format_changes_later_is_named():
    kernel, optimizer = stepped(torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3))
    kernel.data = kernel.data.to(memory_format=torch.channels_last)
    before = kernel.detach().clone()
    with pytest.raises(UserError, match="kernel is in another memory format"):
        optimizer.step()
    assert torch.equal(kernel, before)
