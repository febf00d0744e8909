"""Every Python snippet of the README runs, in order, on a tiny model; every command it names is there."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments

from hf_lowrank.cli import main
from hf_lowrank.training import load_recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_python_snippets_run(tiny_llama, tmp_path):
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to="none", save_strategy="no")
    names = {"model": tiny_llama, "args": args, "dataset": rows, "Trainer": Trainer}
    snippets = blocks("python")
    assert len(snippets) >= 3
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)


def test_the_recipe_is_one(tmp_path):
    (text,) = blocks("yaml")
    assert set(yaml.safe_load(text)) == {"method", "model", "data", "training"}
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert load_recipe(path).method.name == "galore"


def test_commands_are_there(capsys):
    commands = re.findall(r"^hf-lowrank ([\w-]+)(.*)$", "".join(blocks("bash")), flags=re.MULTILINE)
    assert commands
    for verb, rest in commands:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        for option in re.findall(r"--[\w-]+", rest.split("#")[0]):
            assert option in out, (verb, option)
    for path in re.findall(r"recipes/\S+\.yaml", README):
        assert (Path(__file__).parents[1] / path).is_file(), path
