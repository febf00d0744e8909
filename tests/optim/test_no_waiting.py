"""On an accelerator no step makes the host wait for a value, or grows with the number of matrices.

Fake tensors refuse to give a value. The way that steps take on an accelerator is also taken with real ones on the CPU,
where its numbers are compared with those of the way that reads.
"""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from hf_lowrank.compat import FakeTensorMode, TorchDispatchMode
from hf_lowrank.optim import adam, batch
from tests.optim.test_conformance import (
    METHOD_CASES,
    ORTHOGONAL,
    REFRESHED,
    every_method,
    in_full_precision,
    loss_of,
    make,
    net,
    of_targets,
    train,
    weights,
)

TENSOR_RATES = pytest.mark.parametrize("tensor_rate", [False, True], ids=["number", "tensor"])


DEVICE = "cuda"


class Arrival:
    """What an event says, where there is no device."""

    asked = 0

    def __init__(self, device):
        assert torch.device(device).type == DEVICE

    def record(self, stream):
        pass

    def synchronize(self):
        Arrival.asked += 1


@pytest.fixture
def waits_nowhere(monkeypatch):
    """The way of an accelerator, also on the CPU."""
    monkeypatch.setattr(adam, "HOST_READS", frozenset())
    monkeypatch.setattr(torch, "Event", Arrival)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)


def blocks(count, device=DEVICE):
    """The named parameters of `count` blocks of two shapes, with norms, between an embedding and a head."""
    shapes = {f"{i}.{name}": shape for i in range(count) for name, shape in
              {"q": (16, 16), "up": (24, 16), "down": (16, 24), "norm": (16,)}.items()}  # fmt: skip
    shapes = {"embedding": (50, 16), **shapes, "head": (50, 16)}
    return {name: nn.Parameter(torch.empty(shape, device=device)) for name, shape in shapes.items()}


def optimizer_of(name, params, **options):
    targets, others = of_targets(name, 3), {"muon": False} if name in ORTHOGONAL else {"rank": None}
    matrices = [(key, param) for key, param in params.items() if param.shape[0] < 50 and param.ndim == 2]
    rest = [(key, param) for key, param in params.items() if param.shape[0] == 50 or param.ndim == 1]
    return make(name, [{"params": matrices, **targets}, {"params": rest, **others}], **options)


def step(optimizer, params):
    for param in params.values():
        param.grad = torch.empty_like(param)
    optimizer.step()


@TENSOR_RATES
@every_method
def test_no_step_reads_a_value(name, tensor_rate, waits_nowhere, monkeypatch):
    with FakeTensorMode():
        params = blocks(2)
        optimizer = optimizer_of(name, params, lr=1e-2)
        if tensor_rate:
            # The fused kernel has no fake for a rate that is a tensor.
            monkeypatch.setattr(adam, "fused_adamw_", lambda *args, **options: None)
            for group in optimizer.param_groups:
                group["lr"] = torch.empty((), device=DEVICE)
        for _ in range(9):  # refreshes at 0, 4 and 8 or spread over the steps, first choices offered again at 1 and 2
            step(optimizer, params)
    assert {state["step"] for state in optimizer.state.values()} == {9}
    if name in REFRESHED:
        assert {state["refreshes"] for state in optimizer.state.values() if "refreshes" in state} >= {3}


@pytest.mark.parametrize("name", ["galore-randomized", "frugal"])
def test_the_test_would_notice(name, monkeypatch):
    monkeypatch.setattr(adam, "HOST_READS", frozenset({DEVICE}))
    with FakeTensorMode():
        params = blocks(2)
        optimizer = optimizer_of(name, params)
        with pytest.raises(DataDependentOutputException):
            step(optimizer, params)


class Counter(TorchDispatchMode):
    """Counts operations, views too, but not a fake tensor's questions for its device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is not torch.ops.prim.device.default
        return func(*args, **(kwargs or {}))


def operations(name, count, **options):
    """Of a plain step, and of one that refreshes every matrix."""
    with FakeTensorMode():
        params = blocks(count)
        optimizer = optimizer_of(name, params, **options)
        for param in params.values():
            param.grad = torch.empty_like(param)
        found = []
        for number in range(9):
            with Counter() as counter:
                optimizer.step()
            if number in (6, 8):
                found.append(counter.count)
    return found


@every_method
def test_operations_do_not_grow_with_the_number_of_matrices(name, waits_nowhere):
    options = {"moments": "keep", "stagger": False} if name in REFRESHED else {}
    few, many = operations(name, 8, **options), operations(name, 24, **options)
    assert many[0] <= 1.2 * few[0], "plain"
    assert many[1] <= 1.2 * few[1], "refresh"


def trained(name, dtype=torch.float64, steps=10, spoil=None, **options):
    model = net(dtype)
    optimizer = make(name, model, **in_full_precision(name), **options)
    for number in range(steps):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        if spoil:
            spoil(model, number)
        optimizer.step()
    return model, optimizer


@every_method
@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": "float32", "stochastic_rounding": True}], ids=["plain", "rounding"]
)
def test_both_ways_give_the_same_numbers(name, options, monkeypatch):
    dtype = torch.bfloat16 if options else torch.float64
    one, _ = trained(name, dtype, **options)
    monkeypatch.setattr(adam, "HOST_READS", frozenset())
    other, _ = trained(name, dtype, **options)
    bound = 1e-2 if options else 1e-9
    assert torch.allclose(weights(one), weights(other), rtol=bound, atol=bound)


@pytest.mark.parametrize("name", ["galore-lazy", "q-galore"])
def test_intervals_that_are_decided_later_are_the_same(name, monkeypatch):
    """The host reads cosines when it needs them, at the next refresh; also from a state that was saved between."""

    def run(stops=()):
        model = net(torch.float64)
        # In eight bits a last bit that differs is a step of the codes.
        options = {"update_proj_gap": 1, "rank": 3, **in_full_precision(name)}
        optimizer = make(name, model, **options)
        steady = [torch.randn(param.shape, dtype=param.dtype) for param in model.parameters()]
        for number in range(30):
            if number in stops:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = make(name, model, **options)
                optimizer.load_state_dict(saved)
            generator = torch.Generator().manual_seed(number)
            for param, each in zip(model.parameters(), steady, strict=True):
                param.grad = 5 * each + torch.randn(param.shape, generator=generator, dtype=param.dtype)
            optimizer.step()
        refreshes = [state["refreshes"] for state in optimizer.state.values() if "refreshes" in state]
        assert min(refreshes) < 15
        return weights(model), refreshes

    torch.manual_seed(0)
    at_once, refreshes = run()
    monkeypatch.setattr(adam, "HOST_READS", frozenset())
    for stops in ((), (6, 7, 11, 23)):
        torch.manual_seed(0)
        later, again = run(stops)
        assert torch.allclose(at_once, later, rtol=1e-9, atol=1e-9)
        assert refreshes == again


@every_method
def test_a_rate_that_is_a_tensor_gives_the_same_numbers(name, waits_nowhere):
    one, _ = trained(name, lr=1e-2)
    other, _ = trained(name, lr=torch.tensor(1e-2, dtype=torch.float64))
    assert torch.allclose(weights(one), weights(other), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "frugal-svd", "galore-full"])
def test_large_parameters_are_not_stacked_and_heed_flags_too(name, waits_nowhere, monkeypatch):
    def spoil(model, number):
        if number == 5:
            model.layers[1].weight.grad[2, 2] = model.layers[0].bias.grad[0] = math.nan

    stacked, _ = trained(name, spoil=spoil)
    monkeypatch.setattr(batch, "ON_CPU", batch.BatchLimits(0, 2**23))
    monkeypatch.setattr(adam, "MOST_STACKED", 0)
    single, _ = trained(name, spoil=spoil)
    assert torch.allclose(weights(stacked), weights(single), rtol=1e-9, atol=1e-11)


def test_a_step_count_that_is_a_tensor_is_taken():
    model, optimizer = trained("galore", steps=3)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = torch.tensor(float(state["step"]))
    optimizer.load_state_dict(saved)
    assert {state["step"] for state in optimizer.state.values()} == {3}
    train(model, optimizer, 1, start=3)


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("when", [0, 4, 6], ids=["first", "refresh", "plain"])
def test_a_non_finite_gradient_changes_nothing_where_nobody_looks(name, value, when, waits_nowhere):
    """Of one matrix and of one bias; what the others do is what they do without it."""
    kept = {}

    def spoil(model, number):
        hit = {key: param for key, param in model.named_parameters() if key in ("layers.1.weight", "layers.0.bias")}
        if number == when:
            for key, param in hit.items():
                param.grad.view(-1)[3] = value
                kept[key] = param.detach().clone()
        if number == when + 1:
            for key, param in hit.items():
                assert torch.equal(param, kept[key]), key

    def absent(model, number):
        if number == when:
            model.layers[1].weight.grad = model.layers[0].bias.grad = None

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer = trained(name, steps=when + 1, spoil=spoil)
        spoil(model, when + 1)
    other, _ = trained(name, steps=when + 1, spoil=absent)
    for (key, param), witness in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(param, witness, rtol=1e-9, atol=1e-11), key
    for param in (model.layers[1].weight, model.layers[0].bias):
        for key, tensor in optimizer.state[param].items():
            assert not torch.is_tensor(tensor) or tensor.isnan().sum() == 0, key
    assert optimizer.skipped_steps()["layers.1.weight"] == 1
    with pytest.warns(UserWarning, match=r"the gradient of .*layers\.1\.weight.* is not finite"):
        assert optimizer.skipped == {"layers.1.weight", "layers.0.bias"}
    train(model, optimizer, 9 - when, start=when + 1)
    assert weights(model).isfinite().all()
    if when == 0:  # a basis was chosen at the next step
        assert not torch.equal(model.layers[1].weight, kept["layers.1.weight"])


@pytest.mark.parametrize("name", ["galore", "galore-randomized", "fira", "galore-full-fast"])
def test_a_first_choice_that_found_nothing_is_made_again(name, waits_nowhere):
    """Zero gradients at the first two steps, as before a last layer that starts from zero has moved."""

    def silent(model, number):
        if number < 2:
            model.layers[1].weight.grad.zero_()

    model, optimizer = trained(name, steps=3, spoil=silent, update_proj_gap=100)
    basis = optimizer.state[model.layers[1].weight]["basis"]
    assert torch.allclose(basis.mT @ basis, torch.eye(3, dtype=basis.dtype), atol=1e-9)
    others = optimizer.state[model.layers[0].weight]["basis"].clone()
    train(model, optimizer, 6, start=3)
    assert torch.equal(optimizer.state[model.layers[0].weight]["basis"], others)
    assert torch.equal(optimizer.state[model.layers[1].weight]["basis"], basis)


@TENSOR_RATES
def test_saving_warns_of_skipped_steps(waits_nowhere, tensor_rate):
    model, optimizer = trained("galore", steps=1)
    loss_of(model, 1).backward()
    model.layers[2].weight.grad[0, 0] = math.nan
    optimizer.step()
    with pytest.warns(UserWarning, match=r"layers\.2\.weight is not finite"):
        optimizer.state_dict()


def test_every_case_is_one_that_heeds_flags():
    for name in METHOD_CASES:
        kind = getattr(METHOD_CASES[name], "func", METHOD_CASES[name])
        assert kind.heeds_flags
