"""Reading pushed runs back: through Trajectory, through transformers alone, through measuring."""

import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lowrank.errors import UserError
from hf_lowrank.hub import push
from hf_lowrank.runs.sources import step_of
from hf_lowrank.runs.trajectory import Trajectory
from tests.hub.runs import make_model, make_run


def fetched(hub, name="model.safetensors"):
    return [r for r in hub.requests if r.method == "GET" and r.path.endswith(name) and "/resolve/" in r.path]


def test_six_runs_read_back_bit_equal_by_transformers_alone(hub, tmp_path):
    runs = [make_run(tmp_path / f"run-{seed}", seed=seed, steps=(5, 10)) for seed in range(6)]
    for run in runs:
        push(run, f"user/{run.name}")
    code = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "hf_lowrank" not in sys.modules
for run in sys.argv[1:]:
    for step in (5, 10):
        model = AutoModelForCausalLM.from_pretrained("user/" + Path(run).name, revision=f"step-{step}")
        tokenizer = AutoTokenizer.from_pretrained("user/" + Path(run).name, revision=f"step-{step}")
        expected = load_file(f"{run}/checkpoint-{step}/model.safetensors")
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all((state[name].view(-1).numpy().tobytes() == tensor.view(-1).numpy().tobytes())
                   for name, tensor in expected.items())
        assert tokenizer("w3 w7")["input_ids"] == [3, 7]
print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, runs)],
        capture_output=True, text=True, env=dict(os.environ), timeout=240, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_a_trajectory_from_the_hub(hub, run):
    push(run, "user/tiny")
    here, there = Trajectory(run), Trajectory("user/tiny")
    assert there.steps == here.steps == [10, 20, 30]
    assert there.run.method == here.run.method == "galore"
    assert there.run.recipe == here.run.recipe
    assert there.evaluation_set().fingerprint == here.evaluation_set().fingerprint
    assert there.log_history() == here.log_history()
    for name, tensor in here.model(20).state_dict().items():
        assert torch.equal(there.model(20).state_dict()[name], tensor)
    assert Trajectory("user/tiny@step-20").steps == [20]


def test_only_the_tensor_that_is_asked_for(hub, tmp_path):
    run = make_run(tmp_path / "wide", hidden=64, steps=(10, 20))
    push(run, "user/wide")
    hub.requests.clear()
    there = Trajectory("user/wide")
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = load_file(run / "checkpoint-20/model.safetensors")
    assert torch.equal(there.tensor(20, name), expected[name])
    assert set(there.tensor_names(20)) == set(expected)
    parts = fetched(hub)
    assert parts
    assert all("Range: bytes=" in part.headers or "range: bytes=" in part.headers for part in parts)
    assert all(part.status == 206 for part in parts)
    count = len(hub.requests)
    assert torch.equal(there.tensor(20, name), expected[name])
    assert len(hub.requests) == count


def test_when_most_is_wanted_the_file_comes_whole(hub, tmp_path):
    run = make_run(tmp_path / "wide", hidden=64, steps=(10,))
    push(run, "user/wide")
    there = Trajectory("user/wide")
    expected = load_file(run / "checkpoint-10/model.safetensors")
    for name in sorted(expected):
        assert torch.equal(there.tensor(10, name), expected[name])
    assert len(fetched(hub)) < len(expected)


def test_offline_from_the_cache(hub, run, monkeypatch):
    push(run, "user/tiny")
    online = Trajectory("user/tiny")
    name = online.targets[0]
    expected = [online.dense_weight(step, name) for step in online.steps]
    online.model(30)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    with pytest.warns(UserWarning, match="local cache"):
        offline = Trajectory("user/tiny")
    assert offline.steps == [10, 20, 30]
    for step, weight in zip(offline.steps, expected, strict=True):
        assert torch.equal(offline.dense_weight(step, name), weight)
    assert offline.model(30).num_parameters() == online.model(30).num_parameters()
    assert len(hub.requests) == count


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-1000", 1000), ("step1000", 1000), ("step_1000", 1000), ("checkpoint-1000", 1000), ("ckpt-1k", 1000),
        ("ckpt-2K", 2000), ("step0", 0), ("step143000", 143000), ("global_step300", 300), ("iter_0005000", 5000),
        ("step1000-tokens4B", 1000), ("stage1-step2000-tokens9B", 2000), ("v1.5", 5), ("main", None),
    ],
)  # fmt: skip
def test_other_peoples_names(name, step):
    assert step_of(name) == step


@pytest.mark.parametrize("style", ["step{}", "step_{}", "checkpoint-{}", "ckpt-{}k"])
def test_a_repository_in_another_style(hub, style):
    hub.store.create("user/style", False)
    config = make_model(0).config
    for step in (1, 2):
        name = style.format(step)
        data = config.to_json_string().encode()
        hub.store.create_ref("user/style", "tags" if step == 2 else "branches", name, None)
        if step == 1:
            hub.store.commit("user/style", name, [{"key": "file", "path": "config.json", "data": data}], "c", "", None)
    factor = 1000 if style.endswith("k") else 1
    run = Trajectory("user/style", revisions=style.replace("{}", "*"))
    assert run.steps == [factor, 2 * factor]
    assert run.config.hidden_size == 16
    assert Trajectory("user/style").steps == run.steps


def test_a_revision_that_is_not_there(hub, run):
    push(run, "user/tiny", steps=[10])
    with pytest.raises(UserError, match="step-99"):
        Trajectory("user/tiny@step-99")
    with pytest.raises(UserError, match="neither a local folder nor a repository"):
        Trajectory("user/nowhere")


def test_measuring_from_the_hub_is_measuring_from_the_folder(hub, run, tmp_path):
    from hf_lowrank.measuring import measure

    push(run, "user/tiny")
    wanted = "loss,weight_stable_rank,update_norm"
    here = measure(run, metrics=wanted, output=tmp_path / "here")
    there = measure("user/tiny", metrics=wanted, output=tmp_path / "there")
    assert [(r.step, r.metric, r.scope, r.value) for r in here] == [
        (r.step, r.metric, r.scope, r.value) for r in there
    ]


def test_adapted_models_and_their_dense_form(hub, tmp_path):
    from hf_lowrank.adapters import LowRankConfig, LowRankForCausalLM, SLTrainConfig

    run = make_run(tmp_path / "sltrain", steps=(10, 20), method="sltrain")
    for step in (10, 20):
        torch.manual_seed(step)
        base = make_model(0).config
        model = LowRankForCausalLM(LowRankConfig(base_config=base, adapter_config=SLTrainConfig(r=4, sparsity=0.05)))
        (run / f"checkpoint-{step}/model.safetensors").unlink()
        model.save_pretrained(run / f"checkpoint-{step}")
    push(run, "user/sltrain", dense="beside")
    assert {"step-10", "step-20", "dense-step-10", "dense-step-20"} <= set(hub.store.repo("user/sltrain")["branches"])
    assert Trajectory("user/sltrain").steps == [10, 20]
    ids = torch.tensor([[3, 4, 5, 6]])
    trained = AutoModelForCausalLM.from_pretrained("user/sltrain", revision="step-20").eval()
    dense = AutoModelForCausalLM.from_pretrained("user/sltrain", revision="dense-step-20").eval()
    assert type(dense).__name__ == "LlamaForCausalLM"
    assert torch.allclose(trained(ids).logits, dense(ids).logits, atol=1e-5)
    assert {r.state for r in push(run, "user/sltrain", dense="beside")} == {"there"}
    push(run, "user/only-dense", dense="instead")
    assert "dense-step-10" not in hub.store.repo("user/only-dense")["branches"]
    assert hub.repeated == []
