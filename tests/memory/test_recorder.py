"""Runs that record their memory: the entry in facts.json, and that nothing else changes."""

import json
import logging
import shutil
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_lowrank.memory import MemoryRecorder, estimate, memory_recorder
from hf_lowrank.memory.recorder import AllocatorPeak
from hf_lowrank.training import load_recipe
from hf_lowrank.training import pretrain as pretrain_unrecorded

pretrain = partial(pretrain_unrecorded, recorder=memory_recorder)

KEYS = {"weights", "gradients", "optimizer_state", "activations", "workspace", "estimated_peak", "measured_peak"}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path / "cache"))
    for number in range(6):
        (tmp_path / f"text{number}.txt").write_text(" ".join(f"word{(number + i * i) % 37}" for i in range(400)))

    def write(method=None, **training):
        plain = {
            "method": method or {"name": "galore", "rank": 4, "update_proj_gap": 3},
            "model": {
                "architecture": "llama",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
            },
            "data": {
                "source": "files",
                "train_files": ["text[0-4].txt"],
                "held_out_files": ["text5.txt"],
                "sequence_length": 16,
                "vocabulary_size": 300,
                "evaluation_sequences": 8,
            },
            "training": {
                "learning_rate": 0.003,
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4,
                "save_steps": 2,
                "logging_steps": 1,
                **training,
            },
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
        return load_recipe(tmp_path / "recipe.yaml")

    return write


def memory_of(run):
    return json.loads((run / "facts.json").read_text())["memory"]


def test_a_run_logs_the_estimated_and_the_measured_peak(recipe, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "hf_lowrank")
    run = pretrain(recipe(), tmp_path / "run")
    memory = memory_of(run)
    assert set(memory) == KEYS
    facts = json.loads((run / "facts.json").read_text())
    assert memory["weights"] == pytest.approx(4 * facts["parameters"], abs=100)
    assert memory["gradients"] == 4 * facts["trainable_parameters"]
    assert memory["optimizer_state"] == facts["optimizer_state_bytes"]
    assert memory["measured_peak"] == pytest.approx(memory["estimated_peak"], rel=0.05)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_lowrank.memory")]
    assert len(said) == 2
    assert "estimated peak" in said[0]
    assert "measured" in said[1]
    assert not torch.autograd._profiler_enabled()

    # Recording changes no bit: the same run without it, and resumed from its middle.
    plain = pretrain_unrecorded(recipe(), tmp_path / "plain")
    assert "memory" not in json.loads((plain / "facts.json").read_text())
    one, other = (load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (run, plain))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    # A resumed run keeps what was measured before.
    shutil.rmtree(run / "checkpoint-4")
    monkeypatch.setattr(AllocatorPeak, "start", lambda *_: pytest.fail("measured again"))
    pretrain(recipe(), run)
    assert memory_of(run)["measured_peak"] == memory["measured_peak"]


def test_a_failed_training_leaves_no_profiler_running(recipe, tmp_path, monkeypatch):
    from hf_lowrank.optim import GaLoreAdamW

    def fail(*_):
        raise RuntimeError("broken")

    prepared = recipe()
    monkeypatch.setattr("hf_lowrank.memory.recorder.estimate", fail)
    monkeypatch.setattr(GaLoreAdamW, "update", fail)
    with pytest.raises(RuntimeError, match="broken"):
        pretrain(prepared, tmp_path / "run")
    assert not torch.autograd._profiler_enabled()


def test_a_run_without_an_estimate_is_measured(recipe, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise NotImplementedError("no such kernel\nand more")

    monkeypatch.setattr("hf_lowrank.memory.recorder.estimate", fail)
    memory = memory_of(pretrain(recipe(), tmp_path / "run"))
    assert memory["estimated_peak"] is memory["weights"] is None
    assert memory["measured_peak"] > 10**5
    assert "no estimate: NotImplementedError: no such kernel" in caplog.text


def test_a_large_evaluation_is_measured_too(recipe, tmp_path):
    """Evaluation batches of four times the training's, two of them; GaLore's first step would need more still."""
    full_rank = {"name": "full_rank"}
    prepared = recipe(full_rank, per_device_train_batch_size=1, per_device_eval_batch_size=4, max_steps=2)
    run = pretrain(prepared, tmp_path / "run")
    found = estimate(prepared)
    memory = memory_of(run)
    assert found.peak_phase == "evaluation"
    assert memory["measured_peak"] == pytest.approx(memory["estimated_peak"], rel=0.1)


def test_nothing_is_measured_while_the_profiler_is_in_use(tiny):
    facts = {}
    recorder = MemoryRecorder(estimate(tiny("full_rank")), facts)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert AllocatorPeak().start(torch.nn.Linear(2, 2)) is False
    recorder.close()
    assert facts["memory"]["measured_peak"] is None
    assert facts["memory"]["estimated_peak"] > 0
