"""ReLoRA's parts: merge, new factors, pruned moments, the schedule; against the definitions."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_lowrank.adapters import LowRankConfig, LowRankForCausalLM, ReLoraCallback, ReLoraScheduler
from hf_lowrank.adapters import merge_and_reinit as restart
from hf_lowrank.adapters.relora import factors, lora_layers, prune_moments, relora_lr_factor
from hf_lowrank.adapters.restarts import is_restart
from hf_lowrank.errors import UserError
from hf_lowrank.targets import target_modules


@pytest.fixture
def lora(stir):
    """A LoRA model with factors that are not zero; wrapped by PEFT, or standing alone."""

    def build(config, wrapped=False, **options):
        torch.manual_seed(0)
        adapter = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", **options)
        model = LowRankForCausalLM(LowRankConfig(base_config=config, adapter_config=adapter))
        if wrapped:
            plain = model.to_dense()
            names = list(target_modules(plain))
            model = get_peft_model(plain, LoraConfig(r=3, lora_alpha=6, target_modules=names, **options))
        return stir(model).eval()

    return build


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_merge_leaves_the_function_as_it_is(base_config, lora, ids, wrapped):
    model = lora(base_config, wrapped)
    before = logits(model, ids)
    bounds = {name: 1 / math.sqrt(layer.in_features) for name, layer in lora_layers(model).items()}
    restart(model, seed=0, step=10)
    after = logits(model, ids)
    assert torch.allclose(after, before, atol=2e-6)
    for name, layer in lora_layers(model).items():
        assert not layer.lora_B["default"].weight.any()
        A = layer.lora_A["default"].weight
        assert 0.5 * bounds[name] < A.abs().max() <= bounds[name]


def test_lora_on_stacked_experts_is_refused(architectures, dense):
    plain = dense(architectures["mixtral"]())
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    with pytest.raises(UserError, match=r"mlp\.experts: ReLoRA restarts LoRA on linear layers, got MixtralExperts"):
        restart(model, seed=0, step=0)


def test_new_factors_follow_from_seed_step_and_name_alone(llama_config, lora):
    def drawn(seed, step, wrapped=False):
        model = lora(llama_config, wrapped)
        torch.randn(3)
        restart(model, seed=seed, step=step)
        return {name: factor.detach() for name, factor in factors(model).items() if name.endswith(".A")}

    reference = drawn(0, 10)
    for same in (drawn(0, 10), drawn(0, 10, wrapped=True)):
        assert same.keys() == reference.keys()
        assert all(torch.equal(same[name], reference[name]) for name in reference)
    assert not any(torch.equal(drawn(0, 20)[name], reference[name]) for name in reference)
    assert not any(torch.equal(drawn(1, 10)[name], reference[name]) for name in reference)
    first, second = (reference[f"model.layers.{block}.self_attn.q_proj.A"] for block in (0, 1))
    assert not torch.equal(first, second)


def test_rank_grows_past_r_after_two_restarts(llama_config, lora, ids):
    model = lora(llama_config).train()
    starts = {name: layer.get_base_layer().weight.detach().clone() for name, layer in lora_layers(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def ranks():
        found = []
        for name, layer in lora_layers(model).items():
            weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
            found.append(torch.linalg.matrix_rank((weight - starts[name]).detach(), rtol=1e-5).item())
        return found

    for part in range(3):
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        assert all(rank == 3 * (part + 1) for rank in ranks())
        restart(model, seed=0, step=3 * (part + 1))


def test_half_precision_merges_are_summed_wide(llama_config, lora):
    model = lora(llama_config).to(torch.bfloat16)
    name, layer = next(iter(lora_layers(model).items()))
    W, A, B = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wanted = (W.double() + 2 * B.double() @ A.double()).to(torch.bfloat16)
    restart(model, seed=0, step=1)
    assert (wanted == W).float().mean() > 0.98, name


def adam_with_moments(shapes=((30, 20), (7,))):
    parameters = {str(i): nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes)}
    optimizer = torch.optim.AdamW(parameters.values(), amsgrad=True)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize(("mode", "ratio"), [("random", 0.9), ("magnitude", 0.9), ("zero", 0.5), ("random", 0.0)])
def test_pruning(mode, ratio):
    parameters, optimizer = adam_with_moments()
    kept_name, other = parameters.items()
    before = {key: value.clone() for key, value in optimizer.state[kept_name[1]].items()}
    untouched = {key: value.clone() for key, value in optimizer.state[other[1]].items()}
    prune_moments(optimizer, dict([kept_name]), mode=mode, ratio=ratio, seed=0, step=5)
    after = optimizer.state[kept_name[1]]
    kept = after["exp_avg"] != 0
    assert torch.equal(after["exp_avg_sq"] != 0, kept)  # all moments of an entry, or none
    assert torch.equal(after["max_exp_avg_sq"] != 0, kept)
    assert torch.equal(after["exp_avg"], before["exp_avg"] * kept)
    assert torch.equal(after["step"], before["step"])
    share = kept.float().mean().item()
    if mode == "magnitude":
        assert share == pytest.approx(0.1, abs=1e-6)
        assert before["exp_avg"].abs()[kept].min() >= before["exp_avg"].abs()[~kept].max()
    elif mode == "zero":
        assert share == 0
    else:
        assert share == pytest.approx(1 - ratio, abs=0.05)
    assert all(torch.equal(optimizer.state[other[1]][key], untouched[key]) for key in untouched)


def test_pruning_draws_the_same_again_and_another_at_another_step():
    def kept(step):
        torch.manual_seed(0)
        parameters, optimizer = adam_with_moments()
        prune_moments(optimizer, parameters, ratio=0.5, seed=0, step=step)
        return optimizer.state[parameters["0"]]["exp_avg"] != 0

    assert torch.equal(kept(5), kept(5))
    assert not torch.equal(kept(5), kept(6))


def test_pruning_before_the_first_step_is_harmless():
    parameter = nn.Parameter(torch.zeros(3))
    prune_moments(torch.optim.AdamW([parameter]), {"a": parameter})


def test_schedule_values():
    """By the definition: warm-up 10, restarts every 40, ramps of 5, 200 steps, down to 0.1."""
    options = {"num_training_steps": 200, "warmup_steps": 10, "restart_every": 40, "restart_warmup_steps": 5}

    def cosine(step):
        return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 190)) / 2

    wanted = {0: 0.0, 5: 0.5, 10: 1.0, 11: cosine(11), 39: cosine(39), 40: 0.0, 42: 0.4 * cosine(45), 45: cosine(45)}
    wanted |= {79: cosine(79), 80: 0.0, 81: 0.2 * cosine(85), 84: 0.8 * cosine(85), 85: cosine(85), 200: 0.0}
    wanted |= {199: cosine(199)}
    for step, value in wanted.items():
        assert relora_lr_factor(step, **options, min_lr_ratio=0.1) == pytest.approx(value, abs=1e-12), step
    assert relora_lr_factor(200, **{**options, "restart_every": 300}) == pytest.approx(0.1)


def test_scheduler_follows_the_definition_and_resumes():
    def fresh():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        options = {"num_training_steps": 60, "warmup_steps": 4, "restart_every": 20, "restart_warmup_steps": 3}
        return optimizer, ReLoraScheduler(optimizer, **options), options

    optimizer, scheduler, options = fresh()
    seen = []
    for step in range(60):
        seen.append(optimizer.param_groups[0]["lr"])
        assert seen[-1] == pytest.approx(0.3 * relora_lr_factor(step, **options))
        if step == 20:
            state = scheduler.state_dict()
        optimizer.step()
        scheduler.step()
    assert all(isinstance(value, int | float | bool | list | None) for value in state.values())
    optimizer, scheduler, _ = fresh()
    scheduler.load_state_dict(state)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == seen[21]


def test_warm_starts_shift_restarts_and_ramp_at_the_change():
    assert [step for step in range(1, 60) if is_restart(step, 10, 25)] == [35, 45, 55]
    assert [step for step in range(1, 31) if is_restart(step, 10)] == [10, 20, 30]
    options = {"num_training_steps": 100, "warmup_steps": 5, "restart_every": 10, "restart_warmup_steps": 2}
    at = {step: relora_lr_factor(step, **options, first_restart=25) for step in range(60)}
    assert [step for step in at if at[step] == 0] == [0, 25, 35, 45, 55]
    assert at[10] > 0.9


def trainer(model, folder):
    arguments = TrainingArguments(
        folder, max_steps=4, save_steps=4, learning_rate=0.05, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, logging_steps=100, lr_scheduler_type="constant",
    )  # fmt: skip
    ids = torch.arange(12).view(2, 6)
    data = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model, arguments, train_dataset=data, callbacks=[ReLoraCallback(restart_every=2)])


def test_a_model_whose_merged_weights_would_not_be_saved_is_refused(tiny_llama, tmp_path):
    wrapped = get_peft_model(copy.deepcopy(tiny_llama), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with pytest.raises(UserError, match=r"of which it saves the adapter alone.*LowRankForCausalLM\.from_dense"):
        trainer(wrapped, tmp_path / "wrapped")
    added = copy.deepcopy(tiny_llama)
    added.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="of which it saves the adapter alone"):
        trainer(added, tmp_path / "added")
    # What the message names keeps them.
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    model = LowRankForCausalLM.from_dense(copy.deepcopy(tiny_llama), config)
    start = [layer.get_base_layer().weight.clone() for layer in lora_layers(model).values()]
    trainer(model, tmp_path / "run").train()
    after = [layer.get_base_layer().weight for layer in lora_layers(model).values()]
    assert not any(map(torch.equal, start, after))
    read = LowRankForCausalLM.from_pretrained(tmp_path / "run/checkpoint-4")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(logits(read.eval(), ids), logits(model.eval(), ids))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ReLoraCallback(restart_every=0),
            r"restart_every of ReLoraCallback must be .* at least 1, got 0",
        ),
        (
            lambda: ReLoraCallback(restart_every=5, pruning="some"),
            r"pruning of .* must be one of random, magnitude, zero",
        ),
        (
            lambda: ReLoraCallback(restart_every=5, prune_ratio=1.5),
            r"prune_ratio of .* must be a number in \[0, 1\], got 1.5",
        ),
        (
            lambda: ReLoraCallback(restart_every=5, warm_start_steps=-1),
            r"warm_start_steps of .* at least 0, got -1",
        ),
        (lambda: scheduler(restart_every=0), r"restart_every of ReLoraScheduler must be an integer of at least 1"),
        (
            lambda: scheduler(restart_warmup_steps=11),
            r"restart_warmup_steps must be at most restart_every = 10, got 11",
        ),
        (lambda: scheduler(min_lr_ratio=2), r"min_lr_ratio of ReLoraScheduler must be a number in \[0, 1\], got 2"),
        (lambda: scheduler(warmup_steps=11), r"the first restart must not precede the warm-up's end at 11, got 10"),
        (lambda: restart(nn.Linear(2, 2), seed=0, step=0), r"needs a model with LoRA layers, got Linear without any"),
        (lambda: prune_moments(None, {}, mode="half"), r"pruning of prune_moments must be one of"),
        (lambda: prune_moments(None, {}, ratio=-1), r"prune_ratio of prune_moments must be a number in \[0, 1\]"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(UserError, match=message):
        make()


def scheduler(**options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    return ReLoraScheduler(
        optimizer, **{"num_training_steps": 100, "restart_every": 10, "restart_warmup_steps": 2, **options}
    )
