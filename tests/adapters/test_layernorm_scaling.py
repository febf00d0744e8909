"""LayerNorm scaling against its formula, through the model class, recipes, runs, measurements and the export."""

import copy

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, GemmaConfig, LlamaForCausalLM, Olmo2Config

from hf_lowrank.adapters import LowRankConfig, LowRankForCausalLM, SLTrainConfig
from hf_lowrank.adapters.norms import norm_factors
from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure
from hf_lowrank.methods import METHODS
from hf_lowrank.runs.export import export
from hf_lowrank.runs.sharded_models import sharded_model
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.training import load_recipe, pretrain
from tests.distributed.processes import in_processes

NORMS = {
    "llama": ("model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm"),
    "gpt2": ("transformer.h.{}.ln_1", "transformer.h.{}.ln_2"),
    "gpt_neox": ("gpt_neox.layers.{}.input_layernorm", "gpt_neox.layers.{}.post_attention_layernorm"),
    "mixtral": ("model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm"),
}


def scaled(config, stir, adapter=None):
    torch.manual_seed(0)
    own = LowRankConfig(base_config=copy.deepcopy(config), adapter_config=adapter, layernorm_scaling=True)
    return stir(LowRankForCausalLM(own)).eval()


@pytest.mark.parametrize("adapter", [None, SLTrainConfig(r=4, sparsity=0.1)], ids=["dense", "sltrain"])
@pytest.mark.parametrize("name", NORMS)
def test_logits_are_those_of_a_plain_model_with_scaled_norms(architectures, name, stir, ids, adapter):
    model = scaled(architectures[name](), stir, adapter)
    plain = copy.deepcopy(model)
    plain.config.layernorm_scaling = False
    for module in plain.modules():
        module._forward_hooks.clear()
    unscaled = plain(input_ids=ids).logits
    with torch.no_grad():
        for block in range(2):
            for pattern in NORMS[name]:
                for parameter in plain.lm.get_submodule(pattern.format(block)).parameters():
                    parameter.copy_(torch.from_numpy(parameter.numpy() / np.sqrt(block + 1.0)))
    logits = model(input_ids=ids).logits
    assert not torch.allclose(logits, unscaled, atol=1e-3)
    assert torch.allclose(logits, plain(input_ids=ids).logits, atol=1e-5)
    dense = model.to_dense()
    assert not isinstance(dense, LowRankForCausalLM)
    assert torch.allclose(dense(input_ids=ids).logits, logits, atol=1e-5)
    assert torch.allclose(model.to_dense(in_place=True)(input_ids=ids).logits, logits, atol=1e-5)


def test_the_output_of_a_norm_is_the_formula(llama_config, stir):
    model = scaled(llama_config, stir)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    wide = x.double().numpy()
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + llama_config.rms_norm_eps)
    for module, factor in (
        (model.lm.model.layers[0].input_layernorm, 1.0),
        (model.lm.model.layers[1].input_layernorm, 1 / np.sqrt(2)),
        (model.lm.model.layers[1].post_attention_layernorm, 1 / np.sqrt(2)),
        (model.lm.model.norm, 1.0),
    ):
        expected = factor * normed * module.weight.detach().double().numpy()
        np.testing.assert_allclose(module(x).detach().numpy(), expected, atol=1e-6)


def test_gradients_are_those_of_a_scaled_output(llama_config, stir, ids):
    """The chain rule: a norm's weight gets the gradient of the folded weight, times the factor."""
    model = scaled(llama_config, stir)
    dense = model.to_dense()
    for one in (model, dense):
        one(input_ids=ids, labels=ids).loss.backward()
    for block in range(2):
        own = model.lm.model.layers[block].input_layernorm.weight.grad
        folded = dense.model.layers[block].input_layernorm.weight.grad
        torch.testing.assert_close(own, folded / np.sqrt(block + 1), rtol=1e-4, atol=1e-7)


def test_it_is_in_the_config_and_auto_classes_load_it(llama_config, stir, ids, tmp_path):
    model = scaled(llama_config, stir)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.layernorm_scaling, config.adapter_config) == ("lowrank", True, None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GemmaConfig, r"output is proportional to their weight, model\.layers\.0\.input_layernorm is a GemmaRMSNorm"),
        (Gemma2Config, r"with one or two norms, model\.layers\.0 of Gemma2ForCausalLM has 4: input_layernorm, "),
    ],
)
def test_norms_that_cannot_be_folded_are_refused_by_name(config, message):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
        )
    with pytest.raises(UserError, match=message):
        norm_factors(model)


def test_norms_inside_attention_are_not_scaled():
    config = Olmo2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=32
    )
    with torch.device("meta"):
        factors = norm_factors(AutoModelForCausalLM.from_config(config))
    assert len(factors) == 6
    assert factors["model.layers.2.post_attention_layernorm"] == 3**-0.5


def test_a_model_without_blocks_or_a_config_without_anything_is_refused(llama_config):
    with pytest.raises(UserError, match=r"needs a model whose blocks have norms, got Linear"):
        norm_factors(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="adapter_config is missing"):
        LowRankForCausalLM(LowRankConfig(base_config=llama_config))


# -- recipes and runs


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A small recipe of a method, as a path."""
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path / "cache"))
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"words that follow each other, {number} times and again. " * 60)

    def write(method, scaling=True, **training):
        plain = {
            "method": method,
            "model": {"architecture": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                      "num_attention_heads": 2, "max_position_embeddings": 64, "layernorm_scaling": scaling},
            "data": {"source": "files", "train_files": ["[012].txt"], "held_out_files": ["3.txt"],
                     "sequence_length": 16, "vocabulary_size": 300, "evaluation_sequences": 4},
            "training": {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2,
                         **training},
        }  # fmt: skip
        path = tmp_path / f"{method['name']}-{scaling}.yaml"
        path.write_text(yaml.safe_dump(plain))
        return path

    return write


METHOD_BLOCKS = [{"name": "full_rank"}, {"name": "galore", "rank": 4}, {"name": "relora", "r": 4}]


@pytest.mark.parametrize("method", METHOD_BLOCKS, ids=lambda block: block["name"])
def test_a_run_trains_resumes_measures_and_exports(recipe, tmp_path, method):
    run = pretrain(load_recipe(recipe(method)), tmp_path / "scaled-0")
    trajectory = Trajectory(run)
    assert (trajectory.adapted, trajectory.dense_weight_kind) == (True, "exact")
    resumed = tmp_path / "resumed-0"
    pretrain(load_recipe(recipe(method)), resumed)
    (resumed / "checkpoint-4/config.json").unlink()  # incomplete
    pretrain(load_recipe(recipe(method)), resumed)
    one, two = (load_file(folder / "checkpoint-4/model.safetensors") for folder in (run, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)

    ids = torch.arange(12).view(1, 12)
    model = trajectory.model(4)
    plain = AutoModelForCausalLM.from_pretrained(export(run / "checkpoint-4", tmp_path / "plain")).eval()
    assert isinstance(plain, LlamaForCausalLM)
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    name = "model.layers.1.mlp.down_proj"
    assert name in trajectory.targets
    assert len(trajectory.targets) == 21
    torch.testing.assert_close(trajectory.dense_weight(4, name), plain.get_submodule(name).weight.detach())
    baseline = pretrain(load_recipe(recipe(method, scaling=False)), tmp_path / "baseline-0")
    small = {"random": {"draws": 2, "steps": 1}, "pca": {"count": 2}, "path": {"points": 1}, "sequences": 4}
    rows = measure(run, baseline=baseline, settings=small, steps="last")
    values = {row.metric: row for row in rows if row.scope == "model"}
    for metric in ("random_sharpness", "method_barrier", "weight_stable_rank", "activation_cka"):
        assert np.isfinite(values[metric].value), values[metric].reason


def test_the_first_weights_are_those_of_the_plain_model(recipe):
    models = []
    for scaling in (True, False):
        one = load_recipe(recipe({"name": "full_rank"}, scaling))
        torch.manual_seed(0)
        models.append(one.method.build_model(one.config(vocab_size=300), one.settings, 0))
    first, second = models
    assert type(second) is LlamaForCausalLM
    assert all(torch.equal(first.lm.get_parameter(name), tensor) for name, tensor in second.named_parameters())


def test_sharded_loading_folds_too(recipe, tmp_path):
    run = pretrain(load_recipe(recipe({"name": "full_rank"})), tmp_path / "scaled-0")
    ids = torch.arange(12).view(1, 12)
    expected = Trajectory(run).model(4)(input_ids=ids).logits

    def logits(rank, world):
        mesh = init_device_mesh("cpu", (world,))
        found = [
            sharded_model(Trajectory(run), 4, mesh, torch.device("cpu"), dense=dense)(input_ids=ids).logits.detach()
            for dense in (False, True)
        ]
        return found

    for found in in_processes(2, logits, tmp_path / "meet"):
        for one in found:
            assert torch.allclose(one, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "architecture", "message"),
    [
        ("yes please", "llama", r"model\.layernorm_scaling must be true or false, got 'yes please'"),
        (True, "gemma", r"model cannot be built: layernorm_scaling needs norms whose output is proportional"),
    ],
)
def test_bad_values_in_recipes(recipe, scaling, architecture, message):
    path = recipe({"name": "full_rank"}, scaling)
    with pytest.raises(UserError, match=message) as error:
        load_recipe(path, [f"model.architecture={architecture}"])
    assert str(path) in str(error.value)


def test_the_table_of_methods_needs_no_change(llama_config):
    """Every method builds on the wrapped config."""
    for name, method in METHODS.items():
        rank = {"r": 4} if "r" in method.settings.model_fields else {}
        config = LowRankConfig(base_config=copy.deepcopy(llama_config), layernorm_scaling=True)
        model = method.build_model(config, method.settings(**rank), 0)
        assert model.config.layernorm_scaling, name
        assert (model.config.adapter_config is None) == (not rank), name
