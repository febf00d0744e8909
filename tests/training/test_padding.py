"""Padding of batches needs no padding token of the model: every token of the text trains."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lowrank.errors import UserError
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.training.sequences import train_tokenizer
from tests.training.test_pretrain import mean_loss, state_of, trained

QWEN = {
    "architecture": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def save_tokenizer(folder, texts, kind):
    tokenizer = train_tokenizer([file.read_text() for file in sorted(texts.glob("train*.txt"))], 300)
    if kind == "padding = end of text":
        tokenizer.pad_token = tokenizer.eos_token
    elif kind == "no padding":
        tokenizer.pad_token = None
    elif kind == "neither":
        tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("shape", ["packed", "documents"])
@pytest.mark.parametrize("kind", ["padding = end of text", "no padding", "neither"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_every_token_of_the_text_trains(write_recipe, texts, tmp_path, architecture, kind, shape):
    save_tokenizer(tmp_path / "tokenizer", texts, kind)
    for number in range(30):  # short documents: many ends, and padding in batches of documents
        (texts / f"train_short{number}.txt").write_text(f"{'alpha beta gamma'[number % 8 :]}"[:9])
    changes = {} if architecture == "llama" else {"model": QWEN}
    path = write_recipe(
        data__tokenizer=str(tmp_path / "tokenizer"),
        data__vocabulary_size=None,
        data__shape=shape,
        data__evaluation_sequences=2,
        training__per_device_train_batch_size=32,
        **changes,
    )
    run = trained(path, tmp_path / "run")
    assert json.loads((run / "checkpoint-6" / "config.json").read_text()).get("pad_token_id") is None
    # The first id is the end of text where there is one, and was the padding of batches everywhere.
    rows = [
        load_file(run / f"checkpoint-{step}" / "model.safetensors")["model.embed_tokens.weight"] for step in (0, 6)
    ]
    assert (rows[0].norm(dim=1) > 0.3 * rows[0].norm(dim=1).mean()).all()
    evaluation = EvaluationSet.load(run)
    if shape == "packed" and kind != "neither":  # between documents; nothing follows it where they are not packed
        assert (rows[1] != rows[0]).any(1)[0]
    logged = [entry["eval_loss"] for entry in state_of(run, 6)["log_history"] if "eval_loss" in entry]
    assert logged[-1] == pytest.approx(mean_loss(run / "checkpoint-6", evaluation), rel=1e-5)


def test_a_padding_token_that_the_text_lacks_stays_the_models(write_recipe, tmp_path):
    run = trained(write_recipe(), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint-6")
    assert model.config.pad_token_id == model.model.embed_tokens.padding_idx == 1


def test_a_padding_token_of_the_text_is_refused(write_recipe, tmp_path):
    with pytest.raises(UserError, match=r"model\.pad_token_id must be a token that the text does not contain.* got 0"):
        trained(write_recipe(model__pad_token_id=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_architecture_that_counts_positions_from_its_padding_token_needs_one(write_recipe, texts, tmp_path):
    save_tokenizer(tmp_path / "tokenizer", texts, "padding = end of text")
    roberta = {
        "architecture": "roberta",
        "is_decoder": True,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 20,
    }
    path = write_recipe(model=roberta, data__tokenizer=str(tmp_path / "tokenizer"), data__vocabulary_size=None)
    with pytest.raises(UserError, match=r"cannot compute: .*; if it needs a padding token, choose a tokenizer"):
        trained(path, tmp_path / "run")
    # With a token of its own it trains, and positions that do not suffice are found before the run begins, too.
    roberta["max_position_embeddings"] = 16
    path = write_recipe(model=roberta, data__tokenizer=None, data__vocabulary_size=300)
    with pytest.raises(UserError, match=r"the model cannot compute: roberta.embeddings.*out of bounds"):
        trained(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    roberta["max_position_embeddings"] = 20
    assert (trained(write_recipe(model=roberta), tmp_path / "run") / "checkpoint-6").is_dir()


def test_a_run_keeps_the_padding_that_it_began_with(write_recipe, texts, tmp_path, monkeypatch):
    module = sys.modules["hf_lowrank.training.pretrain"]
    save_tokenizer(tmp_path / "tokenizer", texts, "padding = end of text")
    path = write_recipe(data__tokenizer=str(tmp_path / "tokenizer"), data__vocabulary_size=None)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_models_padding", lambda *_: 0)
        whole = trained(path, tmp_path / "whole")
        run = trained(path, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-6")
    one, two = (load_file(folder / "checkpoint-6" / "model.safetensors") for folder in (whole, trained(path, run)))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not one["model.embed_tokens.weight"][0].any()
