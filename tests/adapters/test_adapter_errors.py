"""Bad input: one error each, on one line, that names the module or the field and says what is allowed."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_lowrank.adapters import CoLAConfig, LowRankConfig, LowRankForCausalLM, SLTrainConfig, layers
from hf_lowrank.adapters.layers import SLTrainLinear
from hf_lowrank.errors import UserError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CoLAConfig(r=0), r"r of CoLAConfig must be an integer of at least 1, got 0"),
        (lambda: CoLAConfig(r=True), r"r of CoLAConfig must be an integer of at least 1, got True"),
        (
            lambda: CoLAConfig(rank_pattern={"q_proj": -1}),
            r"r of CoLAConfig for 'q_proj' must be .* at least 1, got -1",
        ),
        (lambda: CoLAConfig(bottleneck_act="silo"), r"unknown bottleneck_act 'silo'; did you mean 'silu'"),
        (lambda: CoLAConfig(init="zero"), r"CoLAConfig: init must be 'random' or 'svd', got 'zero'"),
        (lambda: CoLAConfig(bias="sltrain_only"), r"bias must be 'none', 'all' or 'cola_only', got 'sltrain_only'"),
        (lambda: SLTrainConfig(sparsity=0.0), r"sparsity of SLTrainConfig must be a number in \(0, 1\), got 0.0"),
        (lambda: SLTrainConfig(sparsity=1.0), r"sparsity of SLTrainConfig must be a number in \(0, 1\), got 1.0"),
        (lambda: SLTrainConfig(sparsity=-0.1), r"sparsity of SLTrainConfig must be a number in \(0, 1\), got -0.1"),
        (lambda: CoLAConfig(target_modules="("), r"CoLAConfig: target_modules must be a regular expression, got '\('"),
        (lambda: CoLAConfig(exclude_modules="["), r"exclude_modules must be a regular expression, got '\['"),
        (lambda: SLTrainConfig(lora_alpha=0), r"lora_alpha of SLTrainConfig must be a number above 0, got 0"),
    ],
)
def test_configs(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "w_proj"]}, r"target_modules 'w_proj' matches no linear module.*available: "),
        (
            {"target_modules": "nothing.*"},
            r"target_modules 'nothing\.\*' matches no linear module of Llama",
        ),
        ({"target_modules": []}, r"target_modules must name at least one module"),
        ({"target_modules": ["embed_tokens"]}, r"'embed_tokens' matches no linear module"),
    ],
)
def test_targets_that_match_nothing(llama_config, dense, replacing, options, message):
    plain = dense(llama_config)
    with pytest.raises(UserError, match=message):
        get_peft_model(plain, replacing(**options))
    with pytest.raises(UserError, match=message):
        LowRankForCausalLM(LowRankConfig(base_config=llama_config, adapter_config=replacing(**options)))


def test_rank_too_large(llama_config, dense):
    message = r"model\.layers\.0\.self_attn\.q_proj: rank r must be at most 16, .* 16 × 16 weight, got 17"
    for config in (CoLAConfig(r=17), SLTrainConfig(r=17)):
        with pytest.raises(UserError, match=message):
            get_peft_model(dense(llama_config), config)


def test_rank_too_large_for_relora(llama_config):
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj: rank r must be at most 16.*got 17"):
        LowRankForCausalLM(LowRankConfig(base_config=llama_config, adapter_config=LoraConfig(r=17)))


def test_sparsity_that_keeps_nothing_of_a_small_layer(llama_config, dense):
    with pytest.raises(UserError, match=r"q_proj: sparsity 0.001 keeps 0 of 256 entries"):
        get_peft_model(dense(llama_config), SLTrainConfig(r=2, sparsity=0.001))


def test_layers_too_large_for_32_bit_positions():
    with torch.device("meta"):
        huge = nn.Linear(2**16, 2**15)
    layer = SLTrainLinear(huge, "block.huge")
    with pytest.raises(UserError, match=r"block\.huge: .*fewer than 2\^31 entries, got 32768 × 65536"):
        layer.update_layer("default", 2, init="random", seed=0, weight=None, options={"scaling": 1, "sparsity": 0.1})


def test_two_methods_on_one_layer(llama_config, dense):
    model = get_peft_model(dense(llama_config), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"q_proj: CoLA replaces linear layers, .* already has another adapter"):
        get_peft_model(model.base_model.model, CoLAConfig(r=2, target_modules=r".*q_proj"))


def test_a_second_adapter_cannot_start_from_a_weight_that_is_gone(llama_config, dense):
    model = get_peft_model(dense(llama_config), CoLAConfig(r=2, init="svd"))
    with pytest.raises(UserError, match=r"q_proj: init='svd' needs the dense weight"):
        model.add_adapter("second", CoLAConfig(r=2, init="svd"))


@pytest.mark.parametrize("config", [CoLAConfig, SLTrainConfig])
def test_a_saved_adapter_loads_without_the_decomposition_it_began_from(
    llama_config, dense, tmp_path, config, monkeypatch
):
    model = get_peft_model(dense(llama_config), config(r=2, init="svd"))
    assert model.peft_config["default"].init == "svd"
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].init == "svd"
    monkeypatch.setattr(layers, "truncated_svd", lambda *arguments: pytest.fail("decomposed"))
    ids = torch.arange(6)[None]
    alone = PeftModel.from_pretrained(dense(llama_config), tmp_path)
    torch.testing.assert_close(alone(input_ids=ids).logits, model(input_ids=ids).logits)
    beside = get_peft_model(dense(llama_config), config(r=2))
    beside.load_adapter(tmp_path, "other")
    beside.set_adapter("other")
    torch.testing.assert_close(beside(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (None, r"adapter_config is missing"),
        ({"peft_type": "IA3"}, r"peft_type must be one of COLA, SLTRAIN, STRUCTURED, SST, LORA, got 'IA3'"),
        ({}, r"peft_type must be one of"),
        ({"peft_type": "COLA", "rank": 3}, r"adapter_config: unknown option 'rank' of CoLAConfig"),
    ],
)
def test_adapter_configs_of_models(llama_config, adapter, message):
    with pytest.raises(UserError, match=message):
        LowRankForCausalLM(LowRankConfig(base_config=llama_config, adapter_config=adapter))
