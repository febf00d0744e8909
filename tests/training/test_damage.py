"""Damaged checkpoints are named and skipped by a resumed run, which ends with the bits of an uninterrupted one."""

import errno
import json
import os
import random
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure
from hf_lowrank.runs.checkpoints import last_resumable_checkpoint, why_not_resumable
from hf_lowrank.runs.records import load_run
from hf_lowrank.runs.run_files import read_facts, read_trainer_state
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.checksums import FILE_NAME, damage_by_checksums, fingerprint, unsealed, write_checksums
from hf_lowrank.training import load_recipe, pretrain
from hf_lowrank.training.start import is_finished

FILES = [
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    FILE_NAME,
]
DAMAGES = ["truncated", "emptied", "zeroed", "flipped", "removed"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of GaLore with checkpoints at 2, 4 and 6, and its recipe."""
    import yaml

    folder = tmp_path_factory.mktemp("whole")
    for name in ("train", "held"):
        (folder / f"{name}.txt").write_text(f"to be or not to be, that is the {name} of it. " * 300)
    recipe = {
        "method": {"name": "galore", "rank": 4, "update_proj_gap": 3},
        "model": {
            "architecture": "llama",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
        },
        "data": {
            "source": "files",
            "train_files": ["train.txt"],
            "held_out_files": ["held.txt"],
            "sequence_length": 16,
            "vocabulary_size": 300,
            "evaluation_sequences": 4,
        },
        "training": {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_LOWRANK_CACHE", str(folder / "cache"))
        loaded = load_recipe(folder / "recipe.yaml")
        yield loaded, pretrain(loaded, folder / "run")


def damage(file, how, generator):
    content = bytearray(file.read_bytes())
    offset = generator.randrange(len(content))
    if how == "removed":
        file.unlink()
        return
    if how == "truncated":
        content = content[:offset]
    elif how == "emptied":
        content = bytearray()
    elif how == "zeroed":
        content[offset : offset + 16] = bytes(len(content[offset : offset + 16]))
        content[-1] ^= 1
    else:
        content[offset] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


def same_weights(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items()) and one.keys() == other.keys()


def test_an_incomplete_checkpoint_does_not_count_even_without_the_first(whole, tmp_path):
    run = shutil.copytree(whole[1], tmp_path / "run")
    shutil.rmtree(run / "checkpoint-0")
    shutil.rmtree(run / "checkpoint-6")
    (run / "checkpoint-4" / FILE_NAME).unlink()
    assert last_resumable_checkpoint(run) == run / "checkpoint-2"
    assert Trajectory(run).steps == [2]


@pytest.mark.parametrize("how", ["flipped", "removed"])
def test_a_run_without_its_start_files_is_not_finished(whole, tmp_path, how):
    run = shutil.copytree(whole[1], tmp_path / "run")
    assert is_finished(run)
    damage(run / "checkpoint-0" / "model.safetensors", how, random.Random(0))
    assert not is_finished(run)
    with pytest.raises(UserError, match=r"checkpoint-0: damaged: model\.safetensors.* remove that folder"):
        pretrain(whole[0], run)
    shutil.rmtree(run / "checkpoint-0")
    pretrain(whole[0], run)
    assert is_finished(run)
    first = (folder / "checkpoint-0" / "model.safetensors" for folder in (run, whole[1]))
    assert len({file.read_bytes() for file in first}) == 1


def test_an_impossible_file_name_is_reported_as_missing(tmp_path):
    (tmp_path / FILE_NAME).write_text(json.dumps({"x" * 5000: {"sha256": "0", "bytes": 1}}))
    assert damage_by_checksums(tmp_path) == "x" * 200 + " is missing"


@pytest.mark.parametrize("entry", [{"sha256": "0", "bytes": float("inf")}, {"sha256": "0"}, [], None])
def test_invalid_entries_are_damage(tmp_path, entry):
    (tmp_path / FILE_NAME).write_text(json.dumps({"config.json": entry}))
    assert damage_by_checksums(tmp_path).startswith(f"{FILE_NAME} is unreadable: ")
    assert fingerprint(tmp_path, ["config.json"]) is None


def test_a_trainer_state_that_checksums_do_not_list_is_damage(tmp_path):
    assert read_trainer_state(tmp_path) is None
    write_checksums(tmp_path)
    assert read_trainer_state(tmp_path) is None
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    with pytest.raises(UserError, match=r"damaged: trainer_state\.json is not in checksums\.json"):
        read_trainer_state(tmp_path)


def test_an_infinite_step_is_reported(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "trainer_state.json").write_text('{"global_step": Infinity}')
    with pytest.raises(UserError, match=r"trainer_state\.json: has no readable global_step"):
        Trajectory(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_found(whole, tmp_path, name):
    for how in DAMAGES:
        if (name, how) == (FILE_NAME, "removed"):
            continue  # checkpoints of other programs have none
        copy = tmp_path / how / "checkpoint-4"
        shutil.copytree(whole[1] / "checkpoint-4", copy)
        assert why_not_resumable(copy) is None
        damage(copy / name, how, random.Random(f"{name} {how}"))
        fault = why_not_resumable(copy)
        assert fault, f"{name} {how}"
        assert name in fault
        assert "\n" not in fault


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", FILE_NAME])
def test_a_run_resumes_from_the_checkpoint_before(whole, tmp_path, name, caplog):
    recipe, run = whole
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    damage(copy / "checkpoint-6" / name, "flipped", random.Random(name))
    shutil.rmtree(copy / "checkpoint-4")
    with caplog.at_level("WARNING", logger="hf_lowrank"):
        pretrain(recipe, copy)
    assert any("checkpoint-6 is skipped" in record.getMessage() for record in caplog.records)
    for step in (4, 6):
        file = f"checkpoint-{step}/model.safetensors"
        assert same_weights(load_file(copy / file), load_file(run / file))


def test_damaged_weights_are_not_measured(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole[1], copy)
    weights = copy / "checkpoint-6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 64  # within the last tensor: the file itself still reads
    weights.write_bytes(content)
    load_file(weights)
    trajectory = Trajectory(copy)
    trajectory.model(4)
    with pytest.raises(UserError, match=r"checkpoint-6: damaged: model\.safetensors: its checksum differs"):
        trajectory.model(6)
    with pytest.raises(UserError, match="damaged"):
        trajectory.dense_weight(6, trajectory.targets[0])


def test_checksums_match_the_files(whole):
    import hashlib

    folder = whole[1] / "checkpoint-6"
    entries = unsealed(json.loads((folder / FILE_NAME).read_text()))
    assert entries.keys() == {file.name for file in folder.iterdir()} - {FILE_NAME}
    for name, entry in entries.items():
        content = (folder / name).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
        assert ("samples" in entry) == name.endswith(".safetensors")
    assert damage_by_checksums(folder) is None


def test_nested_files_have_checksums_too(tmp_path):
    shard = tmp_path / "checkpoint-2" / "optimizer_0" / "__0_0.distcp"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"state")
    write_checksums(tmp_path / "checkpoint-2")
    assert damage_by_checksums(tmp_path / "checkpoint-2") is None
    shard.write_bytes(b"stale")
    assert damage_by_checksums(tmp_path / "checkpoint-2") == (
        "optimizer_0/__0_0.distcp: its checksum differs from the one that was written"
    )


def test_a_checkpoint_without_its_checksums_is_incomplete(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole[1], copy)
    (copy / "checkpoint-6" / FILE_NAME).unlink()
    assert why_not_resumable(copy / "checkpoint-6") == f"{FILE_NAME} is missing"
    with pytest.warns(UserWarning, match=f"checkpoint-6: skipped, incomplete: {FILE_NAME} is missing"):
        assert Trajectory(copy).steps == [0, 2, 4]
    assert load_run(copy).steps == (0, 2, 4)


BEGINNING = {
    "recipe.yaml": "recipe.yaml",
    "facts.json": "facts.json",
    "evaluation.safetensors": "evaluation.safetensors",
    "tokenizer": "tokenizer/tokenizer.json",
    "checkpoint-0": "checkpoint-0/model.safetensors",
}


@pytest.mark.parametrize("name", BEGINNING)
def test_damaged_start_files_are_refused_and_rewritten(whole, tmp_path, name):
    recipe, run = whole
    for how in DAMAGES[:-1]:
        copy = tmp_path / how / "run"
        shutil.copytree(run, copy)
        file = copy / BEGINNING[name]
        damage(file, how, random.Random(f"{name} {how}"))
        with pytest.raises(UserError, match=file.name.replace(".", r"\.")):
            pretrain(recipe, copy)
        (shutil.rmtree if (copy / name).is_dir() else os.remove)(copy / name)
        pretrain(recipe, copy)
        if name != "facts.json":
            assert file.read_bytes() == (run / BEGINNING[name]).read_bytes()
        assert read_facts(copy)["corpus_fingerprint"] == read_facts(run)["corpus_fingerprint"]


def test_a_full_disk_is_one_line(whole, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "optimizer.pt")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"run: optimizer\.pt: No space left on device; rerun to resume") as told:
        pretrain(whole[0], tmp_path / "run")
    assert "\n" not in str(told.value)
    monkeypatch.undo()
    pretrain(whole[0], tmp_path / "run")
    file = "checkpoint-6/model.safetensors"
    assert same_weights(load_file(tmp_path / "run" / file), load_file(whole[1] / file))


def test_measurements_stay_when_their_checkpoint_is_damaged_later(whole, tmp_path, caplog):
    copy = tmp_path / "run"
    shutil.copytree(whole[1], copy)
    wanted = {"metrics": "loss,weight_stable_rank", "steps": [2, 4]}
    before = measure(copy, **wanted)
    damage(copy / "evaluation.safetensors", "truncated", random.Random(0))
    with caplog.at_level("WARNING", logger="hf_lowrank"):
        assert measure(copy, **wanted) == before
    assert any("its earlier values are kept: " in record.getMessage() for record in caplog.records)


def test_a_table_is_completed_from_its_damaged_line(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole[1], copy)
    wanted = {"metrics": "loss,weight_stable_rank", "steps": [2, 4]}
    before = measure(copy, **wanted)
    table = copy / "measurements.jsonl"
    lines = table.read_bytes().splitlines(keepends=True)
    for number in range(1, len(lines), 3):
        damaged = lines[number].replace(b'"step": ', b'"step":1')
        table.write_bytes(b"".join([*lines[:number], damaged, *lines[number + 1 :]]))
        with pytest.raises(UserError, match=f"line {number + 1} .*remove it and the lines after it"):
            measure(copy, **wanted)
        table.write_bytes(b"".join(lines[:number]))
        assert {row.key: row for row in measure(copy, **wanted)} == {row.key: row for row in before}


def test_a_lost_process_of_the_launch_is_one_line(whole, tmp_path, monkeypatch):
    def lost(*_):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:45232.")

    monkeypatch.setattr(sys.modules[pretrain.__module__], "_pretrain", lost)
    with pytest.raises(RuntimeError, match="gloo"):
        pretrain(whole[0], tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"run: another process of this launch has ended.*rerun to resume"):
        pretrain(whole[0], tmp_path / "run")
