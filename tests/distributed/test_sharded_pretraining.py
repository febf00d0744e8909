"""pretrain under accelerate's FSDP2: every method, and a run that goes on with another number of processes."""

import json
import random
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_lowrank.checkpoints import Trajectory
from hf_lowrank.training.pretrain import pretrain
from hf_lowrank.training.recipe import load_recipe
from tests.distributed.processes import in_processes
from tests.distributed.sharded_training import FSDP, free_port, launched

OWN = {
    "full_rank": {},
    "galore": {"rank": 4, "update_proj_gap": 3},
    "fira": {"rank": 4, "update_proj_gap": 3},
    "apollo": {"rank": 4, "update_proj_gap": 3},
    "apollo_mini": {"update_proj_gap": 3},
    "frugal": {"rank": 4, "update_proj_gap": 3},
    "muon": {},
    "relora": {"r": 4, "restart_every": 3, "restart_warmup_steps": 1},
    "cola": {"r": 4},
    "sltrain": {"r": 4},
    "low_rank": {"r": 4},
}
STEPS, SAVED, BATCH = 8, 4, 8


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def write_recipe(tmp_path):
    generator = random.Random(0)
    for number in range(6):
        words = [f"{generator.choice(['alpha', 'beta', 'gamma'])}{generator.randrange(90)}" for _ in range(500)]
        (tmp_path / f"text{number}.txt").write_text(" ".join(words))

    def write(name, world, sharded):
        recipe = {
            "method": {"name": name, **OWN[name]},
            "model": {
                "architecture": "llama",
                "hidden_size": 16,
                "intermediate_size": 42,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
            },
            "data": {
                "source": "files",
                "train_files": ["text[1-9].txt"],
                "held_out_files": ["text0.txt"],
                "sequence_length": 16,
                "vocabulary_size": 301,
                "evaluation_sequences": 8,
            },
            "training": {
                "max_steps": STEPS,
                "save_steps": SAVED,
                "per_device_train_batch_size": BATCH // world,
                "learning_rate": 1e-2,
                "weight_decay": 0.1,
                "logging_steps": 1,
                **(FSDP if sharded else {}),
            },
        }
        path = tmp_path / f"{name}{world}{sharded}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **recipe}))
        return path

    return write


def trained(path, run, world, sharded=True):
    def job(rank, world):
        if sharded:
            launched(rank, world)
        pretrain(load_recipe(path), run)
        return True

    in_processes(world, job, run.parent / "meet", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    shutil.rmtree(run.parent / "meet")


def losses(run):
    history = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return {
        (entry["step"], key): entry[key]
        for entry in history
        for key in ("loss", "eval_loss", "grad_norm")
        if key in entry
    }


@pytest.mark.parametrize("names", [["galore"], pytest.param([*OWN], marks=pytest.mark.drill)], ids=["short", "long"])
@pytest.mark.timeout(1800)
def test_sharded_runs_are_those_of_one_process(tmp_path, write_recipe, names):
    for name in names:
        alone = pretrain(load_recipe(write_recipe(name, 1, False)), tmp_path / f"{name}-alone")
        run = tmp_path / f"{name}-2"
        trained(write_recipe(name, 2, True), run, 2)
        assert losses(run) == pytest.approx(losses(alone), abs=1e-4), name
        ends = [load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors") for folder in (alone, run)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.allclose(ends[1][key], tensor, atol=2e-4) for key, tensor in ends[0].items()), name
        assert Trajectory(run).steps == [0, SAVED, STEPS]
        for world in (1, 4):
            other = tmp_path / f"{name}-{world}"
            shutil.copytree(run, other)
            shutil.rmtree(other / f"checkpoint-{STEPS}")
            trained(write_recipe(name, world, True), other, world)
            assert losses(other) == pytest.approx(losses(run), abs=1e-4), (name, world)
