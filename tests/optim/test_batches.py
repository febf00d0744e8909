"""Matrices are stepped in batches, and a step depends on parameters, gradients and state alone."""

import copy
import gc
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hf_lowrank.optim import GaLoreAdamW, batch, param_groups
from tests.optim.test_conformance import METHOD_CASES, PROJECTED, make, net

every_projection = pytest.mark.parametrize("name", PROJECTED)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    model(torch.randn(5, 12, generator=generator).to(dtype)).square().sum().backward()


def nothing(model, optimizer, step):
    pass


def other_rate(model, optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / step
        group["weight_decay"] = 0.1 * step


def a_layer_idle(model, optimizer, step):
    if step in (6, 7):
        model.layers[1].weight.grad = None


def a_gradient_that_is_infinite(model, optimizer, step):
    if step == 6:
        model.layers[2].weight.grad[0, 0] = torch.inf


def other_tensors(model, optimizer, step):
    if step == 6:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if step == 7:
        for param in model.parameters():
            param.data = param.data.clone()
    if step == 8:
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].clone()


def in_two_types(model, optimizer, step):
    if step == 6:
        model.to(torch.float64)
        optimizer.load_state_dict(optimizer.state_dict())
        backward(model, step)


def another_group(model, optimizer, step):
    if step == 6:
        optimizer.add_param_group({"params": [("extra", model.extra)], "rank": None})
        model.extra.grad = torch.ones_like(model.extra)


def another_state(model, optimizer, step):
    if step == 6:
        for param, state in list(optimizer.state.items()):
            optimizer.state[param] = dict(state)
    if step == 8:
        optimizer.state.pop(model.layers[1].weight)
    if step == 10:
        optimizer.state.clear()


def tensors_moved_under_their_state(model, optimizer, step):
    if step in (6, 9):
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.data = value.data.clone()


def other_groups(model, optimizer, step):
    if step == 6:
        optimizer.param_groups = [{**group, "lr": 1e-4} for group in optimizer.param_groups]


def of_other_ages(model, optimizer, step):
    if step == 6:
        state = optimizer.state[model.layers[1].weight]
        state["step"] = state.get("reset_at", 0) + 1
    if step == 8:
        vector = next(param for param in model.parameters() if param.ndim == 1 and optimizer.state[param])
        optimizer.state[vector]["step"] = 2


def refreshed_by_hand(model, optimizer, step):
    if step == 6:
        optimizer.state[model.layers[1].weight]["refreshes"] = 0


def staggered(model, optimizer, step):
    if step == 6:
        for group in optimizer.param_groups:
            group["stagger"] = True


EVENTS = [
    nothing,
    other_rate,
    a_layer_idle,
    a_gradient_that_is_infinite,
    other_tensors,
    in_two_types,
    another_group,
    another_state,
    tensors_moved_under_their_state,
    other_groups,
    of_other_ages,
    refreshed_by_hand,
    staggered,
]


def renewed(optimizer):
    """Another optimizer of the same parameters, groups and state, which has made no step."""
    other = type(optimizer).__new__(type(optimizer))
    other.__setstate__(optimizer.__getstate__())
    return other


def trained(name, event, dtype=torch.float32, renew=False, **options):
    model = net(dtype)
    model.extra = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    params = [(key, param) for key, param in model.named_parameters() if key != "extra"]
    matrices = [(key, param) for key, param in params if param.ndim == 2]
    rank = {"rank": 1 if name == "apollo-mini" else 3}
    rest = [(key, param) for key, param in params if param.ndim != 2]
    optimizer = make(name, [{"params": matrices, **rank}, {"params": rest, "rank": None}], **options)
    for step in range(1, 13):
        backward(model, step)
        event(model, optimizer, step)
        if renew:
            optimizer = renewed(optimizer)
        optimizer.step()
    return [param.detach() for param in model.parameters()]


@every_dtype
@every_projection
def test_what_an_optimizer_remembers_besides_its_state_changes_no_bit(name, dtype):
    for one, other in zip(trained(name, nothing, dtype), trained(name, nothing, dtype, renew=True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:the gradient of")
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "frugal"])
def test_what_changes_between_steps_is_noticed(name, event):
    for one, other in zip(trained(name, event), trained(name, event, renew=True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("state_dtype", ["float32", "parameter"])
def test_moments_of_another_type(state_dtype):
    options = {"dtype": torch.bfloat16, "state_dtype": state_dtype}
    for one, other in zip(
        trained("fira", nothing, **options), trained("fira", nothing, renew=True, **options), strict=True
    ):
        assert torch.equal(one, other)


@every_projection
def test_stacked_and_single_matrices_are_stepped_equally(name, monkeypatch):
    stacked = trained(name, nothing, torch.float64)
    monkeypatch.setattr(batch, "ON_CPU", batch.BatchLimits(0, 2**23))
    for one, other in zip(stacked, trained(name, nothing, torch.float64), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


def test_neither_gradients_nor_parameters_are_kept_alive():
    model = net()
    optimizer = GaLoreAdamW(param_groups(model, rank=3))
    for step in range(5):
        backward(model, step)
        optimizer.step()
    grad, param = weakref.ref(model.layers[0].weight.grad), weakref.ref(model.layers[0].weight)
    model.zero_grad()
    assert grad() is None
    gc.disable()
    try:
        del model, optimizer
        assert param() is None
    finally:
        gc.enable()


def test_state_and_weights_that_were_replaced_are_not_kept_alive():
    model = net()
    optimizer = GaLoreAdamW(param_groups(model, rank=3))
    for step in range(1, 5):
        backward(model, step)
        optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    kept = [StorageWeakRef(each.untyped_storage()) for each in [*tensors, *(p.data for p in model.parameters())]]
    assert len(kept) > 10
    del tensors
    optimizer.state.clear()
    for param in model.parameters():
        param.data = torch.empty(0)
    assert all(each.expired() for each in kept)


def test_eight_bits_and_stochastic_rounding_depend_on_the_state_alone():
    options = {"dtype": torch.bfloat16, "state_dtype": "float32", "stochastic_rounding": True}
    for one, other in zip(
        trained("galore", nothing, **options), trained("galore", nothing, renew=True, **options), strict=True
    ):
        assert torch.equal(one, other)
    pytest.importorskip("torchao")
    finals = []
    for renew in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
        groups = param_groups(model, rank=32, target_modules="all-linear")
        optimizer = GaLoreAdamW(groups, state_dtype="8bit", update_proj_gap=5)
        for step in range(8):
            model.zero_grad()
            model(torch.randn(4, 64, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            if renew:
                optimizer = renewed(optimizer)
            optimizer.step()
        assert any(state["exp_avg"].dtype == torch.uint8 for state in optimizer.state.values())
        finals.append([param.detach() for param in model.parameters()])
    assert all(map(torch.equal, *finals))


def test_a_batch_above_the_limit_is_not_copied_into_one_stack(monkeypatch):
    experts = torch.nn.Parameter(torch.randn(4, 8, 6))
    optimizer = GaLoreAdamW([{"params": [experts], "rank": 2}])
    seen = []
    update = GaLoreAdamW.update
    monkeypatch.setattr(GaLoreAdamW, "update", lambda self, b: (seen.append(b.stacks), update(self, b)))
    for limit in (4 * 48, 4 * 48 - 1):
        monkeypatch.setattr(batch, "ON_CPU", batch.BatchLimits(48, limit))
        experts.grad = torch.randn_like(experts)
        optimizer.step()
    assert seen == [True, False]


@pytest.mark.parametrize("name", METHOD_CASES)
def test_equal_matrices_share_a_batch(name, monkeypatch):
    model = net()
    optimizer = make(name, model)
    batches = []
    update = type(optimizer).update
    monkeypatch.setattr(type(optimizer), "update", lambda self, b: (batches.append(b), update(self, b)))
    for step in range(1, 4):
        backward(model, step)
        optimizer.step()
    shapes = [{tuple(weight.shape) for weight in each.weights} for each in batches]
    assert all(len(of_one) == 1 for of_one in shapes)
    sizes = [len(each.weights) for each in batches]
    assert sum(sizes) == 4 * 3
    assert max(sizes) == 2
