"""Repositories whose revisions hold pickled weights: refused when they are opened, with what to do about it."""

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure
from hf_lowrank.runs.trajectory import Trajectory
from tests.hub.runs import make_model

STEPS = (10, 20)


def publish(tmp_path, pickled):
    """`user/old`, whose revisions step-10 and step-20 hold a model each, pickled at the steps `pickled`."""
    api = HfApi()
    api.create_repo("user/old")
    for step in STEPS:
        model, folder = make_model(step), tmp_path / f"old-{step}"
        model.save_pretrained(folder)
        if step in pickled:
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        api.create_branch("user/old", branch=f"step-{step}")
        api.upload_folder(repo_id="user/old", folder_path=folder, revision=f"step-{step}", commit_message="weights")


def test_one_line_says_what_to_run_and_that_works(hub, tmp_path, monkeypatch):
    publish(tmp_path, STEPS)
    says, remedy = r"^user/old@step-20: pytorch_model\.bin is a pickle", r"\.save_pretrained\('old/checkpoint-20'\)"
    for opening in (Trajectory, measure):
        with pytest.raises(UserError, match=f"{says}, .*revision='step-20'\\){remedy}"):
            opening("user/old")
    assert not [request for request in hub.requests if request.path.endswith("pytorch_model.bin")]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask for one on the Hub
    for step in STEPS:
        AutoModelForCausalLM.from_pretrained("user/old", revision=f"step-{step}").save_pretrained(
            f"old/checkpoint-{step}"
        )
    converted = Trajectory("old")
    assert converted.steps == list(STEPS)
    name = converted.targets[0]
    for step in STEPS:
        wanted = make_model(step).state_dict()[f"{name}.weight"]
        assert torch.equal(converted.dense_weight(step, name), wanted)


def test_a_single_pickled_step_is_named_when_it_is_read(hub, tmp_path):
    publish(tmp_path, (10,))
    run = Trajectory("user/old")
    assert run.dense_weight(20, run.targets[0]).ndim == 2
    with pytest.raises(UserError, match=r"user/old@step-10: pytorch_model\.bin is a pickle"):
        run.dense_weight(10, run.targets[0])


def test_pickles_next_to_safetensors_are_not_looked_at(hub, tmp_path):
    publish(tmp_path, ())
    for step in STEPS:
        HfApi().upload_file(
            path_or_fileobj=b"no pickle", path_in_repo="pytorch_model.bin", repo_id="user/old", revision=f"step-{step}"
        )
    run = Trajectory("user/old")
    assert run.dense_weight(10, run.targets[0]).ndim == 2
