"""Every example runs as it is, at its small size, without the network and with nothing from the tests."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.measurements import read_measurements

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py"))
NOTEBOOK = EXAMPLES / "landscape_and_spectrum.ipynb"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example as a script in a folder of its own, and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        state = torch.random.get_rng_state()
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            torch.random.set_rng_state(state)
        return capsys.readouterr().out

    return run


def process(folder, *command, path=()):
    """Runs a command in `folder` without the network; its output."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)]),
        "HF_LOWRANK_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [str(part) for part in command], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_each_says_what_it_shows_how_to_run_it_and_what_it_needs(script):
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    assert "\nShows " in text
    assert "\nNeeds " in text
    commands = re.findall(r"^    (.+)$", text, flags=re.MULTILINE)
    assert commands
    for path in re.findall(r"(?:examples|recipes)/\S+", " ".join(commands)):
        assert (ROOT / path).exists(), path
    assert script.name in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_trainer_with_galore_learns_and_resumes(run, tmp_path):
    printed = run("trainer_galore.py", "--steps", "6", "--output", "run")
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < before
    state, parameters = map(int, re.search(r"^(\d+) numbers .* for (\d+) parameters", printed, re.MULTILINE).groups())
    assert state < 2 * parameters
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    weights = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    (tmp_path / "run" / "checkpoint-6").rename(tmp_path / "whole")
    run("trainer_galore.py", "--steps", "6", "--output", "run")
    again = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_loop_by_hand_learns(run, tmp_path):
    printed = run("accelerate_loop.py", "--steps", "6", "--output", "state")
    first, last = map(float, re.search(r"loss ([\d.]+) at first, ([\d.]+) after 6 steps", printed).groups())
    assert last < first
    assert (tmp_path / "state" / "optimizer.bin").is_file()


def test_peft_layers(run):
    printed = run("peft_layers.py", "--steps", "3")
    assert re.search(r"^COLA: loss [\d.]+; .* cannot be merged", printed, flags=re.MULTILINE)
    change = re.search(r"^SLTRAIN: loss [\d.]+; merged into dense weights, logits change by (\S+)$", printed, re.M)
    assert float(change[1]) < 1e-4


def test_pretraining_is_continued(run, tmp_path):
    printed = run("continue_pretraining.py", "--steps", "6", "--output", "out")
    before, after = map(float, re.search(r"GaLore: held-out loss ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < before
    models = (tmp_path / "out" / name for name in ("published", "continued"))
    first, last = map(AutoModelForCausalLM.from_pretrained, models)
    assert type(first) is type(last)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters(), strict=True))


def test_anybodys_checkpoints_are_measured(run, tmp_path):
    printed = run("measure_checkpoints.py", "--output", "out")
    rows = read_measurements(tmp_path / "out" / "measurements" / "slow")
    assert {row.metric for row in rows if row.scope == "model"} >= set(METRICS.sixteen)
    for metric in METRICS.sixteen:
        assert METRICS[metric].title in printed
    assert re.search(r"step    20 Random sharpness +\S+ \[\S+, \S+\]\n", printed)
    assert "[nan, nan]" not in printed
    # What was trained elsewhere is left as it was.
    assert sorted(path.name for path in (tmp_path / "out" / "slow").iterdir()) == ["checkpoint-10", "checkpoint-20"]


def test_two_processes_end_with_the_same_weights(tmp_path):
    launch = ("-m", "accelerate.commands.launch", "--config_file", ROOT / "recipes" / "accelerate" / "ddp.yaml")
    script = (EXAMPLES / "two_processes.py", "--cpu", "--steps", "3")
    printed = process(tmp_path, sys.executable, *launch, "--num_processes", "2", "--main_process_port", "0", *script)
    sums = re.search(r"2 processes, loss [\d.]+, sums of all weights \[(\S+), (\S+)\]", printed)
    assert sums[1] == sums[2]


def test_a_study_with_a_method_from_a_plug_in(tmp_path):
    """The package is built and installed by pip, as a user would."""
    site = tmp_path / "site"
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", site)
    process(tmp_path, sys.executable, *pip, EXAMPLES / "own_method")
    command = (sys.executable, "-m", "hf_lowrank")
    page = process(tmp_path, *command, "methods", "lion", path=[site])
    assert "W ← (1 − η·wd) W − η sign(C)" in page
    assert "beta2" in page
    study = (EXAMPLES / "own_method" / "study.yaml", "--output", tmp_path / "study", "--jobs", "2", "--json")
    found = json.loads(process(tmp_path, *command, "study", *study, path=[site]))
    assert found["failures"] == []
    (group,) = found["answer"]
    assert {row["method"] for row in group["methods"]} == {"lion", "full_rank"}
    assert Path(found["page"]).is_file()
    assert "Lion" in Path(found["page"]).read_text(encoding="utf-8")


def test_lion_is_the_papers_rule():
    """Three steps of one weight against the formulas in float64 numpy."""
    names = runpy.run_path(str(EXAMPLES / "own_method" / "lowrank_lion.py"))
    generator = np.random.default_rng(0)
    W, gradients = generator.normal(size=(3, 4)), generator.normal(size=(3, 3, 4))
    weight = torch.nn.Parameter(torch.tensor(W))
    optimizer = names["Lion"]([weight], lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.5)
    M = np.zeros_like(W)
    for G in gradients:
        weight.grad = torch.tensor(G)
        optimizer.step()
        C = 0.9 * M + 0.1 * G
        W, M = (1 - 0.1 * 0.5) * W - 0.1 * np.sign(C), 0.99 * M + 0.01 * G
        np.testing.assert_allclose(weight.detach().numpy(), W, rtol=1e-12)


def test_the_notebook_draws_a_landscape_and_a_spectrum(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    source = [cell for cell in notebook.cells if cell.cell_type == "code"]
    source[0].source = source[0].source.replace("STEPS, POINTS = 30, 3", "STEPS, POINTS = 6, 2")
    assert "STEPS, POINTS = 6, 2" in source[0].source
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel has its own
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in source for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert re.search(r"random sharpness -?[\d.]+ nats, 95 % interval", printed)
    assert len(re.findall(r"effective rank +[\d.]+  stable rank +[\d.]+", printed)) == 7
