"""What pretrain refuses: another step size, resuming with other sharding, and engines that flatten weights."""

import json
import shutil
from types import SimpleNamespace

import pytest

from hf_lowrank.errors import UserError
from hf_lowrank.optim.groups import refuse_engines
from hf_lowrank.runs.checkpoints import why_not_resumable
from hf_lowrank.runs.layout import SHARDED_STATE
from hf_lowrank.runs.run_files import write_facts
from hf_lowrank.training.pretrain import pretrain
from hf_lowrank.training.recipe import load_recipe
from tests.distributed.every_method import BATCH, write_recipe, write_texts

STEPS, SAVED = 6, 3


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def recipe_of(tmp_path):
    """Writes the recipe of a method for one process."""
    write_texts(tmp_path)
    return lambda name: write_recipe(tmp_path, name, 1, "alone", steps=STEPS, saved=SAVED)


def test_what_does_not_fit_a_run_is_refused(tmp_path, recipe_of, monkeypatch):
    path = recipe_of("full_rank")
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
        assert why_not_resumable(run / f"checkpoint-{SAVED}") is not None
    for name in SHARDED_STATE:
        (run / f"checkpoint-{SAVED}" / name / ".metadata").touch()
    with pytest.raises(UserError, match=r"checkpoint-3 was written under FSDP2; resume the run with FSDP2"):
        pretrain(load_recipe(path), run)


def test_engines_that_flatten_are_refused_before_anything_is_written(tmp_path, recipe_of, monkeypatch):
    path = recipe_of("galore")
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
