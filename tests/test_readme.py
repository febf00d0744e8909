"""The README: its snippets run on a tiny model, its commands, files and figures are there."""

import csv
import json
import re

import torch
from transformers import Trainer, TrainingArguments

from hf_lowrank.methods import METHODS
from tests.documents import ROOT, check_commands, check_files, check_shell, run_python

README = (ROOT / "README.md").read_text(encoding="utf-8")
STUDY = ROOT / "model_cards" / "nano"


def test_python_snippets_run(tiny_llama, tmp_path):
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to="none", save_strategy="no")
    names = {"model": tiny_llama, "args": args, "dataset": rows}
    assert run_python(README.replace("rank=128", "rank=8").replace("r=64", "r=4"), names, "README.md") == 2
    assert isinstance(names["trainer"], Trainer)
    assert names["trainer"].state.global_step == 2


def test_commands_and_files_are_there(capsys):
    assert check_commands(README, capsys) == 3
    check_shell(README)
    check_files(README)
    for place in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / place).exists(), place


def test_every_method_is_listed_with_its_page():
    for name in METHODS:
        assert f"(model_cards/{name}.md)" in README, name


def test_the_study_s_table_is_that_of_its_card():
    with (STUDY / "answer.csv").open(newline="") as file:
        answers = {row["method"]: row for row in csv.DictReader(file)}
    section = README.partition("## What a study says")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == 5
    titles = {METHODS[name].title if name in METHODS else name: row for name, row in answers.items()}
    for title, perplexity, downstream, memory in lines:
        row = titles[title]
        for name, text, places in (("perplexity", perplexity, 1), ("downstream", downstream, 2)):
            values = [f"{float(row[name + end]):.{places}f}" for end in ("", "_low", "_high")]
            assert re.findall(r"[\d.]+", text) == values, (title, name)
        assert memory == f"{float(row['memory']) / 2**20:.0f} MiB"
    verdicts = [claim["verdict"] for claim in json.loads((STUDY / "claims.json").read_text())["claims"]]
    assert [verdicts.count(verdict) for verdict in ("reproduced", "contradicted", "undecided")] == [2, 3, 2]
    said = section.replace("\n  ", " ")
    assert "two are reproduced at this scale, three are contradicted and two are undecided" in said


def test_memory_is_what_was_estimated():
    found = json.loads((ROOT / "benchmarks/results/memory_examples.json").read_text())["estimates"]
    section = README.partition("## What it costs in memory")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    methods = {"Full-rank AdamW": "full_rank", "Q-GaLore, weights in eight bits": "q_galore"}
    titles = {one.title: name for name, one in METHODS.items()} | methods
    assert len(lines) == 4
    for title, *peaks in lines:
        assert peaks == [f"{found[size][titles[title]]['peak'] / 2**30:.1f} GiB" for size in ("350m", "7b")], title


def test_it_is_short():
    assert len(re.sub(r"\||-{3,}:?", " ", README).split()) <= 1000  # snippets and tables as well
