"""The experts of a mixture, which transformers keeps as stacks of matrices in no linear layer."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from hf_lowrank import Trajectory
from hf_lowrank.adapters import CoLAConfig, SLTrainConfig
from hf_lowrank.adapters.modeling import inject
from hf_lowrank.errors import UserError
from hf_lowrank.optim import ApolloAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, param_groups
from hf_lowrank.training import load_recipe

LEFT_OUT = r"model\.layers\.0\.mlp\.experts\.gate_up_proj and 3 more, 63% of the model, are stacks .* and "
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
NANO = Path(__file__).parents[1] / "recipes" / "nano"


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
    """Of the parameters in groups that an optimizer is made of, or has."""
    chosen = [group for group in groups if (group["rank"] is not None) == targets]
    return [name for group in chosen for name in group.get("param_names") or dict(group["params"])]


def test_a_warning_says_what_is_left_to_adamw(mixture):
    with pytest.warns(UserWarning, match=LEFT_OUT + "get plain AdamW; .* target_parameters"):
        groups = param_groups(mixture, rank=8)
    assert not any("experts" in name for name in names(groups, targets=True))


@pytest.mark.parametrize("adapter", [CoLAConfig(r=4), SLTrainConfig(r=4), LoraConfig(r=4, target_modules="auto")])
def test_a_warning_says_what_adapters_leave_dense(mixture, adapter):
    with pytest.warns(UserWarning, match=LEFT_OUT + "remain dense"):
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


@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "apollo_mini", "frugal"])
def test_recipes_name_them(mixture, name, tmp_path):
    recipe = load_recipe(
        NANO / f"{name}.yaml",
        [
            "model.architecture=mixtral",
            "model.num_local_experts=4",
            *(() if name == "apollo_mini" else ("method.rank=8",)),
            f"method.target_parameters={EXPERTS}",
        ],
    )
    optimizer = recipe.method.build_optimizer(mixture, recipe.settings, recipe.arguments(tmp_path))
    assert sum("experts" in name for name in names(optimizer.param_groups, targets=True)) == 4


def test_a_recipe_that_names_none_is_refused_at_its_key():
    wrong = "method.target_parameters=[experts.up]"
    with pytest.raises(UserError, match=r"^--set .*: method\.target_parameters 'experts\.up' matches no matrix"):
        load_recipe(NANO / "galore.yaml", ["model.architecture=mixtral", wrong])


def test_spectra_say_that_they_leave_them_out(mixture, tmp_path):
    mixture.save_pretrained(tmp_path / "checkpoint-0")
    trajectory = Trajectory(tmp_path)
    with pytest.warns(UserWarning, match=LEFT_OUT + "have no spectra"):
        assert len(trajectory.targets) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trajectory.dense_weight(0, trajectory.targets[0]).shape == (32, 32)  # once is enough


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
