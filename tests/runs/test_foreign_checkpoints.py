"""Checkpoints that come from elsewhere: pickles, adapters, quantised weights, other names, few positions."""

import json
import math
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM

from hf_lowrank import Trajectory
from hf_lowrank.adapters.methods import CoLASettings, ReLoraSettings
from hf_lowrank.adapters.modeling import build_adapted
from hf_lowrank.cli import main
from hf_lowrank.cli.look import MOST_REASONS
from hf_lowrank.errors import LowRankWarning, UserError
from hf_lowrank.measuring import measure
from hf_lowrank.runs.export import export
from hf_lowrank.runs.selection import evaluation_set_from_text, resolve_evaluation_set
from hf_lowrank.runs.weights import positions_of, read_config
from hf_lowrank.training.sequences import train_tokenizer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "pad_token_id": None,
}
GEMMA = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
GEMMA += ["num_key_value_heads", "hidden_size_per_layer_input", "vocab_size_per_layer_input"]
TEXT = "the quick brown fox jumps over the lazy dog and runs away from the slow red cat "


def small_llama(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, "num_attention_heads": 4, "max_position_embeddings": 64, **changes})
    )


@pytest.mark.parametrize("single", [True, False])
def test_pickled_weights_are_refused_once_with_what_to_do(tmp_path, single):
    folder = tmp_path if single else tmp_path / "checkpoint-1"
    model = small_llama()
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    about = "pytorch_model.bin is a pickle, which is not read; save the model with save_pretrained"
    if single:
        with pytest.raises(UserError, match=about):
            Trajectory(tmp_path)
    else:
        with pytest.warns(UserWarning, match=about), pytest.raises(UserError, match="no complete checkpoint"):
            Trajectory(tmp_path)


def test_a_text_is_cut_into_sequences_that_the_model_has_positions_for(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + (TEXT * 40).encode())
    (tmp_path / "plain.txt").write_text(TEXT * 40)
    for positions, length in ((64, 64), (1024, 256)):
        folder = tmp_path / f"model{positions}"
        small_llama(max_position_embeddings=positions).save_pretrained(folder)
        tokenizer = train_tokenizer([TEXT], 300)
        tokenizer.save_pretrained(folder)
        sequences, plain = (
            evaluation_set_from_text(tmp_path / name, Trajectory(folder)) for name in ("text.txt", "plain.txt")
        )
        ids = tokenizer(TEXT * 40)["input_ids"]
        assert sequences.input_ids.shape == (len(ids) // length, length)
        assert sequences.input_ids.flatten().tolist() == ids[: len(ids) // length * length]
        assert sequences.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("text.txt", "model: has no tokenizer, which a text needs; save one there with save_pretrained"),
        ("missing.txt", "missing.txt: no such text file"),
        ("missing.safetensors", "missing.safetensors: no such evaluation set"),
        (
            "text.md",
            "text.md: not a readable evaluation set: .*; it must be a safetensors file, or a text named .*txt",
        ),
    ],
)
def test_held_out_files_that_cannot_be_read_are_named(tmp_path, file, message):
    small_llama().save_pretrained(tmp_path / "model")
    for name in ("text.md", "text.txt"):
        (tmp_path / name).write_text(TEXT * 40)
    with pytest.raises(UserError, match=message):
        resolve_evaluation_set(tmp_path / file, Trajectory(tmp_path / "model"))


def test_an_export_of_what_is_not_there_is_named(tmp_path):
    run = tmp_path / "run"
    small_llama().save_pretrained(run / "checkpoint-2")
    for named, message in (
        (f"{run}@zz", f"{run}@zz: after the @ must be a step, such as {run}@400, or last, got 'zz'"),
        (f"{run}@3", f"{run}: no checkpoint of step 3; there are: 2"),
        ("nowhere/run@3", "nowhere/run: no such folder"),
        ("nowhere.md", "nowhere.md: no such folder"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            export(named, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_the_command_says_why_values_are_missing(tmp_path, capsys):
    small_llama().save_pretrained(tmp_path / "theirs" / "checkpoint-1")
    with pytest.raises(SystemExit) as stop:
        main(["measure", str(tmp_path / "theirs"), "--metrics", "loss,activation_cka,method_barrier"])
    assert stop.value.code == 0
    first, *reasons = capsys.readouterr().out.splitlines()
    assert first == "3 measurements of 1 run, 3 without a value"
    assert reasons[0].startswith("  no loss: ")
    assert "give sequences with --evaluation-set" in reasons[0]
    assert reasons[1].startswith("  no activation_cka, method_barrier: no baseline")
    assert len(reasons) == 2
    with pytest.raises(SystemExit):
        main(["measure", str(tmp_path / "theirs"), "--metrics", "weight_stable_rank"])
    assert len(capsys.readouterr().out.splitlines()) == 1  # what is missing was not asked for


def test_the_command_names_few_of_many_reasons(tmp_path, capsys):
    for step in range(1, 9):
        small_llama().save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        (tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(SystemExit):
        main(["measure", str(tmp_path / "run"), "--metrics", "weight_stable_rank"])
    _, *reasons = capsys.readouterr().out.splitlines()
    assert len(reasons) == MOST_REASONS + 1
    assert reasons[-1] == "  and 3 more reasons, in measurements.jsonl"


def test_checkpoints_of_a_run_may_differ_in_whether_they_are_quantised(tmp_path):
    for step in (1, 2):
        small_llama(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    meant = quantise(tmp_path / "run" / "checkpoint-2", 16)
    trajectory = Trajectory(tmp_path / "run")
    for step, weights in ((1, load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")), (2, meant)):
        for module in trajectory.targets:
            read = trajectory.dense_weight(step, module)
            assert torch.allclose(read, weights[f"{module}.weight"], rtol=1e-6, atol=1e-9)


def test_quantised_weights_are_exported_dense(tmp_path):
    folder = tmp_path / "run" / "checkpoint-1"
    small_llama(hidden_size=64, intermediate_size=96).save_pretrained(folder)
    meant = quantise(folder, 16)
    exported = export(f"{tmp_path / 'run'}@1", tmp_path / "dense")
    stored = load_file(exported / "model.safetensors")
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    for name, weight in meant.items():
        assert torch.allclose(stored[name].float(), weight, rtol=1e-6, atol=1e-9)


def quantise(folder, edge):
    """Replaces a checkpoint's projections by float8 codes with a scale for each block; returns what they stand for."""
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if "_proj" in name:
            rows, columns = weight.shape
            blocks = weight.view(rows // edge, edge, columns // edge, edge)
            spread = torch.linspace(1, 2, columns // edge)[None, None, :, None]  # scales that differ
            scales = blocks.abs().amax((1, 3), keepdim=True) / 448 * spread
            codes = (blocks / scales).to(torch.float8_e4m3fn)
            stored[name] = codes.view(rows, columns)
            stored[name.replace("weight", "weight_scale_inv")] = scales[:, 0, :, 0].contiguous()
            meant[name] = (codes.float() * scales).view(rows, columns)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [edge, edge],
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def test_spectra_of_quantised_weights_are_those_of_what_they_stand_for(tmp_path):
    folder = tmp_path / "run" / "checkpoint-1"
    small_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=1).save_pretrained(folder)
    meant = quantise(folder, 16)
    trajectory = Trajectory(folder.parent)
    for module in trajectory.targets:
        assert torch.allclose(trajectory.dense_weight(1, module), meant[f"{module}.weight"], rtol=1e-6, atol=1e-9)
    rows = measure(folder.parent, metrics=["weight_effective_rank"])
    by_hand = []
    for module in trajectory.targets:
        sigma = np.linalg.svd(meant[f"{module}.weight"].double().numpy(), compute_uv=False)
        share = sigma / sigma.sum()
        by_hand.append(np.exp(-(share * np.log(share)).sum()) / len(sigma))
    (value,) = [row.value for row in rows if row.scope == "model"]
    assert value == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert trajectory.model(1).dtype == torch.float32


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8"])
def test_codes_that_nothing_explains_are_not_taken_for_weights(tmp_path, kind):
    folder = tmp_path / "run" / "checkpoint-1"
    small_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=1).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    stored[name] = (stored[name] * 1000).to(getattr(torch, kind))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    trajectory = Trajectory(folder.parent)
    message = f"{re.escape(name)} is stored as codes of type .*, and config.json has no quantization_config"
    with pytest.raises(UserError, match=message):
        trajectory.dense_weight(1, name.removesuffix(".weight"))
    with pytest.raises(UserError, match=message):
        trajectory.model(1)
    (rank,) = measure(folder.parent, metrics=["weight_effective_rank"])
    assert math.isnan(rank.value)
    assert re.search(message, rank.reason)


def test_weights_whose_library_is_missing_are_null_with_the_reason(tmp_path):
    folder = tmp_path / "run" / "checkpoint-1"
    small_llama().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    (row,) = measure(folder.parent, metrics=["weight_effective_rank"])
    assert row.value is None or math.isnan(row.value)
    assert "its weights (bitsandbytes) dequantised" in row.reason


@pytest.mark.parametrize("architecture", ["deepseek_v4", "kimi_linear"])
def test_targets_that_are_stored_under_other_names_have_spectra(tmp_path, architecture):
    folder = tmp_path / "run" / "checkpoint-1"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES))
        model.save_pretrained(folder)
        trajectory = Trajectory(folder.parent)
        stored = set(trajectory.tensor_names(1))
        renamed = [name for name in trajectory.targets if f"{name}.weight" not in stored]
        assert renamed
        weights = dict(model.named_parameters())
        for module in trajectory.targets:
            assert torch.equal(trajectory.dense_weight(1, module), weights[f"{module}.weight"])
        rows = {row.scope: row for row in measure(folder.parent, metrics=["weight_stable_rank"])}
    sigma = np.linalg.svd(weights[f"{renamed[0]}.weight"].detach().double().numpy(), compute_uv=False)
    assert rows[renamed[0]].value == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-5)
    assert rows["model"].reason is None


def test_adapted_targets_that_are_stored_under_other_names_have_spectra(tmp_path):
    folder = tmp_path / "run" / "checkpoint-1"
    config = AutoConfig.for_model("axk2", **SIZES, first_k_dense_replace=1, n_group=1, topk_group=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_adapted(config, ReLoraSettings(r=4), seed=0)
        model.save_pretrained(folder)
        trajectory = Trajectory(folder.parent)
        stored = trajectory.tensor_names(1)
        renamed = [name for name in trajectory.targets if not any(f"lm.{name}." in tensor for tensor in stored)]
        assert renamed
        for name in trajectory.targets:
            layer = model.lm.get_submodule(name)
            probe = torch.eye(layer.in_features)
            with torch.no_grad():
                by_hand = (layer(probe) - (0 if layer.bias is None else layer.bias)).T
            assert torch.allclose(trajectory.dense_weight(1, name), by_hand, atol=1e-5)
        rows = {row.scope: row for row in measure(folder.parent, metrics=["weight_stable_rank"])}
    assert rows["model"].reason is None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path / "cache"))


def save_adapter(folder, base, **options):
    """A LoRA of random factors on the model in the folder `base`; returns what its merged weights are."""
    model = LlamaForCausalLM.from_pretrained(base)
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], **options))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    stored = load_file(folder / "adapter_model.safetensors")
    for name, A in stored.items():
        if "lora_A" in name:
            B = stored[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + 1.5 * B.double().numpy() @ A.double().numpy()
    return weights


def test_adapters_are_measured_and_exported_on_their_base(tmp_path, cache):
    base, run = tmp_path / "base", tmp_path / "run"
    small_llama().save_pretrained(base)
    train_tokenizer([TEXT], 300).save_pretrained(base)
    meant = {step: save_adapter(run / f"checkpoint-{step}", base) for step in (1, 2)}
    (tmp_path / "text.txt").write_text(TEXT * 40)
    trajectory = Trajectory(run)
    assert trajectory.steps == [1, 2]
    for step, weights in meant.items():
        for module in trajectory.targets:
            assert np.allclose(trajectory.dense_weight(step, module).numpy(), weights[f"{module}.weight"], atol=1e-6)
    rows = measure(run, metrics=["loss", "update_stable_rank"], evaluation_set=tmp_path / "text.txt")
    losses = {row.step: row.value for row in rows if row.metric == "loss"}
    count = next(row.settings["sequences"] for row in rows if row.metric == "loss")
    sequences = evaluation_set_from_text(tmp_path / "text.txt", trajectory).first(count).input_ids
    for step, weights in meant.items():
        model = LlamaForCausalLM.from_pretrained(base).double()
        model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in weights.items()})
        with torch.no_grad():
            logs = torch.log_softmax(model(sequences).logits[:, :-1], -1)
        assert losses[step] == pytest.approx(-logs.gather(-1, sequences[:, 1:, None]).mean().item(), rel=1e-5)
    scope = "model.layers.0.self_attn.q_proj"
    (rank,) = [row.value for row in rows if row.step == 2 and row.scope == scope]
    sigma = np.linalg.svd(meant[2][f"{scope}.weight"] - meant[1][f"{scope}.weight"], compute_uv=False)
    assert rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-4)
    exported = export(f"{run}@2", tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(exported)
    for name, tensor in model.state_dict().items():
        assert np.allclose(tensor.numpy(), meant[2][name], atol=1e-6)
    assert (exported / "tokenizer.json").is_file()
    # One adapter alone, and a base model that changes under its name.
    assert Trajectory(run / "checkpoint-1").steps == [1]
    changed = small_llama()
    torch.nn.init.zeros_(changed.model.layers[0].self_attn.q_proj.weight)
    changed.save_pretrained(base)
    weight = Trajectory(run).dense_weight(1, "model.layers.0.self_attn.q_proj")
    assert torch.linalg.matrix_rank(weight) == 4


def test_an_adapter_with_more_tokens_than_its_base_brings_their_embeddings(tmp_path, cache):
    base, folder = tmp_path / "base", tmp_path / "run" / "checkpoint-1"
    small_llama().save_pretrained(base)
    larger = LlamaForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(320)
    tuned = get_peft_model(larger, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(folder)
    state = torch.get_rng_state()
    read = Trajectory(folder.parent).model(1)
    assert torch.equal(state, torch.get_rng_state())
    ids = torch.arange(0, 320, 17)[None]
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, tuned.merge_and_unload().eval()(ids).logits, atol=1e-6)


def test_an_adapter_that_changes_no_weights_is_named(tmp_path, cache):
    small_llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    prefix = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    prefix.save_pretrained(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(UserError, match="PREFIX_TUNING changes no weights, so there is nothing to merge"):
        Trajectory(tmp_path / "run").model(1)


def test_a_pickled_adapter_is_named(tmp_path):
    folder = tmp_path / "run" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.warns(LowRankWarning, match=r"adapter_model\.bin is a pickle"), pytest.raises(UserError):
        Trajectory(tmp_path / "run")


def test_positions_of_another_name_bound_a_text(tmp_path):
    sizes = {"vocab_size": 300, "d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}
    MptForCausalLM(MptConfig(**sizes)).save_pretrained(tmp_path / "model")
    tokenizer = train_tokenizer([TEXT * 40], 300)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 40)
    held_out = evaluation_set_from_text(tmp_path / "text.txt", Trajectory(tmp_path / "model"))
    assert held_out.input_ids.shape[1] == 64
    assert positions_of(SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=-1))) is None


def test_code_of_a_configuration_is_not_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    code = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(code))
    (tmp_path / "own.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match=r"config\.json: not a readable configuration: .*trust_remote_code"):
        read_config(tmp_path)


def test_an_adapter_without_its_base_is_named(tmp_path, cache):
    base, folder = tmp_path / "base", tmp_path / "run" / "checkpoint-1"
    small_llama().save_pretrained(base)
    save_adapter(folder, base)
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"checkpoint-1: its adapter cannot be merged into .*base"):
        Trajectory(tmp_path / "run").dense_weight(1, "model.layers.0.self_attn.q_proj")


def test_a_model_with_a_field_for_each_layer_is_saved_with_adapters(tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64}
    config = AutoConfig.for_model("gemma4_text", **{key: sizes[key] for key in GEMMA})
    model = build_adapted(config, CoLASettings(r=4), seed=0).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)
