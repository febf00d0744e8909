"""Weights in eight bits: their rounding, the layer, the step, and runs that train, resume and export them."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters import LowRankForCausalLM
from hf_lowrank.adapters.configuration import LowRankConfig
from hf_lowrank.adapters.dense import dense_weight_kind
from hf_lowrank.adapters.eight_bit import EightBitLinear, eight_bit_layers, train_weights
from hf_lowrank.errors import UserError
from hf_lowrank.methods import METHODS
from hf_lowrank.optim import GaLoreAdamW, QGaLoreAdamW, reference
from hf_lowrank.optim.reference import Options, State
from hf_lowrank.optim.subspaces import draw_generator
from hf_lowrank.runs.export import export
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.codes import Codes, decode, encode
from hf_lowrank.training import load_recipe, pretrain

SETTINGS = {"name": "q_galore", "rank": 4, "update_proj_gap": 1, "weight_dtype": "8bit"}
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def rounded_in_numpy(values, noise):
    """Group by group; scales and zero points are stored in float32."""
    found = np.empty(values.size)
    for start in range(0, values.size, 256):
        group, drawn = (flat.reshape(-1)[start : start + 256] for flat in (values, noise))
        scale = np.float64(np.float32(max(group.max() - group.min(), 1e-5) / 255))
        zero = np.float64(np.float32(-group.min() / scale))
        found[start : start + 256] = scale * (np.clip(np.floor(group / scale + zero + drawn), 0, 255) - zero)
    return found.reshape(values.shape)


def noise_of(step, position, shape):
    generator = draw_generator(torch.device("cpu"), 0, position, step)
    return torch.rand(shape, generator=generator)


# -- rounding


def test_rounding_is_right_on_average_and_goes_to_neighbours():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, generator=generator, dtype=torch.float64)  # one full group and a short one
    values[256:] = values[256:].abs() + 2  # of one sign
    draws = 4000
    noise = torch.rand(draws, 300, generator=generator, dtype=torch.float64)
    stored = encode(values.expand(draws, -1), 8, noise)
    found = decode(Codes(stored.codes, stored.scale.double(), stored.zero.double()), (300,), 8)
    step = stored.scale[0].double().repeat_interleave(256)[:300]
    assert ((found - values).abs() < step * 1.001).all()
    assert ((found.mean(0) - values).abs() < 5 * step / (2 * draws**0.5)).all()
    for one in (values[:256].argmax(), values[:256].argmin()):  # extremes are exact
        assert (found[:, one] - values[one]).abs().max() < 1e-5 * step[one]


@pytest.mark.parametrize("values", [torch.full((20, 30), 0.3), torch.zeros(7, 5), -torch.rand(9, 40) - 5])
def test_constants_and_groups_of_one_sign(values):
    noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(1))
    expected = rounded_in_numpy(values.double().numpy(), noise.double().numpy())
    stored = encode(values.double()[None], 8, noise[None])
    found = decode(Codes(stored.codes, stored.scale.double(), stored.zero.double()), values.shape, 8)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert (found - values).abs().max() <= (values.max() - values.min()) / 255 + 1e-7


# -- the layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_computes_as_the_dense_one_with_its_weight(kind, dtype):
    torch.manual_seed(0)
    layer = (nn.Linear(12, 30) if kind is nn.Linear else Conv1D(30, 12)).to(dtype)
    coded = EightBitLinear(layer)
    coded.train_weight()
    dense = nn.Linear(12, 30).to(dtype)
    dense.weight.data, dense.bias.data = coded.dense_weight(), layer.bias.data.clone()
    assert (dense.weight - (layer.weight if kind is nn.Linear else layer.weight.T)).abs().max() < 0.01
    found = []
    for one in (coded, dense):
        x = torch.linspace(-1, 1, 5 * 3 * 12).reshape(5, 3, 12).to(dtype).requires_grad_()
        y = one(x)
        y.square().sum().backward()
        found.append((y, x.grad, one.weight.grad, one.bias.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        # In bfloat16 the bias is added to a rounded product.
        torch.testing.assert_close(ours, theirs, **({"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}))


def test_autocast_second_derivatives_and_copies():
    torch.manual_seed(0)
    coded = EightBitLinear(nn.Linear(12, 30))
    coded.train_weight()
    x = torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert coded(x).dtype == torch.bfloat16
        coded(x).float().sum().backward()
    assert coded.weight.grad.dtype == torch.float32
    other = copy.deepcopy(coded)
    assert torch.equal(other(x), coded(x))
    assert other.weight is not coded.weight
    assert other.weight.untyped_storage().nbytes() == 4
    before = coded.read_weight()
    half = coded.to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.read_weight(), before)
    x = torch.randn(4, 12, requires_grad=True)
    grad = torch.autograd.grad(other(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# -- the step


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_optimizer_reference_and_formulas_agree(weight_decay):
    shared = {"lr": 1e-2, "eps": 1e-5, "weight_decay": weight_decay, "scale": 0.25, "update_proj_gap": 1}
    shapes = [(12, 7), (7, 12), (9, 9), (12, 7), (40, 30), (30, 40)]
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(columns, rows, bias=False).double() for rows, columns in shapes])
    for number in range(len(shapes)):
        model[number] = EightBitLinear(model[number])
    train_weights(model)
    params = [layer.weight for layer in model]
    optimizer = QGaLoreAdamW(
        [{"params": [(f"w{n}", param) for n, param in enumerate(params)], "rank": 3}],
        subspace="svd", state_dtype="parameter", **shared,
    )  # fmt: skip
    pairs = [(layer.read_weight(), State()) for layer in model]
    written = [(W.numpy(), 0.0, 0.0) for W, _ in pairs]
    for step in range(1, 13):
        for number, param in enumerate(params):
            param.grad = torch.randn(shapes[number], dtype=torch.float64)
        optimizer.step()
        for number, (layer, param) in enumerate(zip(model, params, strict=True)):
            noise = noise_of(step, number, param.shape)
            W, state = reference.q_galore(*pairs[number][:1], param.grad, pairs[number][1], Options(rank=3, **shared))
            pairs[number] = reference.in_eight_bits(W, noise), state
            torch.testing.assert_close(layer.read_weight(), pairs[number][0], rtol=1e-9, atol=1e-9)
            W, M, V = written[number]
            G, P, Q = param.grad.numpy(), *(None if b is None else b.numpy() for b in (state.P, state.Q))
            R = G @ Q if P is None else P.T @ G
            M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
            N = np.sqrt(1 - 0.999**step) / (1 - 0.9**step) * M / (np.sqrt(V) + 1e-5)
            W = W - 1e-2 * 0.25 * (N @ Q.T if P is None else P @ N)
            W = rounded_in_numpy(W - 1e-2 * weight_decay * W, noise.double().numpy())
            written[number] = W, M, V
            np.testing.assert_allclose(layer.read_weight().numpy(), W, rtol=1e-9, atol=1e-9)


def test_a_non_finite_gradient_changes_nothing():
    layer = EightBitLinear(nn.Linear(12, 30, bias=False))
    layer.train_weight()
    optimizer = QGaLoreAdamW([("w", layer.weight)], rank=3)
    before = layer.codes.clone(), layer.grid.clone()
    layer.weight.grad = torch.full((30, 12), torch.nan)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert torch.equal(layer.codes, before[0])
    assert torch.equal(layer.grid, before[1])
    layer.write_weight(torch.ones(30, 12), changed=torch.tensor(False))
    assert torch.equal(layer.codes, before[0])
    assert torch.equal(layer.grid, before[1])


# -- the model


@pytest.mark.parametrize("coded_first", [False, True])
def test_coded_and_plain_weights_of_one_shape_are_stepped_together(coded_first):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    place = 0 if coded_first else 1
    model[place] = EightBitLinear(model[place])
    model[place].train_weight()
    before = [model[place].read_weight(), model[1 - place].weight.detach().clone()]
    optimizer = GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}], lr=0.1)
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[place].read_weight(), before[0])
    assert not torch.equal(model[1 - place].weight, before[1])


def built(**settings):
    method = METHODS["q_galore"]
    torch.manual_seed(0)
    return method.build_model(LlamaConfig(**SMALL), method.settings(**{"weight_dtype": "8bit", **settings}), 0)


def test_no_float_copy_of_the_weights_is_kept():
    model = built()
    dense = sum(layer.in_features * layer.out_features for layer in eight_bit_layers(model).values())
    assert len(eight_bit_layers(model)) == 14
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in [*model.parameters(), *model.buffers()] if t.numel()}  # fmt: skip
    rest = 4 * (2 * 50 * 32 + 5 * 32)
    frequencies = sum(b.nbytes for name, b in model.named_buffers() if "inv_freq" in name)
    assert sum(held.values()) <= dense + 14 * 4 + 8 * dense / 256 + rest + frequencies
    assert sum(p.numel() for p in model.parameters()) == dense + 2 * 50 * 32 + 5 * 32


def test_a_saved_model_loads_and_becomes_dense(tmp_path):
    model = built()
    ids = torch.arange(24).reshape(2, 12)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    assert not any(name.endswith("q_proj.weight") for name in load_file(tmp_path / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LowRankForCausalLM)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for one, other in zip(eight_bit_layers(half).values(), eight_bit_layers(model).values(), strict=True):
        assert torch.equal(one.read_weight(), other.read_weight())
    dense = loaded.to_dense()
    assert type(dense).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(dense(input_ids=ids).logits, expected)
    assert all(type(module) is not EightBitLinear for module in dense.modules())
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if name.endswith(".grid"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match=rf"lacks the tensor {lost}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_models_without_adapters_have_dense_weights():
    assert dense_weight_kind(built().config.adapter_config) == "exact"


def test_the_weights_start_as_in_the_dense_model():
    coded, dense = built(), built(weight_dtype="parameter")
    for name, layer in eight_bit_layers(coded.lm).items():
        weight = dense.get_submodule(name).weight
        assert (layer.read_weight() - weight).abs().max() <= (weight.max() - weight.min()) / 255
    assert torch.equal(coded.get_input_embeddings().weight, dense.get_input_embeddings().weight)


def test_what_cannot_be_kept_in_eight_bits_is_refused(monkeypatch, write_recipe):
    with pytest.raises(UserError, match="'absent' matches no linear module"):
        built(target_modules=["absent"])
    with pytest.raises(UserError, match=r"method\.weight_dtype: input should be 'parameter' or '8bit', got '4bit'$"):
        load_recipe(write_recipe(method={**SETTINGS, "weight_dtype": "4bit"}))
    args = load_recipe(write_recipe(method=SETTINGS)).arguments("nowhere")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"weight_dtype must be parameter under FSDP2, got '8bit'"):
        METHODS["q_galore"].optimizer(built(), METHODS["q_galore"].settings(weight_dtype="8bit"), args)
    layer = EightBitLinear(nn.Linear(4, 4))
    layer.weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(UserError, match="must not be sharded or replaced"):
        layer(torch.zeros(1, 4))
    with pytest.raises(UserError, match="adapter_config is missing"):
        LowRankForCausalLM(LowRankConfig(base_config=LlamaConfig(**SMALL)))


# -- runs


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_run_learns_resumes_to_the_bit_and_exports(write_recipe, tmp_path, layerwise):
    path = write_recipe(
        method={**SETTINGS, "rank": 8, "update_proj_gap": 1, "layerwise": layerwise}, training__max_steps=63,
        training__save_steps=21, training__learning_rate=1e-2, training__weight_decay=0.01,
        training__max_grad_norm=0.0, training__gradient_accumulation_steps=2,
    )  # fmt: skip
    run = pretrain(load_recipe(path), tmp_path / "whole")
    history = Trajectory(run).log_history()
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert all(map(np.isfinite, losses))
    assert losses[-1] < json.loads((run / "facts.json").read_text())["unigram_loss"]

    other = shutil.copytree(run, tmp_path / "resumed")
    saved = torch.load(run / "checkpoint-21" / "optimizer.pt", weights_only=True)["state"]
    assert max(state.get("interval", 1) for state in saved.values()) > 1  # a power of two: step 21 is inside one
    for step in (42, 63):
        shutil.rmtree(other / f"checkpoint-{step}")
    pretrain(load_recipe(path), other)
    for step in (42, 63):
        one, again = (load_file(folder / f"checkpoint-{step}" / "model.safetensors") for folder in (run, other))
        assert one.keys() == again.keys()
        assert all(torch.equal(one[name], again[name]) for name in one)
    states = [torch.load(f / "checkpoint-63" / "optimizer.pt", weights_only=True)["state"] for f in (run, other)]
    for key, state in states[0].items():
        for name, value in state.items():
            same = torch.equal if isinstance(value, torch.Tensor) else int.__eq__
            assert same(value, states[1][key][name]), (key, name)

    trajectory = Trajectory(run)
    assert len(trajectory.targets) == 14
    name = trajectory.targets[3]
    assert trajectory.dense_weight_kind == "exact"
    model, ids = trajectory.model(63), torch.arange(12)[None]
    layer = model.lm.get_submodule(name)
    assert torch.equal(trajectory.dense_weight(63, name), layer.read_weight())
    exported = AutoModelForCausalLM.from_pretrained(export(run / "checkpoint-63", tmp_path / "dense"))
    assert type(exported).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(exported(input_ids=ids).logits, model(input_ids=ids).logits)
