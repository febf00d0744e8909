"""Every Python snippet of the README runs, in order, on a tiny model; every command it names is there."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import torch
import yaml
from transformers import Trainer, TrainingArguments

from hf_lowrank.metrics import markdown_table
from hf_lowrank.runs.measurements import Measurement, append_measurements
from hf_lowrank.study import load_study
from hf_lowrank.study.layout import planned_trials
from hf_lowrank.training import load_recipe
from tests.documents import blocks, check_commands, check_files, check_shell, run_python

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_snippets_run(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [{"direction": k, "reach": 0.1, "losses": [3.5 + k, 3.0, 3.25]} for k in range(2)]
    who = {"run": "galore", "method": "galore", "seed": 0, "step": 400, "metric": "random_draw"}
    draws = [Measurement(**who, value=0.375 + k / 2, settings=one) for k, one in enumerate(settings)]
    append_measurements("runs/galore/measurements.jsonl", draws)
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to="none", save_strategy="no")
    names = {"model": tiny_llama, "args": args, "dataset": rows, "Trainer": Trainer}
    assert run_python(README, names, "README.md") >= 3
    assert (names["offsets"], names["losses"]) == ([-0.1, 0.0, 0.1], [[3.5, 3.0, 3.25], [4.5, 3.0, 3.25]])


def test_the_recipe_is_one(tmp_path):
    _, text = blocks(README, "yaml")
    assert set(yaml.safe_load(text)) == {"method", "model", "data", "training"}
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert load_recipe(path).method.name == "galore"


def test_the_sweep_of_the_study_is_one(tmp_path):
    text = blocks(README, "yaml")[0].replace("../nano/", f"{Path(__file__).parents[1] / 'recipes' / 'nano'}/")
    path = tmp_path / "study.yaml"
    path.write_text(f"name: tuned\nbaseline: two_rates\n{text}")
    trials = planned_trials(load_study(path), tmp_path)
    assert Counter(trial.member for trial in trials) == {"galore": 8, "two_rates": 8}
    assert all(len(trial.values) == 2 for trial in trials)


def test_commands_are_there(capsys):
    assert check_commands(README, capsys)
    check_shell(README)
    check_files(README)


def test_the_nano_study_s_table_is_that_of_its_card():
    with (Path(__file__).parents[1] / "model_cards" / "nano" / "answer.csv").open(newline="") as file:
        answer = list(csv.DictReader(file))
    section = README.partition("## What the nano study says")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(answer) == 8
    for row, (_, perplexity, downstream, memory, distance) in zip(answer, lines, strict=True):
        for name, text, places in (
            ("perplexity", perplexity, 1),
            ("downstream", downstream, 2),
            ("distance", distance, 2),
        ):
            values = [f"{float(row[name + end]):.{places}f}" for end in ("", "_low", "_high") if row[name]]
            assert re.findall(r"[\d.]+", text) == values, (row["method"], name)
        assert memory == f"{float(row['memory']) / 2**20:.0f} MiB"
    assert "two are reproduced" in section.replace("\n", " ")
    claims = json.loads((Path(__file__).parents[1] / "model_cards" / "nano" / "claims.json").read_text())["claims"]
    verdicts = [claim["verdict"] for claim in claims]
    assert [verdicts.count(v) for v in ("reproduced", "contradicted", "undecided")] == [2, 3, 2]


def test_the_table_of_metrics_is_that_of_the_package():
    assert markdown_table() in README
