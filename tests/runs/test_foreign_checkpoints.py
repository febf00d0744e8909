"""Checkpoints that come from elsewhere: pickles, adapters, quantised weights, other names, few positions."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lowrank import Trajectory
from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure
from hf_lowrank.runs.selection import evaluation_set_from_text
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
