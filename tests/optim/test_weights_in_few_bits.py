"""Stochastic rounding, and moments in eight bits."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torchao.optim.quant_utils import create_dynamic_map, dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

from hf_lowrank.errors import UserError
from hf_lowrank.optim import ApolloAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW
from hf_lowrank.optim.state import dequantize, quantize, round_stochastically_


def test_rounding_has_the_right_mean_and_only_neighbours():
    values = torch.tensor([1.0, 1.001, -1.003, 3.1415926, 1e-20, -0.0]).repeat(20_000, 1)
    target = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastically_(target, values, torch.Generator().manual_seed(0))
    mean = target.double().mean(0)
    spacing = values[0].abs().double() * 2**-7 + 1e-30
    assert ((mean - values[0].double()).abs() < 0.02 * spacing).all()
    assert ((target.double() - values.double()).abs() <= spacing).all()
    assert torch.equal(target[:, 0], torch.ones(20_000, dtype=torch.bfloat16))


@pytest.mark.parametrize("optimizer_class", [GaLoreAdamW, FiraAdamW, ApolloAdamW, FrugalAdamW])
def test_small_updates_survive_in_bfloat16(optimizer_class):
    """Steps far below bfloat16's spacing at 1: lost when rounded to nearest, right on average when at random."""
    ends = {}
    for rounding in (False, True):
        torch.manual_seed(0)
        matrix = nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
        vector = nn.Parameter(torch.ones(2048, dtype=torch.bfloat16))
        optimizer = optimizer_class(
            [{"params": [matrix], "rank": 32, "update_proj_gap": 1000}, {"params": [vector], "rank": None}],
            lr=1e-4, scale=1.0, stochastic_rounding=rounding, state_dtype="float32",
        )  # fmt: skip
        for _ in range(50):
            matrix.grad = torch.ones_like(matrix) + 0.01 * torch.randn(64, 32).bfloat16()
            vector.grad = torch.ones_like(vector)
            optimizer.step()
        ends[rounding] = tuple(float(param.detach().float().mean()) for param in (matrix, vector))
    assert ends[False][1] == 1
    assert ends[True][1] == pytest.approx(1 - 50e-4, abs=3e-4)
    assert ends[True][0] < 1 - 5e-4


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_torchaos(signed):
    values = torch.randn(32, 256) * torch.logspace(-6, 2, 32)[:, None]
    values = values if signed else values.square()
    codes, scales = quantize(values, signed)
    levels = torch.tensor(create_dynamic_map(signed=signed))
    scaled, their_scales = scale_tensor(values, 256)
    theirs = quantize_8bit_with_qmap(scaled, levels)
    assert torch.equal(scales, their_scales)
    assert (codes.int() - theirs.int()).abs().max() <= 1  # at a tie
    assert (codes != theirs).float().mean() < 1e-3
    assert torch.equal(dequantize(codes, scales, signed), dequant_with_qmap(codes, levels, scales))


@pytest.mark.parametrize("signed", [True, False])
def test_each_value_has_the_code_whose_range_it_is_in(signed):
    levels = torch.tensor(create_dynamic_map(signed=signed))
    bounds = (levels[1:] + levels[:-1]) / 2
    up, down = (torch.nextafter(bounds, torch.full_like(bounds, to)) for to in (2.0, -2.0))
    hard = torch.cat([bounds, up, down, levels, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1e-8, -1e-8])])
    random = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    values = torch.cat([hard, random, random * 1e-3, random * 1e-6]).clamp(-1.0 if signed else 0.0, 1.0)
    values = torch.cat([values, torch.zeros(-len(values) % 255)]).view(-1, 255)
    blocks = torch.cat([values, torch.ones(len(values), 1)], 1)  # so that each block's scale is 1
    codes, scales = quantize(blocks, signed)
    assert torch.equal(scales, torch.ones_like(scales))
    assert np.array_equal(codes.numpy(), np.searchsorted(bounds.numpy(), blocks.numpy(), side="right"))


def test_eight_bit_moments_take_a_quarter_and_train_alike():
    ends, sizes = {}, {}
    for kind in ("float32", "8bit"):
        torch.manual_seed(0)
        matrix, table = nn.Parameter(torch.randn(256, 64)), nn.Parameter(torch.randn(128, 64))
        groups = [{"params": [matrix], "rank": 16}, {"params": [table], "rank": None}]
        optimizer = GaLoreAdamW(groups, lr=1e-2, state_dtype=kind)
        goal = torch.randn(256, 64)
        for _ in range(40):
            optimizer.zero_grad()
            ((matrix - goal).square().mean() + table.square().mean()).backward()
            optimizer.step()
        ends[kind] = torch.cat([matrix, table]).detach()
        sizes[kind] = sum(
            value.numel() * value.element_size()
            for state in optimizer.state.values()
            for key, value in state.items()
            if key.startswith("exp_avg")
        )
    assert sizes["8bit"] == sizes["float32"] / 4 * (1 + 4 / 256)
    assert (ends["8bit"] - ends["float32"]).norm() < 0.05 * ends["float32"].norm()


def test_without_torchao_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"pip install 'hf-lowrank\[8bit\]'"):
        GaLoreAdamW([nn.Parameter(torch.zeros(8, 8))], rank=2, state_dtype="8bit")
