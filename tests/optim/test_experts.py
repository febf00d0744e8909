"""The experts of a mixture, which transformers keeps as stacks of matrices in no linear layer."""

import warnings

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from hf_lowrank.adapters import CoLAConfig, SLTrainConfig
from hf_lowrank.adapters.modeling import inject
from hf_lowrank.errors import UserError
from hf_lowrank.optim import ApolloAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, param_groups

LEFT_OUT = r"model\.layers\.0\.mlp\.experts\.gate_up_proj and 3 more, 63% of the model, are stacks .* and "
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config)


def names(groups, *, targets):
    return [name for group in groups if (group["rank"] is not None) == targets for name, _ in group["params"]]


def test_a_warning_says_what_is_left_to_adamw(mixture):
    with pytest.warns(UserWarning, match=LEFT_OUT + "get plain AdamW; .* target_parameters"):
        groups = param_groups(mixture, rank=8)
    assert not any("experts" in name for name in names(groups, targets=True))


@pytest.mark.parametrize("adapter", [CoLAConfig(r=4), SLTrainConfig(r=4), LoraConfig(r=4, target_modules="auto")])
def test_a_warning_says_what_adapters_leave_dense(mixture, adapter):
    with pytest.warns(UserWarning, match=LEFT_OUT + "stay as they are"):
        inject(mixture, adapter)


def test_named_experts_are_targets(mixture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = param_groups(mixture, rank=8, target_parameters=EXPERTS)
        param_groups(mixture, rank=8, target_modules=["q_proj"])  # chosen, not forgotten
    assert sum("experts" in name for name in names(groups, targets=True)) == 4
    assert "model.layers.0.mlp.gate.weight" in names(groups, targets=False)
    assert "model.layers.1.self_attn.q_proj.weight" in names(groups, targets=True)


@pytest.mark.parametrize("method", [GaLoreAdamW, FiraAdamW, ApolloAdamW, FrugalAdamW])
def test_a_mixture_trains_with_them(mixture, method):
    optimizer = method(mixture, rank=8, lr=1e-2, update_proj_gap=4, target_parameters=EXPERTS)
    inputs = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = mixture(inputs, labels=inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    stack = mixture.model.layers[0].mlp.experts.gate_up_proj
    assert optimizer.state[stack]["exp_avg"].shape == (4, 48, 8)


def test_what_does_not_fit_is_said(mixture):
    with pytest.raises(UserError, match=r"target_parameters 'experts\.up' matches no matrix .* experts\.down_proj"):
        param_groups(mixture, rank=8, target_parameters=["experts.up"])
    with pytest.raises(UserError, match=r"rank must be from 1 to 24 for .*down_proj of shape \(4, 32, 24\), got 30"):
        param_groups(mixture, rank=30, target_modules=["q_proj"], target_parameters=["experts.down_proj"])


def test_kernels_of_convolutions_are_no_experts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(8, 8))])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(Net(), rank=4)
