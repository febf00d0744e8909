"""Sparse spectral training: layer, draws and steps against numpy in float64, and under Trainer."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_lowrank.adapters import LowRankConfig, LowRankForCausalLM, SSTCallback, SSTConfig, target_layers
from hf_lowrank.adapters.functional import keyed_generator
from hf_lowrank.adapters.spectral import draw_pairs, redraw, signed_svd, sst_layers
from hf_lowrank.errors import UserError
from hf_lowrank.memory import estimate
from hf_lowrank.methods import METHODS
from hf_lowrank.runs.export import export
from hf_lowrank.training import load_recipe
from tests.adapters.test_adapter_methods import RECIPES
from tests.adapters.test_adapter_training import exit_of, forked, in_two_processes, same, train, weights

OWN = {"redraw_every": 3, "redraw_warmup_steps": 1, "svd_every": 2}


def single(out, fan_in, r, seed=0):
    """One layer in float64 with its dense weight."""
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Linear(fan_in, out)).double()
    weight = dense[0].weight.detach().clone()
    tuner = SSTConfig(r=r, target_modules=["0"], seed=seed)
    from peft import inject_adapter_in_model

    return inject_adapter_in_model(tuner, dense)[0], weight


def parts(layer):
    """A, B, S, U, V and the index as numpy."""
    found = {key: getattr(layer, f"sst_{key}")["default"].detach().double().numpy().copy() for key in "ABSUV"}
    return {**found, "index": layer.sst_index["default"].numpy().astype(int).copy()}


@pytest.mark.parametrize(("out", "fan_in", "r"), [(12, 7, 3), (7, 12, 3), (8, 8, 8), (9, 9, 1)])
def test_the_layer_starts_as_the_dense_one_and_holds_what_it_says(out, fan_in, r):
    layer, weight = single(out, fan_in, r)
    k, own = min(out, fan_in), parts(layer)
    np.testing.assert_allclose(own["S"], np.linalg.svd(weight.numpy(), compute_uv=False), rtol=1e-6)
    assert len(set(own["index"])) == r
    assert not own["U"][:, own["index"]].any()
    assert not own["V"][own["index"]].any()
    U, V = own["U"].copy(), own["V"].copy()
    U[:, own["index"]], V[own["index"]] = own["B"], own["A"]
    np.testing.assert_allclose(U.T @ U, np.eye(k), atol=1e-5)
    np.testing.assert_allclose(V @ V.T, np.eye(k), atol=1e-5)
    np.testing.assert_allclose(U @ np.diag(own["S"]) @ V, weight.numpy(), atol=1e-5)
    np.testing.assert_allclose(layer.dense_weight().numpy(), weight.numpy(), atol=1e-5)
    x = torch.randn(2, 5, fan_in, dtype=torch.float64)
    expected = x.numpy() @ (U @ np.diag(own["S"]) @ V).T + layer.base_layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-10)
    trained = sum(p.numel() for name, p in layer.named_parameters() if p.requires_grad and "bias" not in name)
    assert trained == r * (out + fan_in) + k
    frozen = [p.numel() for name, p in layer.named_parameters() if "bias" not in name and not p.requires_grad]
    assert sum(frozen) == k * (out + fan_in)


def test_gradients_leave_out_the_singular_values():
    layer, _ = single(6, 9, 2)
    with torch.no_grad():
        layer.sst_S["default"][layer.sst_index["default"].long()[0]] = 0.0  # the usual gradient would be zero
    own = parts(layer)
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 6, dtype=torch.float64)
    y = layer(x)
    (0.5 * (y - target).square().sum()).backward()
    error, rows = (y - target).detach().numpy(), x.detach().numpy()
    G = error.T @ rows  # of the dense weight
    np.testing.assert_allclose(layer.sst_B["default"].grad.numpy(), G @ own["A"].T, atol=1e-12)
    np.testing.assert_allclose(layer.sst_A["default"].grad.numpy(), own["B"].T @ G, atol=1e-12)
    U, V = own["U"].copy(), own["V"].copy()
    U[:, own["index"]], V[own["index"]] = own["B"], own["A"]
    np.testing.assert_allclose(layer.sst_S["default"].grad.numpy(), np.diag(U.T @ G @ V.T), atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), error @ (U * own["S"]) @ V, atol=1e-12)


def test_draws_have_the_probabilities_of_the_formula():
    S = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0])
    counts = np.zeros(5)
    for number in range(4000):
        (index,) = draw_pairs(S, 1, keyed_generator(0, number)).tolist()
        counts[index] += 1
    expected = 0.5 * (1 / 5 + S.numpy() / 8)
    assert expected.sum() == pytest.approx(1)
    assert np.abs(counts / 4000 - expected).max() < 4 * np.sqrt(0.25 / 4000)
    assert draw_pairs(torch.zeros(4), 4, keyed_generator(0)).tolist() == [0, 1, 2, 3]


def test_twelve_steps_and_three_draws_in_numpy():
    """W for the loss ½‖W x − t‖², Adam on A, B and S, with a new decomposition at the second draw."""
    layer, _ = single(5, 7, 2)
    layer.layer_name = "0"
    model = nn.Sequential(layer)
    layer.base_layer.bias.requires_grad_(False)
    x, t = (torch.randn(6, size, dtype=torch.float64) for size in (7, 5))
    trained = {key: getattr(layer, f"sst_{key}")["default"] for key in "ABS"}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05, eps=1e-8, weight_decay=0.1)
    callback = SSTCallback(redraw_every=4, svd_every=2, seed=3)
    state = type("State", (), {"log_history": [], "epoch": 0.0, "global_step": 0})()
    own, moments, age = parts(layer), {}, 0
    rows, bias = x.numpy(), layer.base_layer.bias.numpy()
    for step in range(1, 13):
        optimizer.zero_grad()
        (0.5 * (model(x) - t).square().sum()).backward()
        optimizer.step()
        state.global_step = step
        callback.on_step_end(None, state, None, model=model, optimizer=optimizer)

        U, V = own["U"].copy(), own["V"].copy()
        U[:, own["index"]], V[own["index"]] = own["B"], own["A"]
        G = (rows @ (U * own["S"] @ V).T + bias - t.numpy()).T @ rows
        gradients = {"A": own["B"].T @ G, "B": G @ own["A"].T, "S": np.diag(U.T @ G @ V.T)}
        age += 1
        for key, gradient in gradients.items():
            m, v = moments.get(key, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            moments[key] = m, v
            direction = (m / (1 - 0.9**age)) / (np.sqrt(v / (1 - 0.999**age)) + 1e-8)
            own[key] = own[key] * (1 - 0.05 * 0.1) - 0.05 * direction
        own["A"] /= np.linalg.norm(own["A"], axis=1, keepdims=True)
        own["B"] /= np.linalg.norm(own["B"], axis=0, keepdims=True)
        own["S"] = np.maximum(own["S"], 0)
        if step % 4 == 0:
            U, V = own["U"].copy(), own["V"].copy()
            U[:, own["index"]], V[own["index"]] = own["B"], own["A"]
            if step == 8:
                U, S, V = np.linalg.svd(U * own["S"] @ V, full_matrices=False)
                signs = np.sign(np.take_along_axis(U, np.abs(U).argmax(0, keepdims=True), 0))
                U, V, own["S"] = U * signs, V * signs.T, S
            own["index"] = layer.sst_index["default"].numpy().astype(int).copy()  # the draw itself is tested above
            own["A"], own["B"] = V[own["index"]].copy(), U[:, own["index"]].copy()
            U[:, own["index"]], V[own["index"]] = 0, 0
            own["U"], own["V"], moments, age = U, V, {}, 0
        for key, value in parts(layer).items():
            np.testing.assert_allclose(value, own[key], rtol=1e-9, atol=1e-9, err_msg=f"{key} after step {step}")
    assert [entry["sst_draws"] for entry in state.log_history] == [1, 2, 3]


def test_the_function_survives_draws_and_decompositions(base_config, stir, ids):
    torch.manual_seed(0)
    model = LowRankForCausalLM(LowRankConfig(base_config=base_config, adapter_config=SSTConfig(r=4)))
    stir(model).eval()
    for layer in sst_layers(model):
        layer.normalise()
    before, indices = model(input_ids=ids).logits, []
    for count in (1, 2, 3, 4):
        redraw(model, seed=0, step=10 * count, count=count)
        assert torch.allclose(model(input_ids=ids).logits, before, atol=2e-5)
        indices.append(sst_layers(model)[0].sst_index["default"].tolist())
    assert len({tuple(index) for index in indices}) > 1
    layer = sst_layers(model)[0]
    A, B = layer.factors()
    torch.testing.assert_close(A @ A.T, torch.eye(4), atol=1e-5, rtol=0)  # after the decomposition of draw 4
    torch.testing.assert_close(B.T @ B, torch.eye(4), atol=1e-5, rtol=0)
    assert torch.allclose(model.to_dense()(input_ids=ids).logits, before, atol=2e-5)


def test_an_untrained_model_is_the_dense_one(llama_config, dense, ids):
    plain = dense(llama_config)
    torch.manual_seed(0)
    model = METHODS["sst"].build_model(llama_config, METHODS["sst"].settings(r=4), 0).eval()
    assert torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)


def test_second_derivatives_are_refused(llama_config, ids):
    model = METHODS["sst"].build_model(llama_config, METHODS["sst"].settings(r=4), 0)
    factor = sst_layers(model)[0].sst_A["default"]
    (gradient,) = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, factor, create_graph=True)
    with pytest.raises(UserError, match="SST's layer has first derivatives only"):
        gradient.sum().backward()


def test_signs_of_singular_vectors_do_not_depend_on_the_driver():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    U, S, V = signed_svd(weight)
    other = signed_svd(weight.double())
    for one, two in zip((U, S, V), other, strict=True):
        torch.testing.assert_close(one.double(), two, atol=1e-5, rtol=0)


# -- memory


def test_bytes_are_the_formulas():
    recipe = load_recipe(RECIPES / "llama_60m/sst.yaml", ["training.per_device_train_batch_size=1"])
    found = estimate(recipe, device="cpu", sequence_length=16)
    linears = 8 * (4 * [(512, 512)] + 2 * [(1376, 512)] + [(512, 1376)])
    rest = 2 * 32_000 * 512 + 17 * 512
    frozen = sum(min(m, n) * (m + n) for m, n in linears)
    trained = sum(128 * (m + n) + min(m, n) for m, n in linears)
    indices = 128 * len(linears)
    assert (found.frozen, found.factors, found.sparse) == (4 * frozen, 4 * (frozen + trained + indices), 0)
    assert found.gradients == 4 * (trained + rest)
    tensors = 3 * len(linears) + 2 + 17
    assert found.moments == 8 * (trained + rest) + 4 * tensors


# -- under Trainer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sst")
    train(str(folder), 8, "sst", **OWN)
    return folder


def test_draws_are_logged_and_start_their_state_anew(uninterrupted):
    history = json.loads((uninterrupted / "checkpoint-8/trainer_state.json").read_text())["log_history"]
    assert [(e["step"], e["sst_draws"]) for e in history if "sst_draws" in e] == [(3, 1), (6, 2)]
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    assert [step for step, rate in rates.items() if rate == 0] == [1, 4, 7]
    state = torch.load(uninterrupted / "checkpoint-6/optimizer.pt", weights_only=True)["state"]
    fresh = [entry for entry in state.values() if float(entry["step"]) == 0]
    assert len(fresh) == 3 * 7
    assert not any(entry["exp_avg"].any() or entry["exp_avg_sq"].any() for entry in fresh)
    assert {float(entry["step"]) for entry in state.values()} == {0, 6}
    for step in range(1, 9):
        for name, tensor in weights(uninterrupted, step).items():
            if "sst_A" in name:
                torch.testing.assert_close(tensor.norm(dim=1), torch.ones(2))
            assert "sst_S" not in name or (tensor >= 0).all()


@pytest.mark.parametrize(
    ("kill", "moment"),
    [(2, "save"), (3, "save"), (3, "step"), (5, "save")],
    ids=["before", "at", "after-at", "within"],
)
def test_resume_after_sigkill_is_bit_exact(uninterrupted, tmp_path, kill, moment):
    assert exit_of(forked(lambda: train(str(tmp_path), 8, "sst", kill=kill, moment=moment, **OWN))) == -9
    train(str(tmp_path), 8, "sst", resume=str(tmp_path / f"checkpoint-{kill}"), **OWN)
    assert same(weights(tmp_path, 8), weights(uninterrupted, 8))


def test_two_processes_agree_bit_for_bit_and_with_one(tmp_path):
    """Without a decomposition: in float32 the vectors of singular values that nearly coincide are hardly determined.

    With one, processes are compared in float64 by the tests of all methods.
    """
    own = {**OWN, "svd_every": 9}
    first, second = in_two_processes(tmp_path / "two", name="sst", **own)
    assert same(first, second)
    train(str(tmp_path / "one"), 8, "sst", save_steps=8, **own)
    alone = weights(tmp_path / "one", 8)
    assert all(torch.allclose(first[key].float(), tensor.float(), atol=2e-5) for key, tensor in alone.items())


def test_two_processes_stay_replicas_through_a_decomposition(tmp_path):
    assert same(*in_two_processes(tmp_path, name="sst", **OWN))


def test_an_export_gives_the_same_logits(uninterrupted, tmp_path):
    ids = torch.arange(12).view(1, 12)
    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "checkpoint-8").eval()
    plain = AutoModelForCausalLM.from_pretrained(export(uninterrupted / "checkpoint-8", tmp_path / "plain")).eval()
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert torch.allclose(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "sst_U" in name or "sst_V" in name)
    assert len(target_layers(model)) == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SSTCallback(redraw_every=0), r"redraw_every of SSTCallback must be an integer of at least 1, got 0"),
        (
            lambda: SSTCallback(redraw_every=2, svd_every=0),
            r"svd_every of .* must be an integer of at least 1 or None",
        ),
        (lambda: sst_layers(nn.Linear(2, 2)), r"SST needs a model with SST layers, got Linear without any"),
        (lambda: single(4, 4, 5), r"rank r must be at most 4"),
        (lambda: SSTConfig(r=0), r"r of SSTConfig must be an integer of at least 1"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method.redraw_every=5", "method.redraw_warmup_steps=6"],
            r"redraw_warmup_steps must be at most redraw_every",
        ),
        (["method.redraw_each=5"], r"unknown key 'method\.redraw_each'; did you mean 'redraw_every'"),
        (["method.r=4096"], r"model cannot be built: .*rank r must be at most 128"),
    ],
)
def test_bad_recipes(overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe(RECIPES / "nano/sst.yaml", overrides)
