"""What PEFT's own suite asks of a tuner that has no disabled state, on four architectures."""

import copy
import json
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters import CoLAConfig, CoLAModel, SLTrainConfig, SLTrainModel, target_layers
from hf_lowrank.adapters.layers import ReplacedLinear
from hf_lowrank.compat import register_with_peft
from hf_lowrank.errors import UserError
from hf_lowrank.targets import target_modules


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def replaced(model):
    return [module for module in model.modules() if isinstance(module, ReplacedLinear)]


@pytest.mark.parametrize(
    ("name", "config_cls", "model_cls"), [("cola", CoLAConfig, CoLAModel), ("sltrain", SLTrainConfig, SLTrainModel)]
)
def test_peft_knows_the_methods(name, config_cls, model_cls):
    """Guards the one place that opens PEFT's closed enum: all that PEFT itself does with a member must work."""
    key = name.upper()
    member = PeftType(key)
    assert member is getattr(PeftType, key) is PeftType[key]
    assert member == key
    assert member in list(PeftType)
    assert key in PeftType.__members__
    assert member.value == member.name == key
    assert hash(member) == hash(key)
    assert copy.deepcopy(member) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": key}
    assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is config_cls
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is model_cls
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == f"{name}_"
    register_with_peft(name, config_cls, model_cls)  # once more changes nothing
    assert list(PeftType).count(member) == 1
    assert PeftType.LORA in list(PeftType)


def test_auto_takes_every_linear_layer_of_the_blocks(base_config, replacing, dense):
    plain = dense(base_config)
    wanted = set(target_modules(plain))
    model = get_peft_model(plain, replacing())
    assert {layer.layer_name for layer in replaced(model)} == wanted
    assert not [module for layer in replaced(model) for module in layer.modules() if isinstance(module, nn.Linear)]


def test_mixture_of_experts_keeps_its_experts_dense(dense, architectures):
    model = get_peft_model(dense(architectures["mixtral"]()), CoLAConfig(r=4))
    assert {layer.layer_name.rsplit(".", 1)[-1] for layer in replaced(model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


def test_conv1d_is_replaced_in_its_own_orientation(dense, replacing, architectures):
    plain = dense(architectures["gpt2"]())
    shapes = {name: tuple(module.weight.shape)[::-1] for name, module in target_modules(plain).items()}
    model = get_peft_model(plain, replacing())
    assert {layer.layer_name: (layer.out_features, layer.in_features) for layer in replaced(model)} == shapes
    assert all(layer.base_layer.was_conv1d for layer in replaced(model))


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 2),
        (["q_proj", "mlp.up_proj"], 4),
        (["model.layers.1.self_attn.v_proj"], 1),
        (r".*layers\.0\..*_proj", 7),
        ("all-linear", 14),
        ("auto", 14),
        (None, 14),
    ],
)
def test_target_modules(llama_config, dense, targets, count, replacing):
    model = get_peft_model(dense(llama_config), replacing(target_modules=targets))
    assert len(replaced(model)) == count


@pytest.mark.parametrize("excluded", [["q_proj", "layers.0.mlp.up_proj"], r".*(q_proj|layers\.0\.mlp\.up_proj)"])
def test_exclude_modules(llama_config, dense, replacing, excluded):
    model = get_peft_model(dense(llama_config), replacing(exclude_modules=excluded))
    names = {layer.layer_name for layer in replaced(model)}
    assert len(names) == 11
    assert not [name for name in names if "q_proj" in name or name == "model.layers.0.mlp.up_proj"]


def test_rank_pattern(llama_config, dense, replacing):
    model = get_peft_model(dense(llama_config), replacing(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 6}))
    ranks = {layer.layer_name: layer.r["default"] for layer in replaced(model)}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    assert ranks["model.layers.1.mlp.up_proj"] == 6
    assert ranks["model.layers.0.mlp.up_proj"] == 4


def test_only_the_adapter_trains_and_every_part_gets_a_gradient(base_config, replacing, dense, ids, stir):
    model = stir(get_peft_model(dense(base_config), replacing()))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {
        n
        for n, _ in model.named_parameters()
        if any(part in n for part in (".cola_", ".sltrain_", ".structured_", ".sst_"))
    }
    assert trainable == {name for name in own if ".sst_U" not in name and ".sst_V" not in name}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("safetensors_name", ["default", "other"])
def test_save_and_load(base_config, replacing, dense, ids, stir, tmp_path, low_cpu_mem_usage, safetensors_name):
    model = stir(get_peft_model(dense(base_config), replacing(seed=3)))
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is type(replacing())
    assert config.seed == 3
    loaded = PeftModel.from_pretrained(
        dense(base_config), tmp_path, adapter_name=safetensors_name, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert not [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
    assert torch.equal(logits(loaded, ids), wanted)
    assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    trainable = PeftModel.from_pretrained(dense(base_config), tmp_path, is_trainable=True)
    assert sum(p.requires_grad for p in trainable.parameters()) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("is_trainable", [False, True])
def test_parameters_that_are_cast_or_moved_on_loading_stay_frozen(
    llama_config, replacing, dense, tmp_path, is_trainable
):
    get_peft_model(dense(llama_config), replacing()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        dense(llama_config).to(torch.bfloat16),
        tmp_path,
        is_trainable=is_trainable,
        low_cpu_mem_usage=True,
        autocast_adapter_dtype=False,
    )
    adapter = [parameter for name, parameter in loaded.named_parameters() if ".default" in name]
    assert adapter
    frozen = [p for name, p in loaded.named_parameters() if ".sst_U" in name or ".sst_V" in name]
    assert len(frozen) == (2 * len(replaced(loaded)) if replacing.name == "sst" else 0)
    assert {parameter.dtype for parameter in adapter} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in frozen)
    assert {p.requires_grad for p in adapter if not any(p is other for other in frozen)} == {is_trainable}


def test_an_adapter_of_some_layers_loads_beside_one_of_all(llama_config, replacing, dense, tmp_path):
    model = get_peft_model(dense(llama_config), replacing())
    model.add_adapter("partial", replacing(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    other = get_peft_model(dense(llama_config), replacing())
    other.load_adapter(str(tmp_path / "partial"), adapter_name="partial", low_cpu_mem_usage=True)
    assert sum(parameter.numel() for name, parameter in other.named_parameters() if ".partial" in name) > 0
    assert not any(parameter.is_meta for parameter in other.parameters())


def test_saved_files_hold_the_adapter_alone(base_config, replacing, dense):
    model = get_peft_model(dense(base_config), replacing())
    parts = {
        "sltrain": {"sltrain_A", "sltrain_B", "sltrain_values", "sltrain_support"},
        "structured": {"structured_A", "structured_B"},
        "sst": {f"sst_{part}" for part in ("A", "B", "S", "U", "V", "index")},
    }.get(replacing.name, {"cola_A", "cola_B"})
    state = get_peft_model_state_dict(model)
    assert {name.rsplit(".", 1)[-1] for name in state} == parts
    assert len(state) == len(parts) * len(replaced(model))


def test_state_dict_round_trip(llama_config, replacing, dense, ids, stir):
    model = stir(get_peft_model(dense(llama_config), replacing()))
    other = get_peft_model(dense(llama_config), replacing(seed=9))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_an_adapter_file_with_a_missing_tensor_is_an_error(llama_config, replacing, dense, tmp_path):
    get_peft_model(dense(llama_config), replacing()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = next(name for name in sorted(tensors) if "layers.1.mlp.up_proj" in name)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=rf"model\.layers\.1\.mlp\.up_proj: the \w+ adapter lacks the tensor {gone}"):
        PeftModel.from_pretrained(dense(llama_config), tmp_path)


def test_modules_to_save(llama_config, replacing, dense, ids, stir, tmp_path):
    model = stir(get_peft_model(dense(llama_config), replacing(modules_to_save=["lm_head", "norm"])))
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.requires_grad
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(dense(llama_config), tmp_path)
    assert torch.equal(logits(loaded, ids), wanted)


def test_several_adapters(base_config, replacing, dense, ids, stir, tmp_path):
    model = stir(get_peft_model(dense(base_config), replacing()))
    first = logits(model, ids)
    model.add_adapter("second", replacing(seed=1))
    assert torch.equal(logits(model, ids), first)  # adding does not switch
    model.set_adapter("second")
    stir(model)
    second = logits(model, ids)
    assert not torch.equal(second, first)
    assert {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(dense(base_config), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(loaded, ids), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, ids), second)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert not [name for name in model.state_dict() if "second" in name]
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)


def test_adapters_of_different_layers_cannot_leave_one_without(llama_config, replacing, dense, ids):
    model = get_peft_model(dense(llama_config), replacing())
    model.add_adapter("partial", replacing(target_modules=["q_proj"]))
    model.set_adapter("partial")
    with pytest.raises(UserError, match=r"k_proj: exactly one adapter must be active.*available: default"):
        logits(model, ids)
    model.base_model.set_adapter(["default", "partial"])
    with pytest.raises(UserError, match=r"q_proj: exactly one adapter"):
        logits(model, ids)


def test_there_is_no_disabled_state(base_config, replacing, dense, ids):
    model = get_peft_model(dense(base_config), replacing())
    wanted = logits(model, ids)
    with pytest.raises(UserError, match=r"keeps no dense weight, so it cannot be disabled"), model.disable_adapter():
        pass
    with pytest.raises(UserError, match=r"cannot be unloaded"):
        model.unload()
    with pytest.raises(UserError, match=r"no disabled state"):
        replaced(model)[0].enable_adapters(False)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model, ids), wanted)


def test_merge_and_unload(base_config, dense, ids, stir):
    for config in (SLTrainConfig(r=4, sparsity=0.1), CoLAConfig(r=4, bottleneck_act="linear")):
        plain = dense(base_config)
        kinds = {name: type(module) for name, module in target_modules(plain).items()}
        shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
        model = stir(get_peft_model(plain, config))
        wanted = logits(model, ids)
        merged = model.merge_and_unload(safe_merge=True)
        assert torch.allclose(logits(merged, ids), wanted, atol=1e-5)
        assert {name: type(module) for name, module in target_modules(merged).items()} == kinds
        assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == shapes
        assert not hasattr(merged, "peft_config")


def test_merge_and_unmerge_in_place(base_config, dense, ids, stir):
    model = stir(get_peft_model(dense(base_config), SLTrainConfig(r=4, sparsity=0.1)))
    wanted = logits(model, ids)
    model.merge_adapter()
    assert all(layer.merged for layer in replaced(model))
    assert torch.allclose(logits(model, ids), wanted, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()  # merged already: a warning, no harm
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), wanted)


def test_merging_cola_is_refused_and_changes_nothing(base_config, dense, ids):
    model = get_peft_model(dense(base_config), CoLAConfig(r=4))
    wanted = logits(model, ids)
    first = replaced(model)[0].layer_name
    for merge in (model.merge_and_unload, model.merge_adapter, replaced(model)[0].merge):
        with pytest.raises(UserError, match=rf"{first}: CoLA cannot be merged: its non-linearity"):
            merge()
    assert torch.equal(logits(model, ids), wanted)


def test_a_broken_adapter_is_not_merged_safely(llama_config, dense):
    model = get_peft_model(dense(llama_config), SLTrainConfig(r=4, sparsity=0.1))
    with torch.no_grad():
        replaced(model)[0].sltrain_A["default"].fill_(float("nan"))
    with pytest.raises(UserError, match=r"q_proj: the merged weight of adapter 'default' contains NaN or Inf"):
        model.merge_and_unload(safe_merge=True)


def test_generate(base_config, replacing, dense, ids, stir):
    model = stir(get_peft_model(dense(base_config), replacing()))
    cached = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    again = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)


def test_gradient_checkpointing(base_config, replacing, dense, ids, stir):
    model = stir(get_peft_model(dense(base_config), replacing()))
    model.train()

    def step():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    wanted = step()
    model.base_model.model.activation_checkpointing_enable()
    assert all(torch.allclose(g, w, atol=1e-7) for g, w in zip(step(), wanted, strict=True))


def test_half_precision_bases(llama_config, replacing, dense, ids):
    model = get_peft_model(dense(llama_config, torch.bfloat16), replacing())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}  # as PEFT does by default
    assert logits(model, ids).dtype == torch.bfloat16
    pure = get_peft_model(dense(llama_config, torch.bfloat16), replacing(), autocast_adapter_dtype=False)
    assert {p.dtype for p in pure.parameters() if p.requires_grad} == {torch.bfloat16}
    assert logits(pure, ids).dtype == torch.bfloat16
    if replacing.name == "sltrain":
        pure.to(torch.float32)
        assert replaced(pure)[0].sltrain_support["default"].dtype == torch.int32


def test_biases_train_when_asked(dense, architectures):
    model = get_peft_model(dense(architectures["gpt2"]()), SLTrainConfig(r=4, sparsity=0.1, bias="sltrain_only"))
    biases = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")]
    assert len(biases) == len(replaced(model))
    assert set(get_peft_model_state_dict(model)) >= {name.replace(".default", "") for name in biases}


def test_deep_copies_are_independent(llama_config, replacing, dense, ids, stir):
    model = get_peft_model(dense(llama_config), replacing())
    wanted = logits(model, ids)
    stir(copy.deepcopy(model))
    assert torch.equal(logits(model, ids), wanted)


def test_plain_modules_can_be_adapted(replacing):
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), Conv1D(5, 10))
    adapted = get_peft_model(model, replacing(target_modules=["0", "2"]))
    assert adapted(torch.randn(3, 6)).shape == (3, 5)
    assert set(target_layers(adapted.base_model.model)) == {"0", "2"}
