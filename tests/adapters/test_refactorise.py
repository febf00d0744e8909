"""Refactorised low rank with momentum reset: against numpy, through the callback and the schedule, under Trainer."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler

from hf_lowrank.adapters import CoLAConfig, LowRankConfig, LowRankForCausalLM, SLTrainConfig, target_layers
from hf_lowrank.adapters.functional import balanced_factors
from hf_lowrank.adapters.refactorise import RefactoriseCallback, refactorise
from hf_lowrank.adapters.restarts import recovery_factor, reset_state
from hf_lowrank.errors import UserError
from hf_lowrank.methods import METHODS
from hf_lowrank.training import load_recipe
from tests.adapters.test_adapter_methods import RECIPES
from tests.adapters.test_adapter_training import exit_of, forked, in_two_processes, same, train, weights

NAMES = ("low_rank", "sltrain")
EVERY, RECOVERY = 3, 2


@pytest.mark.parametrize(("out", "fan_in", "r"), [(40, 12, 5), (12, 40, 5), (16, 16, 16)])
def test_balanced_factors_are_those_of_the_svd_of_the_product(out, fan_in, r):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(r, fan_in, generator=generator, dtype=torch.float64)
    B = torch.randn(out, r, generator=generator, dtype=torch.float64)
    new_A, new_B = balanced_factors(A, B)
    product = B.numpy() @ A.numpy()
    u, sigma, vt = np.linalg.svd(product)
    np.testing.assert_allclose(new_B.numpy() @ new_A.numpy(), product, rtol=1e-9, atol=1e-9)
    for own, vectors in ((new_B.numpy().T, u.T[:r]), (new_A.numpy(), vt[:r])):
        signs = np.sign((own * vectors).sum(1, keepdims=True))
        np.testing.assert_allclose(own, signs * np.sqrt(sigma[:r, None]) * vectors, rtol=1e-9, atol=1e-9)
    peaks = np.take_along_axis(new_B.numpy(), np.abs(new_B.numpy()).argmax(0, keepdims=True), 0)
    assert (peaks > 0).all()


def test_the_product_is_never_formed(monkeypatch):
    """No tensor of the weight's size appears, whatever its rank."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, tuple | list) else [found]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return found

    with Watch():
        balanced_factors(torch.randn(4, 100), torch.randn(90, 4))
    assert 0 < largest <= 4 * 100


@pytest.mark.parametrize("adapter", [CoLAConfig(r=4, bottleneck_act="linear"), SLTrainConfig(r=4, sparsity=0.1)])
def test_the_function_stays_and_sparse_values_too(base_config, adapter, stir, ids):
    torch.manual_seed(0)
    model = stir(LowRankForCausalLM(LowRankConfig(base_config=base_config, adapter_config=adapter))).eval()
    before = model(input_ids=ids).logits
    kept = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if "_A" not in name and "_B" not in name
    }
    starts = {name: layer.factors()[0].clone() for name, layer in target_layers(model).items()}
    refactorise(model)
    assert torch.allclose(model(input_ids=ids).logits, before, atol=2e-5)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    for name, layer in target_layers(model).items():
        A, B = layer.factors()
        assert not torch.equal(A, starts[name])
        torch.testing.assert_close(A @ A.T, B.T @ B, atol=1e-4, rtol=1e-3)  # both are diag(S)


def test_the_recovery_by_its_definition():
    found = [recovery_factor(step, restart_every=20, recovery_steps=10, floor=1e-3) for step in range(65)]
    for step, factor in enumerate(found):
        since = step % 20
        expected = 1e-3 + (1 - 1e-3) * since / 10 if step >= 20 and since <= 10 else 1.0
        assert factor == pytest.approx(expected, abs=1e-15), step
    assert found[20] == found[40] == found[60] == 1e-3  # 20 does not divide 65


def test_the_schedule_is_trainers_times_the_recovery(tmp_path):
    args = TrainingArguments(
        str(tmp_path), lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1},
        learning_rate=0.3, warmup_steps=5, use_cpu=True,
    )  # fmt: skip
    method = METHODS["low_rank"]

    def rates(make):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler, seen = make(optimizer), []
        for _ in range(50):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    plain = rates(
        lambda optimizer: get_scheduler(
            "cosine_with_min_lr",
            optimizer,
            num_warmup_steps=5,
            num_training_steps=50,
            scheduler_specific_kwargs={"min_lr_rate": 0.1},
        )
    )
    settings = method.settings(refactorise_every=20)
    own = rates(lambda optimizer: method.build_scheduler(optimizer, settings, args, 50))
    for step, (rate, usual) in enumerate(zip(own, plain, strict=True)):
        since = step % 20
        share = 1e-3 + 0.999 * since / 10 if step >= 20 and since < 10 else 1.0
        assert rate == pytest.approx(usual * share, rel=1e-12), step
    assert method.build_scheduler(None, method.settings(), args, 50) is None


def test_a_reset_makes_the_next_step_of_adam_the_first():
    parameters = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    gradients = [torch.randn(4, 3) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, amsgrad=True)

    def step(one):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        one.step()

    for _ in range(3):
        step(optimizer)
    before = [parameter.detach().clone() for parameter in parameters]
    reset_state(optimizer)
    step(optimizer)
    after = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    step(torch.optim.AdamW(parameters, lr=0.1, amsgrad=True))
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, after, strict=True))


def test_three_steps_a_restart_and_three_more_in_numpy():
    """The whole method on W = B A for the loss ½‖W − T‖², in float64."""
    rng = np.random.default_rng(0)
    target, A, B = rng.normal(size=(7, 6)), rng.normal(size=(2, 6)), rng.normal(size=(7, 2))
    own = {"A": nn.Parameter(torch.tensor(A)), "B": nn.Parameter(torch.tensor(B))}
    optimizer = torch.optim.AdamW(own.values(), lr=0.05, eps=1e-6, weight_decay=0.1)
    numbers, moments, age = {"A": A, "B": B}, {}, 0
    for step in range(1, 7):
        error = own["B"] @ own["A"] - torch.tensor(target)
        optimizer.zero_grad()
        (0.5 * (error**2).sum()).backward()
        rate = 0.05 * recovery_factor(step - 1, restart_every=3, recovery_steps=2, floor=1e-3)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        wrong = numbers["B"] @ numbers["A"] - target
        gradients = {"A": numbers["B"].T @ wrong, "B": wrong @ numbers["A"].T}
        age += 1
        for key, gradient in gradients.items():
            m, v = moments.get(key, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            moments[key] = m, v
            direction = (m / (1 - 0.9**age)) / (np.sqrt(v / (1 - 0.999**age)) + 1e-6)
            numbers[key] = numbers[key] * (1 - rate * 0.1) - rate * direction
        if step == 3:
            with torch.no_grad():
                for key, value in zip(("A", "B"), balanced_factors(own["A"], own["B"]), strict=True):
                    own[key].copy_(value)
            reset_state(optimizer)
            u, sigma, vt = np.linalg.svd(numbers["B"] @ numbers["A"])
            # The sign of a singular vector is free, and Adam treats both alike.
            signs = np.sign((own["A"].detach().numpy() * vt[:2]).sum(1))
            numbers = {
                "A": signs[:, None] * np.sqrt(sigma[:2, None]) * vt[:2],
                "B": u[:, :2] * np.sqrt(sigma[:2]) * signs,
            }
            moments, age = {}, 0
        for key, value in numbers.items():
            np.testing.assert_allclose(own[key].detach().numpy(), value, rtol=1e-9, atol=1e-9)


# -- under Trainer


@pytest.fixture(scope="module", params=NAMES)
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    train(str(folder), 8, request.param, refactorise_every=EVERY, recovery_steps=RECOVERY)
    return request.param, folder


def test_restarts_are_logged_the_rate_recovers_and_all_state_is_new(uninterrupted):
    _, folder = uninterrupted
    history = json.loads((folder / "checkpoint-8/trainer_state.json").read_text())["log_history"]
    assert [(e["step"], e["refactorisations"]) for e in history if "refactorisations" in e] == [(3, 1), (6, 2)]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    plain = [0.0, *(1e-2 * (8 - step) / 7 for step in range(1, 8))]
    shares = [1, 1, 1, 1e-3, 0.5005, 1, 1e-3, 0.5005]
    assert rates == pytest.approx([rate * share for rate, share in zip(plain, shares, strict=True)])
    for step, age in ((2, 2), (3, 0), (5, 2), (6, 0)):
        state = torch.load(folder / f"checkpoint-{step}/optimizer.pt", weights_only=True)["state"]
        assert {float(entry["step"]) for entry in state.values()} == {age}
        assert any(entry["exp_avg"].any() for entry in state.values()) == (age > 0)


@pytest.mark.parametrize(
    ("kill", "moment"),
    [(2, "save"), (3, "save"), (4, "save"), (5, "step")],
    ids=["before", "at", "recovering", "after"],
)
def test_resume_after_sigkill_is_bit_exact(uninterrupted, tmp_path, kill, moment):
    name, whole = uninterrupted
    own = {"refactorise_every": EVERY, "recovery_steps": RECOVERY}
    assert exit_of(forked(lambda: train(str(tmp_path), 8, name, kill=kill, moment=moment, **own))) == -9
    train(str(tmp_path), 8, name, resume=str(tmp_path / f"checkpoint-{kill}"), **own)
    assert same(weights(tmp_path, 8), weights(whole, 8))


def test_two_processes_agree_bit_for_bit_and_with_one(uninterrupted, tmp_path):
    name, whole = uninterrupted
    first, second = in_two_processes(tmp_path, name=name, refactorise_every=EVERY, recovery_steps=RECOVERY)
    assert same(first, second)
    assert all(torch.allclose(first[key], tensor, atol=5e-5) for key, tensor in weights(whole, 8).items())


def test_without_the_setting_nothing_changes(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    for name in NAMES:
        method = METHODS[name]
        assert not method.callbacks(method.settings(), args)
        adapter = method.settings(r=2, refactorise_every=5).adapter_config(0)
        assert adapter == method.settings(r=2).adapter_config(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RefactoriseCallback(refactorise_every=-1), r"refactorise_every of .* at least 0, got -1"),
        (lambda: RefactoriseCallback(refactorise_every=0), r"refactorise_every of .* at least 1, got 0"),
        (lambda: refactorise(nn.Linear(2, 2)), r"low-rank or SLTrain layers, Linear has none"),
        (lambda: reset_state(stepped(torch.optim.SGD, momentum=0.9)), r"SGD also has 'momentum_buffer'; leave out"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_non_linear_layer_is_refused(llama_config):
    model = LowRankForCausalLM(LowRankConfig(base_config=llama_config, adapter_config=CoLAConfig(r=4)))
    with pytest.raises(UserError, match="LowRankForCausalLM has CoLA layers with a non-linearity"):
        refactorise(model)


def stepped(kind, **options):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = kind([parameter], lr=1.0, **options)
    parameter.grad = torch.ones(2)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.refactorise_every=5"], r"method\.recovery_steps must be at most refactorise_every = 5, got 10"),
        (["method.refactorise_every=-5"], r"method\.refactorise_every: input should be greater than or equal to 0"),
        (["method.recover_steps=1"], r"unknown key 'method\.recover_steps'; did you mean 'recovery_steps'"),
    ],
)
def test_bad_recipes(overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe(RECIPES / "nano/sltrain.yaml", overrides)


@pytest.mark.parametrize(("name", "options"), [("low_rank", {"refactorise_every": 20}), ("sst", {})])
def test_a_schedule_that_is_no_function_of_the_step_is_refused(tmp_path, name, options):
    args = TrainingArguments(
        str(tmp_path), lr_scheduler_type="reduce_lr_on_plateau", use_cpu=True, eval_strategy="steps"
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError, match=r"training\.lr_scheduler_type must be a function of the step, got .*plateau"):
        METHODS[name].build_scheduler(optimizer, METHODS[name].settings(**options), args, 50)
