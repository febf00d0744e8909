"""Layers of mixtures: which of their linear layers are targets, and that adapters on them compute and train."""

import warnings

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM

from hf_lowrank.adapters import CoLAConfig, SLTrainConfig
from hf_lowrank.adapters.modeling import LowRankForCausalLM, inject
from hf_lowrank.errors import UserError
from hf_lowrank.optim import GaLoreAdamW, param_groups
from hf_lowrank.targets import target_modules

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
SHARED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURES = {
    "deepseek_v3": {**LATENT, **ROUTED, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": 8},
    "glm4_moe": {**ROUTED, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    "qwen2_moe": {**SHARED, "shared_expert_intermediate_size": 24},
    "qwen3_next": {**SHARED, "shared_expert_intermediate_size": 24, "head_dim": 8, "linear_num_value_heads": 4}
    | {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48},
}
ADAPTERS = {"cola": CoLAConfig(r=4), "sltrain": SLTrainConfig(r=4), "relora": LoraConfig(r=4, target_modules="auto")}
# Linear layers that `auto` leaves dense: gates with one output, and routers with a forward pass of their own.
LEFT = {
    "qwen2_moe": "shared_expert_gate",
    "qwen3_next": "shared_expert_gate",
    "phimoe": "router",
    "llama4_text": "router",
}


@pytest.fixture(params=MIXTURES)
def mixture(request):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(request.param, **{**SIZES, **MIXTURES[request.param]}, use_cache=False)
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.filterwarnings("ignore:.*are stacks of matrices")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_on_the_targets_alone_and_train(mixture, adapter):
    wanted = set(target_modules(mixture))
    left = LEFT.get(mixture.config.model_type)
    linear = {name for name, module in mixture.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name in linear - wanted if "lm_head" not in name} == {
        name for name in linear if left and name.endswith(left)
    }
    adapted = LowRankForCausalLM.from_dense(mixture, ADAPTERS[adapter])
    layers = {name: layer for name, layer in adapted.lm.named_modules() if isinstance(layer, BaseTunerLayer)}
    assert layers.keys() == wanted
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
    if adapter == "relora":
        assert torch.allclose(adapted.eval()(ids).logits, mixture.eval()(ids).logits, atol=1e-5)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    for _ in range(2):  # at first B is zero in LoRA, and A without a gradient
        adapted.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    inert = [
        name
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and 1 not in parameter.shape
        and torch.equal(parameter, before[name])
    ]
    assert not inert


@pytest.mark.filterwarnings("ignore:.*are stacks of matrices")
def test_optimizers_take_a_rank_above_one(mixture):
    groups = param_groups(mixture, rank=8)
    GaLoreAdamW(groups, lr=0.01)
    for patterns in ("auto", "all-linear"):
        assert min(min(module.weight.shape) for module in target_modules(mixture, patterns).values()) > 1


@pytest.mark.parametrize("architecture", ["phimoe", "llama4_text"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_router_that_is_named_is_refused_by_name(architecture, adapter):
    config = AutoConfig.for_model(architecture, **{**SIZES, **MIXTURES[architecture]})
    model = AutoModelForCausalLM.from_config(config)
    named = type(ADAPTERS[adapter])(r=4, target_modules=["router"])
    with pytest.raises(UserError, match=r"layers\.0\..*router: \w+Router has a forward pass of its own"):
        inject(model, named)


def test_a_linear_layer_that_only_writes_its_product_anew_is_a_target():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes))
    assert type(model.transformer.h[0].mlp.dense_h_to_4h).forward is not torch.nn.Linear.forward
    assert len(target_modules(model)) == 4
    inject(model, CoLAConfig(r=4))
