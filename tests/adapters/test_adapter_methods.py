"""The adapters as entries of the table of methods, and their recipes."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, TrainingArguments

from hf_lowrank.adapters import LowRankForCausalLM, ReLoraCallback, ReLoraScheduler, target_layers
from hf_lowrank.methods import METHODS
from hf_lowrank.training import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ("relora", "cola", "sltrain", "sst", "low_rank")
SMALL = {**{name: {"r": 3} for name in NAMES}, "sltrain": {"r": 3, "sparsity": 0.1}}


def built(name, config, run=0, **settings):
    method = METHODS[name]
    torch.manual_seed(run)
    return method.build_model(config, method.settings(**{**SMALL.get(name, {}), **settings}), run)


@pytest.mark.parametrize("name", NAMES)
def test_shared_weights_start_as_in_the_full_rank_run(llama_config, name):
    plain, model = built("full_rank", llama_config), built(name, llama_config)
    assert isinstance(model, LowRankForCausalLM)
    assert len(target_layers(model)) == 14
    for shared in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(model.lm.get_parameter(shared), plain.get_parameter(shared))
    if name == "relora":
        for target, layer in target_layers(model).items():
            assert torch.equal(layer.get_base_layer().weight, plain.get_submodule(target).weight)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_decide_every_draw(llama_config, name):
    def parts(run, **settings):
        state = built(name, llama_config, run, **settings).state_dict()
        return {key: tensor for key, tensor in state.items() if "_A" in key or "support" in key}

    reference = parts(0)
    assert all(torch.equal(tensor, reference[key]) for key, tensor in parts(0).items())
    assert not any(torch.equal(tensor, reference[key]) for key, tensor in parts(1).items())
    assert not any(torch.equal(tensor, reference[key]) for key, tensor in parts(0, seed=1).items())
    if name != "sst":  # its vectors are those of the run's first weights
        assert all(torch.equal(tensor, reference[key]) for key, tensor in parts(1, seed=0).items())


@pytest.mark.parametrize("name", NAMES)
def test_trainable_parameters_are_the_formula(name):
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    r, sparsity = 5, 0.03
    model = built(name, config, r=r, **({"sparsity": sparsity} if name == "sltrain" else {}))
    shapes = 2 * (4 * [(32, 32)] + 2 * [(48, 32)] + [(32, 48)])
    outside = 2 * 50 * 32 + 32 + 2 * 2 * 32
    extra = {"sltrain": lambda m, n: int(sparsity * m * n), "sst": min}.get(name, lambda m, n: 0)
    wanted = outside + sum(r * (m + n) + extra(m, n) for m, n in shapes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted


def test_relora_brings_optimizer_schedule_and_callback(llama_config, tmp_path):
    method = METHODS["relora"]
    settings = method.settings(r=3, restart_every=50, restart_warmup_steps=7, min_lr_ratio=0.2, pruning="zero")
    model = method.build_model(llama_config, settings, 0)
    args = TrainingArguments(
        str(tmp_path), learning_rate=3e-3, weight_decay=0.1, adam_beta2=0.95, warmup_steps=5, seed=11, use_cpu=True
    )
    optimizer = method.build_optimizer(model, settings, args)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in model.parameters() if p.requires_grad}
    scheduler = method.build_scheduler(optimizer, settings, args, 200)
    assert isinstance(scheduler, ReLoraScheduler)
    assert (scheduler.warmup_steps, scheduler.restart_every, scheduler.min_lr_ratio) == (5, 50, 0.2)
    (callback,) = method.callbacks(settings, args)
    assert isinstance(callback, ReLoraCallback)
    assert (callback.seed, callback.pruning) == (11, "zero")


@pytest.mark.parametrize(
    ("name", "settings"),
    [("cola", {"r": 0}), ("sltrain", {"sparsity": 1}), ("relora", {"prune_ratio": 2}), ("low_rank", {"rank": 3})],
)
def test_settings_out_of_range(name, settings):
    with pytest.raises(ValidationError):
        METHODS[name].settings(**settings)


PUBLISHED = {
    ("cola", "llama_60m"): (6e-3, {"r": 128}),
    ("cola", "llama_130m"): (3e-3, {"r": 256}),
    ("cola", "llama_350m"): (3e-3, {"r": 256}),
    ("sltrain", "llama_60m"): (2e-3, {"r": 128, "lora_alpha": 32, "sparsity": 0.03}),
    ("sltrain", "llama_130m"): (3e-3, {"r": 256, "lora_alpha": 16, "sparsity": 0.03}),
    ("sltrain", "llama_350m"): (2e-3, {"r": 256, "lora_alpha": 16, "sparsity": 0.03}),
    ("relora", "llama_60m"): (1e-3, {"restart_every": 1000, "restart_warmup_steps": 100, "prune_ratio": 0.99}),
    ("relora", "llama_130m"): (1e-3, {"restart_every": 5000, "restart_warmup_steps": 100, "lora_alpha": 32}),
    ("relora", "llama_350m"): (5e-4, {"restart_every": 5000, "restart_warmup_steps": 200, "r": 256}),
}


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_published_settings(name, size):
    recipe = load_recipe(RECIPES / size / f"{name}.yaml")
    rate, settings = PUBLISHED[name, size]
    assert recipe.arguments("run").learning_rate == rate
    assert {key: getattr(recipe.settings, key) for key in settings} == settings


@pytest.mark.parametrize("name", NAMES)
def test_nano_recipes_build(name):
    recipe = load_recipe(RECIPES / "nano" / f"{name}.yaml")
    config = recipe.config(vocab_size=300)
    model = recipe.method.build_model(config, recipe.settings, recipe.seed)
    assert len(target_layers(model)) == 28
