"""Trajectories over folders: what is read, what is skipped, what is an error."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lowrank.errors import UserError
from hf_lowrank.runs.trajectory import Trajectory


def test_a_run_directory(two_runs):
    run = Trajectory(two_runs[1])
    assert run.steps == [0, 10, 20]
    assert (run.run.name, run.run.method, run.run.seed) == ("galore-0", "galore", 0)
    assert len(run.targets) == 14
    assert run.targets[0] == "model.layers.0.self_attn.q_proj"
    assert run.dense_weight_kind == "exact"
    assert run.low_rank_factors(10, run.targets[0]) is None
    assert run.log_history() == [{"step": 20, "loss": 4.0}]
    assert len(run.evaluation_set()) == 6
    model = run.model(20)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name in run.targets:
        assert torch.equal(run.dense_weight(20, name), model.get_submodule(name).weight)


def test_plain_folders_and_single_checkpoints(two_runs):
    folder = two_runs[0]
    for file in ("recipe.yaml", "evaluation.safetensors"):
        (folder / file).unlink()
    plain = Trajectory(folder)
    assert plain.run.method == "unknown"
    assert plain.run.recipe is None
    with pytest.raises(UserError, match="evaluation-set"):
        plain.evaluation_set()
    one = Trajectory(folder / "checkpoint-10")
    assert one.steps == [10]
    assert one.run.name == "full_rank-0"
    (folder / "checkpoint-10").rename(folder / "final")
    assert Trajectory(folder / "final").steps == [10]


def test_conv1d_weights_are_turned_and_base_names_found(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8))
    model.save_pretrained(tmp_path / "checkpoint-1")
    shape = (48, 16)
    run = Trajectory(tmp_path)
    assert run.dense_weight(1, "transformer.h.0.attn.c_attn").shape == shape
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(stripped, file, metadata={"format": "pt"})
    run = Trajectory(tmp_path)
    expected = model.transformer.h[0].attn.c_attn.weight.T
    assert torch.equal(run.dense_weight(1, "transformer.h.0.attn.c_attn"), expected)


def test_sharded_checkpoints(two_runs):
    run = Trajectory(two_runs[0])
    expected = run.dense_weight(20, run.targets[5])
    run.model(20).save_pretrained(two_runs[0] / "checkpoint-30", max_shard_size="20KB")
    shards = sorted((two_runs[0] / "checkpoint-30").glob("model-*.safetensors"))
    assert len(shards) > 1
    again = Trajectory(two_runs[0])
    assert torch.equal(again.dense_weight(30, run.targets[5]), expected)
    shards[0].unlink()
    with pytest.raises(UserError, match=shards[0].name):
        Trajectory(two_runs[0]).model(30)


def test_half_written_checkpoints_are_skipped_with_a_warning(two_runs):
    folder = two_runs[0]
    (folder / "checkpoint-30").mkdir()
    shutil.copytree(folder / "checkpoint-20", folder / "checkpoint-40")
    (folder / "checkpoint-40" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="incomplete") as warned:
        assert Trajectory(folder).steps == [0, 10, 20]
    assert len(warned) == 2


def test_damage_is_named(two_runs):
    folder = two_runs[0]
    weights = folder / "checkpoint-10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run = Trajectory(folder)
    for read in (run.model, lambda step: run.dense_weight(step, run.targets[0])):
        with pytest.raises(UserError, match=r"checkpoint-10.model\.safetensors"):
            read(10)
    config = folder / "checkpoint-20" / "config.json"
    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json|checkpoint-20"):
        run.model(20)


def test_what_is_not_there_is_named(two_runs, tmp_path):
    run = Trajectory(two_runs[0])
    with pytest.raises(UserError, match="no checkpoint of step 15"):
        run.model(15)
    with pytest.raises(UserError, match=r"no tensor 'x'"):
        run.tensor(10, "x")
    with pytest.raises(UserError, match="no target module"):
        run.dense_weight(10, "lm_head")
    with pytest.raises(UserError, match="no such folder"):
        Trajectory(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        Trajectory(tmp_path / "empty")
    pickled = tmp_path / "pickled" / "checkpoint-5"
    pickled.mkdir(parents=True)
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    (pickled / "config.json").write_text((two_runs[0] / "checkpoint-0" / "config.json").read_text())
    with pytest.raises(UserError, match="pickle"):
        Trajectory(tmp_path / "pickled").model(5)


def test_a_configuration_that_does_not_fit_the_weights(two_runs):
    file = two_runs[0] / "checkpoint-0" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "intermediate_size": 40}))
    run = Trajectory(two_runs[0])
    with pytest.raises(UserError, match="shape"):
        run.dense_weight(10, "model.layers.0.mlp.up_proj")
