"""What torch's generic suite asks of every optimizer, written anew for every optimizer of the table of methods."""

import copy
import io
import math
import pickle
import warnings
from functools import cache

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainingArguments

from hf_lowrank import METHODS
from hf_lowrank.errors import UserError
from hf_lowrank.optim import FrugalAdamW, GaLoreAdamW
from tests.optim.test_conformance import loss_of, net, train, weights

RATE, DECAY = 1e-2, 0.05
# The baseline's optimizer is torch's own: it tells that a case asks for nothing that torch does not do.
OPTIMIZERS = [name for name, method in METHODS.items() if method.kind in ("baseline", "optimizer")]
OURS = [name for name in OPTIMIZERS if METHODS[name].kind == "optimizer"]
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_optimizer_of_ours = pytest.mark.parametrize("name", OURS)


@cache
def arguments():
    return TrainingArguments(
        output_dir="unused", learning_rate=RATE, weight_decay=DECAY, max_grad_norm=0.0, use_cpu=True
    )


def build(name, model, **options):
    """The method's optimizer, as a recipe gets it, for small matrices and a refresh at every third step."""
    settings = METHODS[name].settings
    small = {"rank": 3, "update_proj_gap": 3, "matrix_lr_scale": 0.5}
    chosen = {key: value for key, value in small.items() if key in settings.model_fields}
    if name == "apollo_mini":
        del chosen["rank"]
    return METHODS[name].optimizer(model, settings(**chosen, **options), arguments())


def trained(name, steps=4, **options):
    model = net()
    optimizer = build(name, model, **options)
    train(model, optimizer, steps)
    return model, optimizer


def restored(name, model, saved):
    optimizer = build(name, model)
    optimizer.load_state_dict(saved)
    return optimizer


def with_names(optimizer, model):
    """An optimizer of the same class and groups, with the names of its parameters."""
    names = {param: name for name, param in model.named_parameters()}
    return type(optimizer)(
        [group | {"params": [(names[param], param) for param in group["params"]]} for group in optimizer.param_groups]
    )


def without_names(optimizer):
    groups = [{key: value for key, value in group.items() if key != "param_names"} for group in optimizer.param_groups]
    return type(optimizer)(groups)


def moved(model, optimizer, start=0):
    """What two more steps make of the weights."""
    train(model, optimizer, 2, start=start)
    return weights(model)


def same(one, other):
    """Whether two values, or nested dicts and lists of them, are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# Steps


@every_optimizer
def test_steps_without_gradients_change_nothing(name):
    model = net()
    optimizer = build(name, model)
    start = weights(model)
    for zeros in (False, True):
        optimizer.zero_grad(set_to_none=not zeros)
        for _ in range(3):
            assert optimizer.step() is None
        assert torch.equal(weights(model), start)
    assert not any(optimizer.state.values())
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in model.parameters())


@every_optimizer
def test_a_group_with_a_rate_of_zero_stays(name):
    model = net()
    optimizer = build(name, model)
    start = {param: param.detach().clone() for param in model.parameters()}
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 4)
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            assert torch.equal(param, start[param]) == (number == 0)


@every_optimizer
def test_each_group_has_its_own_decay(name):
    model = net()
    optimizer = build(name, model)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    for number, group in enumerate(optimizer.param_groups):
        group.update(lr=0.1, weight_decay=0.5 * number)
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            assert torch.allclose(param, torch.full_like(param, 1 - 0.1 * 0.5 * number))


@every_optimizer
def test_it_can_be_printed(name):
    _, optimizer = trained(name)
    printed = repr(optimizer)
    assert printed.startswith(type(optimizer).__name__)
    assert f"weight_decay: {DECAY}" in printed


@every_optimizer
def test_the_default_type_changes_nothing(name):
    expected, model = trained(name)[0], net()
    optimizer = build(name, model)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        torch.set_default_dtype(torch.float64)
        try:
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(weights(model), weights(expected))


@every_optimizer
def test_hooks_around_a_step(name):
    model, optimizer = trained(name, 1)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda one, args, kwargs: calls.append("before")),
        optimizer.register_step_post_hook(lambda one, args, kwargs: calls.append("after")),
        register_optimizer_step_pre_hook(lambda one, args, kwargs: calls.append("before all")),
        register_optimizer_step_post_hook(lambda one, args, kwargs: calls.append("after all")),
    ]
    try:
        train(model, optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    train(model, optimizer, 1)
    assert calls == ["before all", "before", "after", "after all"]


@every_optimizer
def test_a_parameter_twice_in_a_group_is_warned_of(name):
    _, optimizer = trained(name, 1)
    first, *others = without_names(optimizer).param_groups
    with pytest.warns(UserWarning, match="duplicate parameters"):
        type(optimizer)([first | {"params": [*first["params"], first["params"][0]]}, *others])


# Learning rates and schedules


@every_optimizer
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_may_be_a_tensor(name, shape):
    expected, numbers = trained(name, 6)
    model = net()
    first = build(name, model)
    optimizer = type(first)([group | {"lr": torch.tensor(group["lr"]).reshape(shape)} for group in first.param_groups])
    assert optimizer.param_groups[0]["lr"].shape == shape
    train(model, optimizer, 6)
    # As a float32 a rate is another number in its eighth digit.
    assert torch.allclose(weights(model), weights(expected), rtol=1e-5, atol=1e-7)
    assert torch.allclose(torch.as_tensor(numbers.param_groups[0]["lr"]), optimizer.param_groups[0]["lr"])


SCHEDULERS = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=20),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, RATE / 2, RATE, step_size_up=4, cycle_momentum=False),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "averaging": lambda optimizer: swa_utils.SWALR(optimizer, swa_lr=RATE / 2, anneal_epochs=4),
    "in sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[3],
    ),
}


@every_optimizer
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedules(name, schedule):
    """They lower the loss, with rates that are numbers or tensors, and leave groups that make an optimizer again."""
    ends = []
    for as_tensors in (False, True):
        model = net()
        optimizer = build(name, model)
        for group in optimizer.param_groups if as_tensors else ():
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        scheduler = SCHEDULERS[schedule](optimizer)
        rates, losses = [], []
        for step in range(12):
            losses += train(model, optimizer, 1, start=step)
            scheduler.step(*([losses[-1]] if schedule == "plateau" else []))
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
        assert len(set(map(tuple, rates))) > 1
        assert sum(losses[-5:]) < sum(losses[:5])
        ends.append((weights(model), rates))
    assert torch.allclose(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-7)
    assert ends[1][1] == [pytest.approx(one) for one in ends[0][1]]
    again = type(optimizer)(optimizer.param_groups)
    again.load_state_dict(optimizer.state_dict())
    twin = copy.deepcopy(model)
    for ours, theirs in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert same({key: ours[key] for key in ours}, {key: theirs[key] for key in ours})
    assert not torch.equal(moved(model, again), weights(twin))


# Wrong arguments


def a_target(name):
    """A group of targets of the method's optimizer, and its class."""
    optimizer = build(name, net())
    group = next(group for group in optimizer.param_groups if optimizer.is_target(group))
    return type(optimizer), {key: value for key, value in group.items() if key not in ("params", "param_names")}


WRONG_VALUES = [
    ("lr", torch.tensor([1e-3, 1e-3])),
    ("lr", -1.0),
    ("lr", math.nan),
    ("lr", None),
    ("lr", "1e-3"),
    ("eps", -1e-8),
    ("eps", None),
    ("weight_decay", -0.1),
    ("weight_decay", torch.tensor([0.1, 0.1])),
    ("betas", (1.0, 0.9)),
    ("betas", (0.9,)),
    ("betas", 0.9),
    ("betas", ("a", "b")),
]


@every_optimizer_of_ours
def test_values_that_are_refused(name):
    cls, options = a_target(name)
    kind = {key: options[key] for key in ("rank", "muon") if key in options}
    matrix = nn.Parameter(torch.zeros(8, 12))
    model, optimizer = trained(name, 2)
    before, groups = weights(model), len(optimizer.param_groups)
    for key, value in WRONG_VALUES:
        with pytest.raises(UserError, match=rf"^{key} of \w+ must be (one|two) numbers? "):
            cls([{"params": [matrix], **kind}], **{key: value})
        with pytest.raises(UserError, match=rf"^{key} of parameter group {groups} must be (one|two) numbers? "):
            optimizer.add_param_group({"params": [("matrix", matrix)], **options, key: value})
        assert len(optimizer.param_groups) == groups
    assert not torch.equal(moved(model, optimizer), before)


@every_optimizer_of_ours
def test_groups_that_are_refused(name):
    cls, options = a_target(name)
    matrix, other = (nn.Parameter(torch.zeros(8, 12)) for _ in range(2))
    model, optimizer = trained(name, 2)
    before, groups, table = weights(model), len(optimizer.param_groups), optimizer.parameter_table()
    taken = optimizer.param_groups[0]["params"][0]
    refused = [
        ({"params": {matrix}}, TypeError, "ordered collections"),
        ({"params": ["matrix"]}, TypeError, "can only optimize Tensors"),
        ({"params": [matrix * 2]}, ValueError, "non-leaf"),
        ({"params": [("named", matrix), other]}, ValueError, "Some param names are missing"),
        ({"lr": 1e-3}, UserError, "must have the key 'params'"),
        ({"params": [matrix], "momentums": 0.9}, UserError, "unknown option 'momentums'"),
        ({"params": [matrix], 3: 0.9}, UserError, "unknown option 3"),
    ]
    for group, error, text in refused:
        with pytest.raises(error, match=text):
            cls([group | options], 1e-3)
        with pytest.raises(error, match=text):
            optimizer.add_param_group(group | options)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([matrix])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [("taken", taken)], **options})
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        cls(matrix, 1e-3)
    assert len(optimizer.param_groups) == groups
    assert optimizer.parameter_table() == table
    assert not torch.equal(moved(model, optimizer), before)


# Complex parameters


@every_optimizer_of_ours
def test_a_complex_target_is_refused(name):
    cls, options = a_target(name)
    matrix = nn.Parameter(torch.zeros(8, 12, dtype=torch.complex64))
    with pytest.raises(UserError, match=r"must be real, spectral of shape \(8, 12\) is complex"):
        cls([{"params": [("spectral", matrix)], **options}])


@every_optimizer_of_ours
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_other_complex_parameters_get_torchs_adamw(name, dtype):
    cls, options = a_target(name)
    options["adam_variant"] = "torch"
    torch.manual_seed(0)
    start = torch.randn(5, 4, dtype=dtype)
    own, witness = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    matrix = nn.Parameter(torch.zeros(8, 12))
    rest = {"muon": False} if "muon" in options else {"rank": None}
    for option in ({}, {"state_dtype": "float32"}):
        optimizer = cls(
            [{"params": [("matrix", matrix)], **options}, {"params": [("own", own)], **options, **rest, **option}]
        )
        group = optimizer.param_groups[1]
        expected = torch.optim.AdamW(
            [witness], lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"]
        )
        for step in range(5):
            grad = torch.randn(4, 5, dtype=dtype).mT if step % 2 else torch.randn(5, 4, dtype=dtype)
            own.grad, witness.grad = grad.clone(), grad.clone()
            if step == 3:  # is skipped
                own.grad[1, 2] = complex(0, math.nan)
                with pytest.warns(UserWarning, match="gradient of own is not finite"):
                    optimizer.step()
                continue
            optimizer.step()
            expected.step()
            again = cls(optimizer.param_groups)
            again.load_state_dict(optimizer.state_dict())
            optimizer = again
        assert torch.allclose(own, witness, rtol=1e-5, atol=1e-7)
        assert optimizer.state[own]["exp_avg"].dtype == dtype


# Saving and loading


@every_optimizer_of_ours  # torch shares tensors with the states that it loads
def test_saved_states_are_neither_changed_nor_shared(name):
    model, optimizer = trained(name)
    saved = optimizer.state_dict()
    kept, twin = copy.deepcopy(saved), copy.deepcopy(model)
    other = restored(name, twin, saved)
    assert same(other.state_dict(), kept)
    train(twin, other, 2)
    assert same(saved, kept)
    assert not same(other.state_dict(), kept)


@every_optimizer
@pytest.mark.parametrize("named", [False, True])
def test_names_are_no_condition(name, named):
    """States of named parameters load into an optimizer without names, and the other way round."""
    model = net()
    optimizer = with_names(build(name, model), model) if named else without_names(build(name, model))
    train(model, optimizer, 4)
    twin = copy.deepcopy(model)
    other = without_names(build(name, twin)) if named else with_names(build(name, twin), twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares what it loads
    assert torch.equal(moved(twin, other, 4), moved(model, optimizer, 4))


@every_optimizer
def test_steps_may_be_saved_as_tensors(name):
    model, optimizer = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = torch.tensor(float(state["step"]))
    twin = copy.deepcopy(model)
    assert torch.equal(moved(twin, restored(name, twin, saved), 4), moved(model, optimizer, 4))


@every_optimizer
def test_hooks_around_saving(name):
    _, optimizer = trained(name)
    undisturbed = optimizer.state_dict()
    seen = []

    def before(one):
        one.state["note"] = "written before"

    def after(one, saved):
        seen.append(saved["state"].pop("note"))
        del one.state["note"]
        return {"state": {f"p{number}": state for number, state in saved["state"].items()}, "groups": 2}

    hooks = optimizer.register_state_dict_pre_hook(before), optimizer.register_state_dict_post_hook(after)
    changed = optimizer.state_dict()
    for hook in hooks:
        hook.remove()
    assert seen == ["written before"]
    assert changed["groups"] == 2
    assert same(changed["state"], {f"p{number}": state for number, state in undisturbed["state"].items()})
    assert same(optimizer.state_dict(), undisturbed)


def swapped(saved):
    """A saved state in which two parameters of equal shape, the first and the third layer's, have each other's."""
    saved = copy.deepcopy(saved)
    group = next(group for group in saved["param_groups"] if "layers.2.weight" in group.get("param_names", ()))
    one, other = (group["params"][group["param_names"].index(f"layers.{i}.weight")] for i in (0, 2))
    saved["state"][one], saved["state"][other] = saved["state"][other], saved["state"][one]
    return saved


@every_optimizer
@pytest.mark.parametrize("way", ["returned", "in place"])
def test_what_a_hook_makes_of_a_state_is_what_is_loaded(name, way):
    model = net()
    optimizer = with_names(build(name, model), model)
    train(model, optimizer, 4)
    saved, order = optimizer.state_dict(), []

    def second(one, state):
        order.append("second")
        if way == "returned":
            return swapped(state)
        state.update(swapped(state))
        return None

    def first(one, state):
        order.append("first")
        state["param_groups"] = copy.deepcopy(state["param_groups"])
        state["param_groups"][0]["lr"] = 0.5

    model_of_hooked, expected_model = copy.deepcopy(model), copy.deepcopy(model)
    hooked = with_names(build(name, model_of_hooked), model_of_hooked)
    hooks = [
        hooked.register_load_state_dict_pre_hook(second),
        hooked.register_load_state_dict_pre_hook(first, prepend=True),
    ]
    hooked.load_state_dict(saved)
    assert order == ["first", "second"]
    expected = with_names(build(name, expected_model), expected_model)
    by_hand = swapped(saved)
    by_hand["param_groups"][0]["lr"] = 0.5
    expected.load_state_dict(by_hand)
    assert same(hooked.state_dict(), by_hand)
    assert not same(saved, by_hand)
    assert torch.equal(moved(model_of_hooked, hooked, 4), moved(expected_model, expected, 4))
    for hook in hooks:
        hook.remove()
    hooked.load_state_dict(saved)
    assert same(hooked.state_dict(), saved)


@every_optimizer
def test_hooks_after_loading_see_and_change_what_was_loaded(name):
    model = net(torch.bfloat16)
    optimizer = build(name, model, **({"state_dtype": "float32"} if name in OURS else {}))
    train(model, optimizer, 4)
    saved, seen = optimizer.state_dict(), []

    def see(one):
        seen.append(copy.deepcopy(one.state_dict()))

    def change(one):
        for state in one.state.values():
            state["exp_avg" if "exp_avg" in state else "momentum_buffer"].fill_(2.0)

    other = build(name, net(torch.bfloat16), **({"state_dtype": "float32"} if name in OURS else {}))
    other.register_load_state_dict_post_hook(change)
    other.register_load_state_dict_post_hook(see, prepend=True)
    other.load_state_dict(copy.deepcopy(saved))
    assert same(seen, [saved])
    moments = [state.get("exp_avg", state.get("momentum_buffer")) for state in other.state.values()]
    assert all(bool((moment == 2.0).all()) for moment in moments)


@every_optimizer
def test_a_hook_that_fails_leaves_everything_as_it_was(name):
    _, optimizer = trained(name)
    other_model, other = trained(name, 2)
    before = copy.deepcopy(other.state_dict())

    def fails(*given):
        raise RuntimeError("no")

    hook = other.register_load_state_dict_pre_hook(fails)
    with pytest.raises(RuntimeError, match="no"):
        other.load_state_dict(optimizer.state_dict())
    hook.remove()
    assert same(other.state_dict(), before)
    if name in OURS:
        other.register_load_state_dict_post_hook(fails)
        with pytest.raises(RuntimeError, match="no"):
            other.load_state_dict(optimizer.state_dict())
        assert same(other.state_dict(), before)
    assert torch.equal(moved(other_model, other, 2), weights(trained(name, 4)[0]))


@every_optimizer
def test_foreign_keys_are_kept(name):
    model, optimizer = trained(name)
    first = next(iter(model.parameters()))
    optimizer.state["note"] = "mine"
    optimizer.state[first]["seen"] = 7
    optimizer.state[first]["mask"] = torch.arange(3.0)
    optimizer.param_groups[0]["tag"] = "targets"
    saved = copy.deepcopy(optimizer.state_dict())
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    twin = copy.deepcopy(model)
    other = restored(name, twin, torch.load(file, weights_only=True))
    assert same(other.state_dict(), saved)
    copied_model, copied = copy.deepcopy((model, optimizer))
    assert same(copied.state_dict(), saved)
    expected = moved(model, optimizer, 4)
    assert torch.equal(moved(twin, other, 4), expected)
    assert torch.equal(moved(copied_model, copied, 4), expected)
    assert other.state_dict()["state"]["note"] == "mine"


@every_optimizer_of_ours
def test_states_without_an_option_load_with_its_default(name):
    """Each option in turn is one that there was not yet when the state was saved."""
    model, optimizer = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    start = copy.deepcopy(model)
    expected = moved(model, optimizer, 4)
    fields = METHODS[name].settings.model_fields
    for key in saved["param_groups"][0].keys() - {"params", "param_names"}:
        older, twin = copy.deepcopy(saved), copy.deepcopy(start)
        for group in older["param_groups"]:
            group.pop(key, None)
        other = build(name, twin)
        default = type(other).settings.model_fields[key].default if key in fields else None
        for group in other.param_groups if isinstance(default, bool) else ():
            group[key] = not default
        other.load_state_dict(older)
        is_new = key in fields and key not in {*type(other).settings_of_model, "rank"}
        assert not is_new or all(same(group[key], default) for group in other.param_groups), key
        if not is_new or all(same(group[key], default) for group in saved["param_groups"]):
            assert same(other.state_dict(), saved), key
            assert torch.equal(moved(twin, other, 4), expected), key
        else:
            assert not torch.equal(moved(twin, other, 4), weights(start)), key


@every_optimizer_of_ours
def test_options_of_a_state_are_checked(name):
    _, optimizer = trained(name)
    before = copy.deepcopy(optimizer.state_dict())
    for key, value in (("lr", torch.tensor([1.0, 2.0])), ("state_dtype", "int4")):
        wrong = copy.deepcopy(before)
        wrong["param_groups"][-1][key] = value
        with pytest.raises(UserError, match=rf"{key} of parameter group \d of the loaded state must be"):
            optimizer.load_state_dict(wrong)
        assert same(optimizer.state_dict(), before)


@every_optimizer_of_ours
def test_a_state_that_lacks_a_tensor_is_refused_by_name(name):
    _, optimizer = trained(name)
    before = copy.deepcopy(optimizer.state_dict())
    of_targets = [optimizer.is_target(group) for group in optimizer.param_groups for _ in group["params"]]
    for number in (of_targets.index(True), of_targets.index(False)):
        required = {key for key, value in before["state"][number].items() if torch.is_tensor(value)} | {"step"}
        if name == "dion":
            required.discard("basis")  # is drawn again where there is none
        for key in required:
            wrong = copy.deepcopy(before)
            del wrong["state"][number][key]
            with pytest.raises(UserError, match=rf"the loaded state of .* must have '{key}'"):
                optimizer.load_state_dict(wrong)
            assert same(optimizer.state_dict(), before)


# Copies


def copies(model, optimizer):
    yield copy.deepcopy((model, optimizer))
    yield pickle.loads(pickle.dumps((model, optimizer)))


@every_optimizer
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_copies_go_on_alike(name, stop):
    model, optimizer = trained(name, stop)
    pairs = list(copies(model, optimizer))
    expected = moved(model, optimizer, stop)
    for twin, other in pairs:
        assert type(other) is type(optimizer)
        assert other.defaults == optimizer.defaults or name not in OURS
        assert torch.equal(moved(twin, other, stop), expected)
        assert not torch.equal(expected, moved(twin, other, stop + 2))


@every_optimizer_of_ours
def test_copies_step_inside_the_backward_pass_too(name):
    model, optimizer = trained(name, 2, layerwise=True)
    with optimizer.accumulating():
        loss_of(model, 2).backward()
    pairs = list(copies(model, optimizer))
    for _, other in pairs:  # a copy of parameters has no gradients
        for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
            for param, twin in zip(ours["params"], theirs["params"], strict=True):
                twin.grad = None if param.grad is None else param.grad.clone()
    for one, stepper in [(model, optimizer), *pairs]:
        loss_of(one, 3).backward()
        assert all(param.grad is None for param in one.parameters())
        stepper.step()
    for twin, other in pairs:
        assert torch.equal(weights(twin), weights(model))
        assert same(other.state_dict(), optimizer.state_dict())


@every_optimizer_of_ours
def test_copies_keep_the_names_of_what_was_skipped(name):
    model, optimizer = trained(name)
    model.layers[1].weight.grad[0, 0] = math.nan
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    for _, other in copies(model, optimizer):
        assert other.skipped == optimizer.skipped
        assert len(other.skipped) == 1


@pytest.mark.parametrize("name", [name for name in OURS if "diagnostics" in METHODS[name].settings.model_fields])
def test_copies_keep_their_own_diagnostics(name):
    model, optimizer = trained(name, diagnostics=True)
    found = copy.deepcopy(optimizer.diagnostics)
    assert found
    for twin, other in copies(model, optimizer):
        assert other.diagnostics == found
        train(twin, other, 3)
        assert other.diagnostics != found
        assert optimizer.diagnostics == found


# Compilers


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@every_optimizer_of_ours
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_step_has_the_plain_steps_numbers(name, backend, fresh_compiler):
    expected = trained(name, 6)[0]
    model = net()
    optimizer = build(name, model)
    compiled = torch.compile(optimizer.step, backend=backend)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        compiled()
    assert torch.equal(weights(model), weights(expected))


# Compiling a loop takes seconds, and all optimizers share what keeps the step out of it.
some_of_ours = pytest.mark.parametrize("name", ["frugal", "muon"])


@some_of_ours
def test_a_step_takes_itself_out_of_a_compiled_loop(name, fresh_compiler):
    expected, model, graphs = trained(name, 6)[0], net(), []
    optimizer = build(name, model)

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    @torch.compile(backend=backend)
    def one(x, y):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for step in range(6):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step % 5))
        one(x, x[:, :6].sin())
    assert torch.allclose(weights(model), weights(expected), rtol=1e-5, atol=1e-7)
    assert graphs
    assert not [target for graph in graphs for target in graph if "adam" in target or "foreach" in target]


@some_of_ours
def test_a_step_inside_a_compiled_backward_pass(name, fresh_compiler):
    expected = trained(name, 6)[0]
    model = net()
    optimizer = build(name, model, layerwise=True)
    with torch._dynamo.config.patch(compiled_autograd=True):

        @torch.compile(backend="eager")
        def backward(loss):
            loss.backward()

        for step in range(6):
            backward(loss_of(model, step))
            optimizer.step()
    assert torch.allclose(weights(model), weights(expected), rtol=1e-4, atol=1e-6)


# FRUGAL's blocks, whose state comes and goes


def test_hooks_around_the_states_of_blocks():
    model, optimizer = trained("frugal", subspace="blocks")
    handle = optimizer.register_state_dict_post_hook(lambda one, saved: {"wrapped": saved})
    saved = optimizer.state_dict()["wrapped"]
    handle.remove()
    assert same(saved, optimizer.state_dict())
    twin = copy.deepcopy(model)
    other = build("frugal", twin, subspace="blocks")
    other.register_load_state_dict_pre_hook(lambda one, state: state["wrapped"])
    other.load_state_dict({"wrapped": saved})
    assert torch.equal(moved(twin, other, 4), moved(model, optimizer, 4))
    assert isinstance(other, FrugalAdamW)


def test_an_optimizer_pickled_before_it_had_an_option():
    _, optimizer = trained("galore")
    state = copy.deepcopy(optimizer.__getstate__())
    for key in ("diagnostics", "_skipped", "_skips", "_layerwise", "_accumulated"):
        del state[key]
    del state["defaults"]["lazy"]
    for group in state["param_groups"]:
        del group["lazy"]
    other = GaLoreAdamW.__new__(GaLoreAdamW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.__setstate__(state)
    assert same(other.state_dict(), optimizer.state_dict())
    other.add_param_group({"params": [("late", nn.Parameter(torch.zeros(8, 6)))], "rank": 2})
    assert other.param_groups[-1]["lazy"] is False
