"""The pages under docs/: tables and quoted code are those of the package, snippets and commands run at small size."""

import json
import math
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments

from hf_lowrank.cli import main
from hf_lowrank.methods import METHODS
from hf_lowrank.runs.measure_settings import resolve_settings
from hf_lowrank.runs.scores import Score, append_scores, item_file, write_item_scores
from hf_lowrank.study import load_study
from hf_lowrank.training import load_recipe
from tests.documents import blocks, check_commands, check_files, check_shell, command_of, run_python, shell_lines
from tests.study.tiny import write_corpus

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
UPDATE = runpy.run_path(str(DOCS / "update.py"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)

# The nano recipes at a size that trains in a second, of four steps.
STEPS = 4
BASE = {
    "model": {
        "architecture": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32,
    },
    "data": {
        "source": "files", "train_files": ["../../train.txt"], "held_out_files": ["../../held.jsonl"],
        "sequence_length": 24, "vocabulary_size": 300, "evaluation_sequences": 8,
    },
    "training": {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "save_steps": 2,
        "logging_steps": 2,
    },
}  # fmt: skip


def small(text):
    """A document's text with the sizes of its examples replaced by those of the tests."""
    return text.replace("checkpoint-400", f"checkpoint-{STEPS}").replace("step == 400", f"step == {STEPS}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with recipes and with what the commands of "Getting started" leave, scores apart."""
    folder = tmp_path_factory.mktemp("docs")
    write_corpus(folder)
    shutil.copytree(DOCS.parent / "recipes", folder / "recipes")
    (folder / "recipes" / "nano" / "_base.yaml").write_text(yaml.safe_dump(BASE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_LOWRANK_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        for line in shell_lines((DOCS / "getting-started.md").read_text(encoding="utf-8")):
            verb, *rest = command_of(line) or [""]
            # Items of the offline tasks need held-out text in Python; a simulation of 60M takes as long as all others.
            if verb not in ("", "evaluate"):
                arguments = [part.replace("llama_60m", "nano") for part in rest]
                with pytest.raises(SystemExit) as stop:
                    main([verb, *arguments])
                assert stop.value.code == 0, line
    for run, right in (("full_rank", (1, 0, 0, 1)), ("galore", (1, 1, 1, 1))):
        table = folder / "runs" / run / "downstream.jsonl"
        score = {"value": sum(right) / 4, "stderr": None, "ci_low": None, "ci_high": None, "n": 4, "chance": 0.5}
        who = {"run": run, "method": run, "seed": 0, "step": STEPS, "task": "pylib_copy", "metric": "acc"}
        about = {"group": None, "task_version": "1.0", "lm_eval_version": "0", "items": "1", "higher_is_better": True}
        append_scores(table, [Score(**who, **score, **about)])
        write_item_scores(
            item_file(table, STEPS, "pylib_copy"), [{"item": str(i), "acc": acc} for i, acc in enumerate(right)]
        )
    return folder


def test_getting_started_leaves_what_it_says(world):
    for run in ("full_rank", "galore", "galore16"):
        assert (world / "runs" / run / f"checkpoint-{STEPS}" / "model.safetensors").is_file()
    for file in ("recipe.yaml", "facts.json", "evaluation.safetensors", "tokenizer", "measurements.jsonl"):
        assert (world / "runs" / "galore" / file).exists()
    assert yaml.safe_load((world / "runs" / "galore16" / "recipe.yaml").read_text())["method"]["rank"] == 16
    assert (world / "report" / "report.html").is_file()


@every_page
def test_python_snippets_run(page, world, tiny_llama, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(world / "cache"))
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(world / "trained" / page.stem), max_steps=2, report_to="none", save_strategy="no", use_cpu=True
    )
    names = {"model": tiny_llama, "args": args, "dataset": rows, "Trainer": Trainer}
    registered = set(METHODS)
    try:
        run_python(small(page.read_text(encoding="utf-8")), names, page.name)
    finally:
        for name in set(METHODS) - registered:
            METHODS._methods.pop(name)
    if page.stem == "measuring":
        assert names["offsets"] == sorted(names["offsets"])
        assert len(names["losses"]) == 5
        assert names["weight"].shape == (32, 32)
    if page.stem == "layers":
        assert type(names["dense"]).__name__ == "LlamaForCausalLM"
        assert len([entry for entry in names["trainer"].state.log_history if "relora_restarts" in entry]) == 1
    if page.stem == "evaluation":
        assert names["one"].difference == 0.5


@every_page
def test_tables_and_quoted_code_are_those_that_make_pages_writes(page):
    assert page.read_text(encoding="utf-8") == UPDATE["updated"](page), "run `make pages`"


@every_page
def test_commands_and_files_are_there(page, capsys):
    text = page.read_text(encoding="utf-8")
    check_commands(text, capsys)
    check_shell(text)
    check_files(text)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("LDAdam's error feedback", "ldadam"),
        ("refactorisation of the low-rank control", "low_rank"),
        ("refactorisation of SLTrain", "sltrain"),
        ("the guide of structured feed-forwards", "structured"),
        ("a lazy interval of GaLore", "q_galore"),
    ],
)
def test_pages_of_methods_have_the_figures_of_the_ablations(part, name):
    found = json.loads((DOCS.parent / "benchmarks/results/ablations.json").read_text(encoding="utf-8"))["effects"][
        part
    ]
    sign, harms = (-1, "higher") if found["effect"] < 0 else (1, "lower")
    low, high = sorted(sign * found[end] for end in ("low", "high"))
    text = (DOCS.parent / f"model_cards/{name}.md").read_text(encoding="utf-8")
    assert f"{abs(found['effect']):.3f} nats {harms}" in text
    assert f"(95 % interval {low:.3f} to {high:.3f}, three seeds".replace("-", "−") in text


def test_every_table_is_shown():
    shown = {name for page in PAGES for _, name, _ in UPDATE["TABLE"].findall(page.read_text(encoding="utf-8"))}
    assert shown == set(UPDATE["TABLES"])


def test_quoted_code_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="has no nothing"):
        UPDATE["code"]("hf_lowrank.optim.fira", "nothing")
    with pytest.raises(ValueError, match="there is no"):
        UPDATE["code"]("hf_lowrank.optim.methods", "ENTRIES[nothing]")


def test_yaml_blocks_are_what_their_pages_say(tmp_path):
    recipes = blocks((DOCS / "recipes.md").read_text(encoding="utf-8"), "yaml")
    assert len(recipes) == 2
    for number, text in enumerate(recipes):
        path = tmp_path / f"recipe{number}.yaml"
        path.write_text(text)
        assert load_recipe(path).method.name == ("galore", "fira")[number]
    (text,) = blocks((DOCS / "studies.md").read_text(encoding="utf-8"), "yaml")
    path = tmp_path / "study.yaml"
    path.write_text(text.replace("../nano/", f"{DOCS.parent / 'recipes' / 'nano'}/"))
    study = load_study(path).settings
    assert (study.sweep.trials, set(study.members)) == (8, {"galore", "two_rates"})
    (text,) = blocks((DOCS / "measuring.md").read_text(encoding="utf-8"), "yaml")
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    settings = resolve_settings("paper", path)
    assert (settings.sequences, settings.random.draws, settings.path.points) == (200, 20, 15)


def test_the_nano_recipes_have_the_size_that_the_pages_say():
    recipe = load_recipe(DOCS.parent / "recipes" / "nano" / "full_rank.yaml")
    with torch.device("meta"):
        model = recipe.method.build_model(recipe.config(vocab_size=recipe.data.vocabulary_size), recipe.settings, 0)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert math.floor(millions * 10) / 10 == 1.3
    assert "1.3 million parameters" in (DOCS / "getting-started.md").read_text(encoding="utf-8")
