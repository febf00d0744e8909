"""Structured layers and self-guided training: against numpy in float64, and under Trainer."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from peft import inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments

from hf_lowrank.adapters import LowRankConfig, LowRankForCausalLM, StructuredConfig, target_layers
from hf_lowrank.adapters.dense import dense_weight_from_tensors
from hf_lowrank.adapters.guide import GuideCallback, GuidedAdamW, drop_guides, guide_share, guided_layers, set_guide
from hf_lowrank.adapters.refactorise import refactorise
from hf_lowrank.errors import UserError
from hf_lowrank.memory import estimate
from hf_lowrank.methods import METHODS
from hf_lowrank.runs.export import export
from hf_lowrank.training import load_recipe, pretrain
from tests.adapters.test_adapter_methods import RECIPES
from tests.adapters.test_adapter_training import exit_of, forked, in_two_processes, same, train, weights
from tests.distributed.every_method import write_recipe, write_texts
from tests.distributed.processes import in_processes

STRUCTURES = ("low_rank", "block_dense", "block_shuffle")
OWN = {"structured": {"blocks": 2, "guide_share": 0.5, "target_modules": "auto", "exclude_modules": None},
       "low_rank": {"guide_share": 0.5}}  # fmt: skip


def single(structure, out=12, fan_in=8, r=4, blocks=2, **options):
    """One layer in float64."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(fan_in, out)).double()
    config = StructuredConfig(r=r, blocks=blocks, structure=structure, target_modules=["0"], **options)
    return inject_adapter_in_model(config, dense)[0]


def block_diagonal(blocks):
    count, rows, columns = blocks.shape
    matrix = np.zeros((count * rows, count * columns))
    for i in range(count):
        matrix[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = blocks[i]
    return matrix


def shuffle(size, rows):
    """The permutation matrix that reads a vector as `rows` rows and gives it column by column."""
    return np.eye(size)[np.arange(size).reshape(rows, -1).T.reshape(-1)]


def dense_of(layer, blocks=2):
    """The formulas, as matrices."""
    A, B = (factor.detach().double().numpy() for factor in layer.factors())
    if A.ndim == 2:
        return B @ A
    if B.ndim == 2:
        return B @ block_diagonal(A)
    inner, outer = block_diagonal(A), block_diagonal(B)
    return shuffle(outer.shape[0], blocks) @ outer @ shuffle(inner.shape[0], blocks) @ inner


@pytest.mark.parametrize(("out", "fan_in"), [(12, 8), (8, 12), (8, 8)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_output_dense_weight_and_gradients_are_the_formulas(structure, out, fan_in):
    layer = single(structure, out, fan_in)
    W = dense_of(layer)
    x = torch.randn(2, 3, fan_in, dtype=torch.float64, requires_grad=True)
    bias = layer.base_layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), x.detach().numpy() @ W.T + bias, atol=1e-12)
    np.testing.assert_allclose(layer.dense_weight().numpy(), W, atol=1e-12)
    cotangent = torch.randn(2, 3, out, dtype=torch.float64)
    layer(x).backward(cotangent)
    np.testing.assert_allclose(x.grad.numpy(), cotangent.numpy() @ W, atol=1e-12)
    assert torch.autograd.gradcheck(layer, (x,))
    k = min(out, fan_in)
    expected = {
        "low_rank": 4 * (out + fan_in),
        "block_dense": 4 * out + 4 * fan_in // 2,
        "block_shuffle": k * (out + fan_in) // 2,
    }[structure]
    assert sum(factor.numel() for factor in layer.factors()) == expected


def test_with_shuffles_every_output_depends_on_every_input():
    assert (dense_of(single("block_shuffle", 16, 16, 4, 4), 4) != 0).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_first_outputs_have_the_scale_of_colas(structure):
    layer = single(structure, 96, 64, 16, 4)
    x = torch.randn(500, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = (layer(x) - layer.base_layer.bias).std().item()
    assert spread == pytest.approx(math.sqrt(64 / (96 + 64)), rel=0.25)


def test_a_start_from_the_dense_weight_is_the_best_of_each_column_block():
    torch.manual_seed(0)
    weight = nn.Linear(8, 12).double().weight.detach().numpy()
    W = dense_of(single("block_dense", init="svd"))
    for part, own in zip(np.split(weight, 2, axis=1), np.split(W, 2, axis=1), strict=True):
        u, sigma, vt = np.linalg.svd(part)
        np.testing.assert_allclose(own, u[:, :2] * sigma[:2] @ vt[:2], atol=1e-6)
    with pytest.raises(UserError, match=r"0: init must be 'random' with structure block_shuffle"):
        single("block_shuffle", init="svd")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_exports_and_tensors_give_the_same_function(llama_config, stir, ids, tmp_path, structure):
    torch.manual_seed(0)
    adapter = StructuredConfig(r=4, blocks=2, structure=structure)
    model = stir(LowRankForCausalLM(LowRankConfig(base_config=llama_config, adapter_config=adapter))).eval()
    logits = model(input_ids=ids).logits
    assert torch.allclose(model.to_dense()(input_ids=ids).logits, logits, atol=1e-5)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, layer in target_layers(model).items():
        found = dense_weight_from_tensors(name, tensors.__getitem__, model.config.adapter_config)
        torch.testing.assert_close(found, layer.dense_weight())


# -- the guide


@pytest.mark.parametrize("structure", [*STRUCTURES, "control"])
def test_guided_outputs_and_gradients_are_the_formula(llama_config, structure, ids):
    """Of one layer, in float64: o = α W_g x + (1 − α) f(x), in training mode alone."""
    name, own = ("low_rank", {}) if structure == "control" else ("structured", {"structure": structure, "blocks": 2})
    settings = METHODS[name].settings(r=4, **{"guide_share": 0.5, **own})
    torch.manual_seed(0)
    model = METHODS[name].build_model(llama_config, settings, 0).double()
    layers = guided_layers(model)
    assert len(layers) == (14 if structure == "control" else 3)  # the first block's MLP is dense
    layer = layers[-1]
    W = dense_of(layer)
    np.testing.assert_allclose(layer.guide.detach().numpy(), W, atol=1e-7)  # the start, shuffles included
    with torch.no_grad():
        layer.guide.add_(torch.randn(layer.guide.shape))
    guide = layer.guide.detach().numpy().copy()
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    set_guide(model, 0.3)
    model.train()
    expected = 0.3 * x.numpy() @ guide.T + 0.7 * x.numpy() @ W.T
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-10)
    layer(x).sum().backward()
    np.testing.assert_allclose(layer.guide.grad.numpy(), 0.3 * np.ones((5, W.shape[0])).T @ x.numpy(), atol=1e-10)
    model.eval()
    np.testing.assert_allclose(layer(x).detach().numpy(), x.numpy() @ W.T, atol=1e-10)
    logits = model(input_ids=ids).logits
    assert torch.allclose(model.to_dense()(input_ids=ids).logits, logits, atol=1e-8)
    drop_guides(model)
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert not [key for key in model.state_dict() if "guide" in key]


def test_the_share_is_half_a_cosine():
    assert [guide_share(k, 10) for k in (0, 5, 10, 30)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert guide_share(3, 10) == pytest.approx((1 + math.cos(0.3 * math.pi)) / 2)
    assert guide_share(0, 0) == 0.0


def test_twelve_guided_steps_in_numpy():
    """A guided low-rank layer for the loss ½‖W x − t‖², AdamW in float64, guide gone after six steps."""
    layer = single("low_rank", 5, 7, 2)
    layer.guide = nn.Parameter(layer.dense_weight().clone())
    layer.base_layer.bias.requires_grad_(False)
    model, (A, B) = nn.Sequential(layer).train(), layer.factors()
    x, t = (torch.randn(6, size, dtype=torch.float64) for size in (7, 5))
    groups = [{"params": [A, B]}, {"params": [layer.guide]}]
    optimizer = GuidedAdamW(groups, lr=0.02, eps=1e-8, weight_decay=0.1)
    callback, state = GuideCallback(share=0.5), TrainerState(max_steps=12)
    callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
    numbers = {"A": A, "B": B, "G": layer.guide}
    numbers = {key: value.detach().numpy().copy() for key, value in numbers.items()}
    rows, bias, moments = x.numpy(), layer.base_layer.bias.numpy(), {}
    for step in range(1, 13):
        optimizer.zero_grad()
        (0.5 * (model(x) - t).square().sum()).backward()
        optimizer.step()
        state.global_step = step
        callback.on_step_end(None, state, None, model=model, optimizer=optimizer)
        share = (1 + math.cos(math.pi * (step - 1) / 6)) / 2 if step <= 6 else 0.0
        W = (1 - share) * numbers["B"] @ numbers["A"] + share * numbers["G"]
        gradient = (rows @ W.T + bias - t.numpy()).T @ rows
        gradients = {
            "A": (1 - share) * numbers["B"].T @ gradient,
            "B": (1 - share) * gradient @ numbers["A"].T,
            "G": share * gradient,
        }
        for key, own in gradients.items():
            m, v = moments.get(key, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * own, 0.999 * v + 0.001 * own**2
            moments[key] = m, v
            direction = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
            numbers[key] = numbers[key] * (1 - 0.02 * 0.1) - 0.02 * direction
        np.testing.assert_allclose(A.detach().numpy(), numbers["A"], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(B.detach().numpy(), numbers["B"], rtol=1e-9, atol=1e-9)
        if step < 6:
            np.testing.assert_allclose(layer.guide.detach().numpy(), numbers["G"], rtol=1e-9, atol=1e-9)
        assert (layer.guide is None) == (step >= 6)
    assert optimizer.param_groups[-1]["params"] == []
    assert set(optimizer.state) == {A, B}


# -- memory


def test_bytes_are_the_formulas():
    changes = ["training.per_device_train_batch_size=1"]
    guided = estimate(load_recipe(RECIPES / "llama_60m/structured.yaml", changes), device="cpu", sequence_length=16)
    alone = estimate(
        load_recipe(RECIPES / "llama_60m/structured.yaml", [*changes, "method.guide_share=0"]),
        device="cpu",
        sequence_length=16,
    )
    mlp = 7 * (2 * [(1376, 512)] + [(512, 1376)])
    factors = sum(256 * m + 256 * n // 4 for m, n in mlp)
    dense = 8 * 4 * 512 * 512 + 3 * 1376 * 512 + 17 * 512
    embeddings = 2 * 32_000 * 512
    assert (alone.factors, alone.dense, alone.frozen) == (4 * factors, 4 * dense, 0)
    assert alone.gradients == 4 * (factors + dense + embeddings)
    tensors = 8 * 4 + 3 + 17 + 2 + 2 * len(mlp)
    assert alone.moments == 8 * (factors + dense + embeddings) + 4 * tensors
    guide = sum(m * n for m, n in mlp)
    assert guided.dense == alone.dense + 4 * guide
    assert guided.gradients == alone.gradients + 4 * guide
    assert guided.moments == alone.moments + 8 * guide + 4 * len(mlp)


# -- under Trainer


@pytest.fixture(scope="module", params=["structured", "low_rank"])
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    train(str(folder), 8, request.param, **OWN[request.param])
    return request.param, folder


def test_the_guide_is_in_checkpoints_until_its_end_and_then_nowhere(uninterrupted):
    _, folder = uninterrupted
    for step in range(1, 9):
        guides = [key for key in weights(folder, step) if "guide" in key]
        assert len(guides) == (7 if step < 4 else 0)
        config = json.loads((folder / f"checkpoint-{step}/config.json").read_text())
        assert config["guided"] == (step < 4)
        state = torch.load(folder / f"checkpoint-{step}/optimizer.pt", weights_only=True)
        assert len(state["param_groups"][-1]["params"]) == (7 if step < 4 else 0)
        others = sum(len(group["params"]) for group in state["param_groups"][:-1])
        assert len(state["state"]) == others + (7 if step < 4 else 0)
        model = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}")
        assert len(guided_layers(model)) == len(guides)


@pytest.mark.parametrize(
    ("kill", "moment"), [(2, "save"), (3, "step"), (4, "save"), (6, "save")], ids=["guided", "last", "at", "after"]
)
def test_resume_after_sigkill_is_bit_exact(uninterrupted, tmp_path, kill, moment):
    name, whole = uninterrupted
    assert exit_of(forked(lambda: train(str(tmp_path), 8, name, kill=kill, moment=moment, **OWN[name]))) == -9
    train(str(tmp_path), 8, name, resume=str(tmp_path / f"checkpoint-{kill}"), **OWN[name])
    assert same(weights(tmp_path, 8), weights(whole, 8))


def test_two_processes_agree_bit_for_bit_and_with_one(uninterrupted, tmp_path):
    name, whole = uninterrupted
    first, second = in_two_processes(tmp_path, name=name, **OWN[name])
    assert same(first, second)
    alone = weights(whole, 8)
    assert first.keys() >= alone.keys()
    assert all(torch.allclose(first[key], tensor, atol=5e-5) for key, tensor in alone.items())


def test_a_run_by_a_recipe_resumes_on_both_sides_of_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path / "cache"))
    write_texts(tmp_path)
    path = write_recipe(tmp_path, "structured", 1, "alone", steps=8, saved=2)
    recipe = load_recipe(path, ["method.guide_share=0.5"])
    whole = pretrain(recipe, tmp_path / "whole")
    for last in (2, 4, 6):
        run = shutil.copytree(whole, tmp_path / f"resumed{last}")
        for step in range(last + 2, 9, 2):
            shutil.rmtree(run / f"checkpoint-{step}")
        pretrain(recipe, run)
        assert same(weights(run, 8), weights(whole, 8)), last
        assert len([key for key in weights(run, 2) if "guide" in key]) == 3


def test_an_export_of_either_part_gives_the_same_logits(uninterrupted, tmp_path):
    _, folder = uninterrupted
    ids = torch.arange(12).view(1, 12)
    for step in (2, 8):
        model = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}").eval()
        plain = AutoModelForCausalLM.from_pretrained(
            export(folder / f"checkpoint-{step}", tmp_path / f"{step}")
        ).eval()
        assert type(plain).__name__ == "LlamaForCausalLM"
        assert torch.allclose(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_fsdp2_is_refused_by_name(llama_config, tmp_path):
    def refused(rank, world):
        model = METHODS["low_rank"].build_model(llama_config, METHODS["low_rank"].settings(r=4, guide_share=0.5), 0)
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        with pytest.raises(UserError, match=r"guide_share must be 0 with sharded parameters \(FSDP2\).*got 0\.5"):
            GuideCallback(share=0.5).on_train_begin(None, TrainerState(max_steps=4), None, model=model, optimizer=None)
        return True

    assert in_processes(2, refused, tmp_path) == [True, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: single("block_dense", blocks=3), r"0: blocks must divide in_features = 8 with .* block_dense, got 3"),
        (lambda: single("block_dense", r=3), r"0: blocks must divide r = 3 with structure block_dense, got 2"),
        (lambda: single("block_shuffle", out=9), r"0: blocks must divide out_features = 9 .* block_shuffle, got 2"),
        (lambda: single("butterfly"), r"structure of StructuredConfig must be one of low_rank, block_dense, block_sh"),
        (lambda: single("low_rank", blocks=0), r"blocks of StructuredConfig must be an integer of at least 1, got 0"),
        (lambda: refactorise(nn.Sequential(single("low_rank"))), r"Sequential has Structured layers"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("structured", ["method.guide_share=2"], r"method\.guide_share: input should be less than or eq"),
        ("structured", ["method.structure=monarch"], r"method\.structure: input should be 'low_rank', 'bl"),
        ("structured", ["method.blocks=5"], r"model\.layers\.1\.mlp\.\w+: blocks must divide"),
        ("structured", ["method.target_modules=.*ffn.*"], r"target_modules .* matches no linear module"),
        ("low_rank", ["method.guide_share=0.5", "training.optim=adafactor"], r"guide_share must be 0 with training"),
        ("cola", ["method.guide_share=0.5"], r"unknown key 'method\.guide_share'"),
    ],
)  # fmt: skip
def test_bad_recipes(name, overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe(RECIPES / f"nano/{name}.yaml", overrides)


def test_without_a_guide_trainer_keeps_its_own_optimizer(llama_config, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, optim="adafactor")
    for name in ("structured", "low_rank"):
        settings = METHODS[name].settings(r=4, guide_share=0.0)
        model = METHODS[name].build_model(llama_config, settings, 0)
        assert METHODS[name].optimizer(model, settings, args) is None
