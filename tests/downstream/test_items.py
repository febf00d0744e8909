"""Items are enough, come from held-out files alone, and give nothing away to rules that do not read the context."""

import ast
import math
from collections import Counter
from pathlib import Path

import pytest
import yaml

from hf_lowrank.downstream.items import held_out_sources, items_for, load_items
from hf_lowrank.downstream.items.build import FEWEST, make_items
from hf_lowrank.downstream.items.code import KINDS
from hf_lowrank.errors import UserError
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.training.sources import python_library

CHOICE_TASKS = {"pylib_cloze": 1 / 4, "pylib_syntax": 1 / 2, "pylib_copy": 1 / 2}


@pytest.fixture(scope="module")
def items(run):
    return {task: load_items(items_for(Trajectory(run), task)) for task in (*CHOICE_TASKS, "pylib_bits_per_byte")}


def test_there_are_enough_and_they_are_balanced(items):
    assert all(len(found) >= FEWEST for found in items.values())
    kinds = Counter(item["kind"] for item in items["pylib_syntax"])
    assert set(kinds) == set(KINDS)
    assert len(set(kinds.values())) == 1
    for task, chance in CHOICE_TASKS.items():
        golds = Counter(item["gold"] for item in items[task])
        assert all(count == pytest.approx(len(items[task]) * chance, rel=0.02) for count in golds.values())
        assert all(len(item["choices"]) == round(1 / chance) for item in items[task])
        assert len({item["id"] for item in items[task]}) == len(items[task])


def test_held_out_files_are_those_of_training():
    recipe = {"data": {"source": "python-library", "sequence_length": 64, "held_out_share": 0.05}}
    assert [source.text for source in held_out_sources(recipe, "run")] == list(python_library(0.05).held_out())


def test_no_item_comes_from_a_training_file(items, held_out):
    texts = {source.name: source.text for source in held_out}
    train = set(python_library(0.05).train())
    for found in items.values():
        for item in found:
            assert texts[item["source"]] not in train
    for item in items["pylib_syntax"]:
        real = item["choices"][item["gold"]].strip("\n")
        line = texts[item["source"]].replace("\r\n", "\n").split("\n")[item["line"] - 1]
        assert line == real


RULES = {
    "shortest": lambda choice, tokens, counts: -len(choice),
    "longest": lambda choice, tokens, counts: len(choice),
    "fewest tokens": lambda choice, tokens, counts: -len(tokens),
    "most frequent tokens": lambda choice, tokens, counts: sum(counts[token] for token in tokens),
    "rarest tokens": lambda choice, tokens, counts: -sum(counts[token] for token in tokens),
    "lowest id": lambda choice, tokens, counts: -sum(tokens),
    "mean frequency": lambda choice, tokens, counts: sum(counts[t] for t in tokens) / max(1, len(tokens)),
}


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_length_and_unigram_rules_score_at_chance(items, tokenizer, held_out, task):
    """Rules see each choice as the model does, after its context, but not the context itself."""
    counts = Counter(token for source in held_out for token in tokenizer(source.text)["input_ids"])
    total = sum(counts.values())
    frequency = Counter({token: math.log((count + 1) / total) for token, count in counts.items()})
    right = dict.fromkeys(RULES, 0.0)
    for item in items[task]:
        whole = [tokenizer(item["context"] + choice)["input_ids"] for choice in item["choices"]]
        head = len(tokenizer(item["context"])["input_ids"])
        seen = [(choice, ids[head:]) for choice, ids in zip(item["choices"], whole, strict=True)]
        for name, rule in RULES.items():
            scores = [rule(choice, tokens, frequency) for choice, tokens in seen]
            best = [place for place, score in enumerate(scores) if score >= max(scores) - 1e-9]
            right[name] += (item["gold"] in best) / len(best)
    chance, count = CHOICE_TASKS[task], len(items[task])
    margin = 1.96 * (chance * (1 - chance) / count) ** 0.5
    assert {name: score / count for name, score in right.items()} == pytest.approx(
        dict.fromkeys(RULES, chance), abs=margin
    )


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_choices_have_equal_tokens_and_fit(items, tokenizer, task):
    for item in items[task]:
        lengths = {len(tokenizer(item["context"] + choice)["input_ids"]) for choice in item["choices"]}
        assert len(lengths) == 1
        assert lengths.pop() <= 96
        assert item["context"] == item["context"].rstrip()


def test_corrupted_lines_are_wrong(items, held_out):
    texts = {source.name: source.text.replace("\r\n", "\n").split("\n") for source in held_out}
    for item in items["pylib_syntax"][::7]:
        lines = list(texts[item["source"]])
        bad = item["choices"][1 - item["gold"]][1:]
        lines[item["line"] - 1] = bad
        if item["kind"] in ("name", "operator"):
            assert bad != texts[item["source"]][item["line"] - 1]
        else:
            with pytest.raises(SyntaxError):
                ast.parse("\n".join(lines))


def test_copied_names_stand_in_the_context_and_the_others_do_not(items):
    for item in items["pylib_copy"]:
        real, other = item["choices"][item["gold"]].strip(), item["choices"][1 - item["gold"]].strip()
        words = Counter("".join(c if c.isalpha() else " " for c in item["context"]).split())
        assert words[real] >= 1
        assert words[other] == 0


def test_the_same_seed_gives_the_same_items(held_out, tokenizer):
    few = held_out[:30]
    once, again = (make_items("pylib_cloze", few, tokenizer, 96) for _ in range(2))
    assert once == again
    assert once != make_items("pylib_cloze", few, tokenizer, 96, seed=1)


def test_too_little_text_is_one_line(tmp_path, tokenizer, make_run):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("def f(a):\n    if a:\n        return a\n    return 1\n" + name)
    folder = make_run(tmp_path / "short", tokenizer, steps=(5,))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"] = {
        "source": "files",
        "train_files": [str(tmp_path / "train.txt")],
        "held_out_files": [str(tmp_path / "test.txt")],
        "sequence_length": 96,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="gives 0 items for pylib_copy, at least 500"):
        items_for(Trajectory(folder), "pylib_copy")


def test_a_run_without_recipe_or_local_text_is_one_line():
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        held_out_sources(None, "run")
    with pytest.raises(UserError, match="python-library or files"):
        held_out_sources({"data": {"source": "hub", "dataset": "a/b", "sequence_length": 8}}, "run")


def test_local_files_give_their_held_out_documents(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    data = {
        "source": "files",
        "train_files": [str(tmp_path / "train.txt")],
        "held_out_files": [str(tmp_path / "test.txt")],
        "sequence_length": 8,
    }
    assert [source.text for source in held_out_sources({"data": data}, "run")] == ["text of test"]
    assert Path(data["train_files"][0]).is_file()
