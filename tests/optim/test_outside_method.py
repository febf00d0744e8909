"""An optimizer method of another package, added by its entry point alone, through every stage."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
RUN_COMMANDS = """
import json, sys
from hf_lowrank.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder for `sys.path` in which the package is installed."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(Path(__file__).parent / "outside" / "lowrank_follower.py", folder)
    metadata = folder / "lowrank_follower-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lowrank-follower\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[hf_lowrank.methods]\nfollower = lowrank_follower:METHOD\n")
    return folder


def run_commands(site, folder, *commands):
    """Runs commands of `hf-lowrank` one after the other in a new process; its output."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS, json.dumps([list(map(str, command)) for command in commands])],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)]),
            "HF_LOWRANK_CACHE": str(folder / "cache"),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recipe(folder):
    generator = random.Random(0)
    for number in range(3):
        words = [f"{generator.choice(['alpha', 'beta', 'gamma'])}{generator.randrange(90)}" for _ in range(500)]
        (folder / f"text{number}.txt").write_text(" ".join(words))
    content = {
        "name": "follower",
        "method": {"name": "follower", "rank": 4, "rho": 0.9, "state_dtype": "float32"},
        "model": {
            "architecture": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 16,
        },
        "data": {
            "source": "files", "train_files": ["text[1-9].txt"], "held_out_files": ["text0.txt"],
            "sequence_length": 16, "vocabulary_size": 301, "evaluation_sequences": 8,
        },
        "training": {
            "max_steps": 12, "save_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 3e-3,
            "logging_steps": 1, "use_cpu": True,
        },
    }  # fmt: skip
    path = folder / "follower.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def trained(site, tmp_path_factory):
    """A folder with a run, the same run resumed after its first checkpoint, and what the commands printed."""
    folder = tmp_path_factory.mktemp("outside")
    whole, resumed = folder / "whole", folder / "resumed"
    printed = run_commands(site, folder, ["methods"], ["train", recipe(folder), "--output", whole])
    shutil.copytree(whole, resumed)
    for step in (8, 12):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    printed += run_commands(
        site, folder, ["train", folder / "follower.yaml", "--output", resumed],
        ["measure", whole, "--steps", "last", "--metrics", "weight_stable_rank,weight_effective_rank"],
        ["report", whole, "--output", folder / "page"],
    )  # fmt: skip
    return folder, printed


def test_it_is_listed_with_its_own_settings(trained):
    _, printed = trained
    assert "follower: Follower from outside (arXiv 2410.16103)" in printed
    assert "rho" in printed
    assert "share of the momentum" in printed


def test_it_trains_and_resumes_to_the_bit(trained):
    folder, _ = trained
    states = []
    for run in ("whole", "resumed"):
        last = folder / run / "checkpoint-12"
        states.append((load_file(last / "model.safetensors"), torch.load(last / "optimizer.pt", weights_only=True)))
    for name, weight in states[0][0].items():
        assert torch.equal(weight, states[1][0][name]), name
    errors = 0
    for number, state in states[0][1]["state"].items():
        for key, value in state.items():
            other = states[1][1]["state"][number][key]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, key
        errors += "error" in state
        assert bool(state.get("error", torch.ones(1)).any())
    assert errors == 14
    start, end = (load_file(folder / "whole" / f"checkpoint-{step}" / "model.safetensors") for step in (0, 12))
    assert not torch.equal(start["model.layers.0.mlp.up_proj.weight"], end["model.layers.0.mlp.up_proj.weight"])
    history = json.loads((folder / "whole" / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_it_is_measured(trained):
    folder, _ = trained
    rows = [json.loads(line) for line in (folder / "whole" / "measurements.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"follower"}
    assert {"weight_stable_rank", "weight_effective_rank"} <= {row["metric"] for row in rows if row["value"]}


def test_the_report_shows_it_with_its_own_colour(trained):
    folder, _ = trained
    page = next((folder / "page").glob("*.html")).read_text()
    assert "Follower from outside" in page
    assert "#7a1f5c" in page
    assert "#d98cc0" in page


def test_a_wrong_setting_of_it_is_refused(trained, site):
    folder, _ = trained
    with pytest.raises(AssertionError, match=r"method\.rho.*at most 1|rho.*less than or equal to 1|rho.*\[0"):
        run_commands(
            site, folder, ["train", folder / "follower.yaml", "--output", folder / "wrong", "--set", "method.rho=2"]
        )
