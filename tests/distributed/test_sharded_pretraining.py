"""pretrain under accelerate's FSDP2: every method, and a run that goes on with another number of processes."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_lowrank.checkpoints import Trajectory
from hf_lowrank.errors import UserError
from hf_lowrank.optim.engines import refuse_engines
from hf_lowrank.training.facts import write_facts
from hf_lowrank.training.pretrain import pretrain
from hf_lowrank.training.recipe import load_recipe
from hf_lowrank.training.resume import SHARDED_STATE, damage_of
from tests.distributed.processes import in_processes
from tests.distributed.sharded_training import FSDP, free_port, launched

OWN = {
    "full_rank": {},
    "galore": {"rank": 4, "update_proj_gap": 2},
    "fira": {"rank": 4, "update_proj_gap": 2},
    "apollo": {"rank": 4, "update_proj_gap": 2},
    "apollo_mini": {"update_proj_gap": 2},
    "frugal": {"rank": 4, "update_proj_gap": 2},
    "muon": {},
    "relora": {"r": 4, "restart_every": 2, "restart_warmup_steps": 1},
    "cola": {"r": 4},
    "sltrain": {"r": 4},
    "low_rank": {"r": 4},
}
STEPS, SAVED, BATCH = 6, 3, 8


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
    """`path`'s run in processes; without FSDP in the recipe it is DDP."""

    def job(rank, world):
        launched(rank, world, on_accelerators=sharded)
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


def check_same(alone, run):
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4), run
    ends = [load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors") for folder in (alone, run)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.allclose(ends[1][key], tensor, atol=2e-4) for key, tensor in ends[0].items()), run


@pytest.mark.parametrize(
    ("names", "worlds", "resumed"),
    [
        pytest.param(["galore"], [(True, 2)], (1,), id="short"),
        pytest.param([*OWN], [(True, 2), (True, 4), (False, 2)], (1, 4), id="long", marks=pytest.mark.drill),
    ],
)
@pytest.mark.timeout(3600)
def test_runs_in_processes_are_those_of_one(tmp_path, write_recipe, names, worlds, resumed):
    for name in names:
        alone = pretrain(load_recipe(write_recipe(name, 1, False)), tmp_path / f"{name}-alone")
        for sharded, world in worlds:
            run = tmp_path / f"{name}-{world}-{sharded}"
            trained(write_recipe(name, world, sharded), run, world, sharded)
            check_same(alone, run)
            assert Trajectory(run).steps == [0, SAVED, STEPS]
        for world in resumed:
            other = tmp_path / f"{name}-resumed-{world}"
            shutil.copytree(tmp_path / f"{name}-2-True", other)
            shutil.rmtree(other / f"checkpoint-{STEPS}")
            trained(write_recipe(name, world, True), other, world)
            check_same(alone, other)


def test_what_does_not_fit_a_run_is_said(tmp_path, write_recipe, monkeypatch):
    path = write_recipe("full_rank", 1, False)
    run = pretrain(load_recipe(path), tmp_path / "run")
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    facts = json.loads((run / "facts.json").read_text())
    write_facts(run, {**facts, "processes": 2, "sequences_per_step": 2 * BATCH})
    with pytest.raises(UserError, match=f"a step must have {2 * BATCH} sequences, .* got {BATCH} on 1 processes"):
        pretrain(load_recipe(path), run)
    write_facts(run, facts)
    with pytest.raises(UserError, match=r"per_device_train_batch_size is 4 now, 8 there"):
        pretrain(load_recipe(path, ["training.per_device_train_batch_size=4"]), run)
    for name in SHARDED_STATE:
        (run / f"checkpoint-{SAVED}" / name).mkdir()
        assert damage_of(run / f"checkpoint-{SAVED}") is not None
    for name in SHARDED_STATE:
        (run / f"checkpoint-{SAVED}" / name / ".metadata").touch()
    with pytest.raises(UserError, match=r"checkpoint-3 was written under FSDP2; continue the run with FSDP2"):
        pretrain(load_recipe(path), run)


def test_engines_that_flatten_are_refused_before_anything_is_written(tmp_path, write_recipe, monkeypatch):
    path = write_recipe("galore", 1, False)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", "1")
        with pytest.raises(UserError, match="FSDP1 flattens weights; use FSDP2"):
            pretrain(load_recipe(path), tmp_path / "run")
    # transformers itself stops where the package deepspeed is missing.
    with pytest.raises(UserError, match=r"DeepSpeed ZeRO-2 and ZeRO-3 .* use FSDP2"):
        refuse_engines(SimpleNamespace(deepspeed="zero.json", fsdp=None))
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(UserError, match=r"DeepSpeed ZeRO-2 and ZeRO-3 .* use FSDP2"):
            refuse_engines(SimpleNamespace(deepspeed=None, fsdp=None))
    for overrides, message in (
        (["training.fsdp=true", "training.fsdp_config={version: 1}"], "FSDP1 flattens weights; use FSDP2"),
        (["training.fsdp=true"], "training.fsdp needs processes to shard over"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain(load_recipe(path, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
