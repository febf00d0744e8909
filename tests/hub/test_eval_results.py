"""Downstream scores as the Hub's evaluation results: what is reported, and what the unmodified client reads back."""

import json

import pytest
import yaml
from huggingface_hub import HfApi, parse_eval_result_entries

from hf_lowrank.hub import push
from hf_lowrank.hub.contents import EVAL_RESULTS
from hf_lowrank.hub.eval_results import eval_results_file
from hf_lowrank.runs.scores import Score

SCORE = {
    "run": "nano-galore", "method": "galore", "seed": 0, "step": 30, "task": "arc_easy", "metric": "acc",
    "value": 0.375, "stderr": 0.01, "ci_low": 0.35, "ci_high": 0.4, "n": 2376, "chance": 0.25,
    "higher_is_better": True, "group": None, "task_version": "1.0", "lm_eval_version": "0.4.13", "items": "abc",
    "dataset": "allenai/ai2_arc", "subset": "ARC-Easy",
}  # fmt: skip


def score(**changes):
    return Score(**{**SCORE, **changes})


def entries(scores, step=30):
    file = eval_results_file(scores, step)
    return [] if file is None else parse_eval_result_entries(yaml.safe_load(file.read()))


def test_an_entry_names_dataset_task_and_value():
    (entry,) = entries([score()])
    assert (entry.dataset_id, entry.task_id, entry.value) == ("allenai/ai2_arc", "ARC-Easy", 0.375)
    assert entry.notes == "acc on 2376 items, step 30, lm-eval 0.4.13, arc_easy 1.0"


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 20},
        {"dataset": None, "subset": None},
        {"dataset": "json"},
        {"dataset": "../data/x"},
        {"dataset": "user/hf_" + "a" * 34},
        {"limit": 100},
        {"group": "blimp"},
        {"value": float("nan")},
    ],
)
def test_what_is_no_benchmark_score_of_this_checkpoint_is_left_out(changes):
    assert entries([score(**changes)]) == []
    assert len(entries([score(task="piqa", dataset="baber/piqa", subset=None), score(**changes)])) == 1


def test_one_score_a_task_and_a_name_for_each_of_two_on_one_dataset():
    found = entries(
        [
            score(metric="acc_norm", value=0.4),
            score(),
            score(metric="f1", value=0.9),
            score(task="wikitext", metric="word_perplexity", value=40.0, dataset="EleutherAI/wikitext", subset=None),
            score(task="truthfulqa_mc1", dataset="truthfulqa/truthful_qa", subset="multiple_choice", value=0.2),
            score(task="truthfulqa_mc2", dataset="truthfulqa/truthful_qa", subset="multiple_choice", value=0.4),
        ]
    )
    assert [(e.dataset_id, e.task_id, e.value) for e in found] == [
        ("allenai/ai2_arc", "ARC-Easy", 0.375),
        ("truthfulqa/truthful_qa", "truthfulqa_mc1", 0.2),
        ("truthfulqa/truthful_qa", "truthfulqa_mc2", 0.4),
        ("EleutherAI/wikitext", "default", 40.0),
    ]


def test_a_group_over_configurations_goes_by_its_own_name():
    rows = [
        score(task="blimp", dataset="nyu-mll/blimp", subset=None, value=0.7),
        score(task="blimp_adjunct", dataset="nyu-mll/blimp", subset="adjunct", group="blimp"),
    ]
    assert [(entry.task_id, entry.value) for entry in entries(rows)] == [("blimp", 0.7)]


def test_the_client_reads_them_back_from_main_alone(hub, run):
    rows = [SCORE, {**SCORE, "step": 20, "value": 0.3}, {**SCORE, "task": "pylib_copy", "dataset": None}]
    (run / "downstream.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    push(run, "user/tiny", steps=[20])
    api = HfApi()

    def read(revision=None):
        return api.model_info("user/tiny", revision=revision, expand=["evalResults"]).eval_results

    assert [(e.dataset_id, e.task_id, e.value) for e in read()] == [("allenai/ai2_arc", "ARC-Easy", 0.3)]
    assert read("step-20") is None
    # The next checkpoint replaces them with its own; a file of somebody else stays.
    theirs = {
        "key": "file",
        "path": ".eval_results/theirs.yaml",
        "data": b"- {dataset: {id: a/b, task_id: c}, value: 1}",
    }
    hub.store.commit("user/tiny", "main", [theirs], "theirs", "", None)
    push(run, "user/tiny")
    assert {(e.dataset_id, e.value) for e in read()} == {("allenai/ai2_arc", 0.375), ("a/b", 1)}
    # Scores that were removed from the run go from the Hub with the next weights.
    (run / "downstream.jsonl").write_text("")
    push(run, "user/tiny")
    assert {(e.dataset_id, e.value) for e in read()} == {("a/b", 1)}
    assert EVAL_RESULTS not in hub.store.files("user/tiny", "main")
    assert hub.repeated == []
