"""A run directory as training leaves it, made by hand: held-out files on disk, a small tokenizer, small models."""

import json
import os
import random

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank.downstream import TASK_FOLDER, catalogue
from hf_lowrank.downstream import runner as runner_module
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.training.sequences import train_tokenizer

LENGTH = 96
STEPS = (0, 5, 10)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    os.environ["HF_LOWRANK_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def held_out():
    from hf_lowrank.downstream.items import held_out_sources

    return held_out_sources({"data": {"source": "python-library", "sequence_length": LENGTH}}, "run")


@pytest.fixture(scope="session")
def tokenizer(held_out):
    return train_tokenizer((source.text for source in held_out), 2048)


def write_run(folder, tokenizer, *, seed=0, steps=STEPS, hidden=32, method="full_rank"):
    """A run directory whose checkpoints are random models."""
    torch.manual_seed(seed)
    recipe = {
        "name": folder.name,
        "seed": seed,
        "method": {"name": method},
        "model": {"architecture": "llama"},
        "data": {"source": "python-library", "sequence_length": LENGTH},
        "training": {"max_steps": 10},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tokenizer.save_pretrained(folder / "tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    for step in steps:
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder / f"checkpoint-{step}")
        if step:
            tokenizer.save_pretrained(folder / f"checkpoint-{step}")
    ids = torch.randint(2, len(tokenizer), (8, 32))
    EvaluationSet(ids, torch.ones_like(ids)).save(folder)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, tokenizer):
    return write_run(tmp_path_factory.mktemp("runs") / "run-a", tokenizer)


@pytest.fixture(scope="session")
def other_run(tmp_path_factory, tokenizer):
    return write_run(tmp_path_factory.mktemp("runs") / "run-b", tokenizer, seed=1)


@pytest.fixture(scope="session")
def make_run():
    return write_run


@pytest.fixture
def few_shot(tmp_path, monkeypatch):
    """A task of other people's: examples drawn for the prompt, and numbers for ids, of which two are equal."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rng = random.Random(0)
    for split, count in (("train", 40), ("test", 12)):
        lines = [{"id": max(1, i), "word": "".join(rng.choices("abcdef", k=4))} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "spell",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "test")}},
        "output_type": "loglikelihood",
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "num_fewshot": 2,
        "doc_to_text": "spell {{word}}:",
        "doc_to_target": "{{word}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        "metadata": {"version": 1.0},
    }
    (folder / "spell.yaml").write_text(json.dumps(task))
    monkeypatch.setattr(catalogue, "TASK_FOLDERS", [TASK_FOLDER, folder])
    monkeypatch.setattr(runner_module, "expand_tasks", lambda names: (names, []))
    monkeypatch.setattr(runner_module, "OWN", ("spell", "none_such"))
    return folder
