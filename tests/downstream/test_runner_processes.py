"""Evaluating with several processes: the rows of one, whatever is shared out, and what is said when one is lost."""

import json
import os
import random
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate import PartialState

from hf_lowrank.downstream import evaluate
from hf_lowrank.downstream import runner as runner_module
from hf_lowrank.downstream.lm_eval_model import LowRankLM
from hf_lowrank.errors import UserError
from hf_lowrank.runs.scores import item_file, read_item_scores, read_scores
from tests.distributed.pairs import in_two, lose_one


def test_two_processes_give_the_rows_of_one(run, other_run, tmp_path):
    alone = evaluate([run, other_run], output=tmp_path / "alone", tasks="pylib_syntax,pylib_cloze", limit=24)
    in_two(partial(evaluate, [run, other_run], output=tmp_path / "two", tasks="pylib_syntax,pylib_cloze", limit=24))
    together = evaluate([run, other_run], output=tmp_path / "two", tasks="pylib_syntax,pylib_cloze", limit=24)
    assert sorted(map(repr, together)) == sorted(map(repr, alone))
    assert len(alone) > 0
    assert not list((tmp_path / "two").rglob("*.part.jsonl"))


def test_items_are_divided_where_tasks_do_not_go_up(run, tmp_path):
    tasks = ("pylib_syntax", "pylib_bits_per_byte", "lowrank_random_sharpness")

    def each_alone(name):
        return [evaluate(run, output=tmp_path / name, tasks=task, steps=10, limit=24) for task in tasks][-1]

    alone = each_alone("alone")
    in_two(partial(each_alone, "two"))
    assert sorted(map(repr, each_alone("two"))) == sorted(map(repr, alone))
    table = run.name + "/downstream.jsonl"
    for task in tasks:
        items = [item_file(tmp_path / name / table, 10, task).read_bytes() for name in ("alone", "two")]
        assert items[0] == items[1]
    assert not list((tmp_path / "two").rglob("*.part.jsonl"))


def test_examples_in_the_prompt_are_the_same_for_all_checkpoints_and_processes(run, other_run, tmp_path, few_shot):
    table = run.name + "/downstream.jsonl"

    def scored(name, steps):
        return evaluate(run, tasks="spell", steps=steps, output=tmp_path / name)

    random.seed(7)
    expected = random.Random(7).random()
    alone = scored("alone", 10)
    assert random.random() == expected
    in_two(partial(scored, "two", 10))
    scored("later", [5, 10])
    for name in ("two", "later"):
        assert [row for row in read_scores(tmp_path / name / table) if row.step == 10] == alone
        files = [item_file(tmp_path / each / table, 10, "spell") for each in ("alone", name)]
        assert files[0].read_bytes() == files[1].read_bytes()
    items = read_item_scores(files[0])
    assert [item["item"] for item in items] == [str(i) for i in range(12)]


def said_by_two(command, folder):
    """The lines that each of two processes says in `command(say)`."""

    def saying():
        lines = []
        command(lines.append)
        (folder / f"{os.environ['RANK']}.said").write_text(json.dumps(lines))

    in_two(saying)
    return [json.loads((folder / f"{rank}.said").read_text()) for rank in range(2)]


def test_requests_that_differ_are_not_divided(run, tmp_path, few_shot, monkeypatch):
    """Else each process would believe the other's answers to questions of its own."""
    monkeypatch.setattr(runner_module, "_lm_eval_seeds", lambda *_: nullcontext())
    lines = said_by_two(lambda say: evaluate(run, tasks="spell", steps=10, output=tmp_path, warn=say), tmp_path)
    assert [len(said) for said in lines] == [1, 0]
    assert "spell: its requests differ from process to process" in lines[0][0]
    assert read_scores(tmp_path / run.name) == []


def test_processes_that_see_different_scores_do_the_work_that_the_first_sees(run, tmp_path):
    def command():
        if os.environ["RANK"] == "1":
            runner_module._SavedScores._is_done = lambda *_: True
        evaluate(run, tasks="pylib_syntax", limit=24, output=tmp_path)

    in_two(command)
    assert {row.step for row in read_scores(tmp_path / run.name)} == {0, 5, 10}


def test_a_task_that_cannot_be_loaded_is_said_once_by_a_process(run, tmp_path, few_shot):
    lines = said_by_two(lambda say: evaluate(run, tasks="none_such", output=tmp_path, warn=say), tmp_path)
    assert [len(said) for said in lines] == [1, 1]
    assert all("none_such" in said[0] for said in lines)


def test_processes_that_cannot_be_joined_are_one_line(run, tmp_path):
    def command(say):
        def refuse(**_):
            raise RuntimeError("connection closed by peer")

        torch.distributed.new_group = refuse
        try:
            evaluate(run, tasks="pylib_syntax", steps=10, limit=24, output=tmp_path)
        except UserError as error:
            say(str(error))

    for said in said_by_two(command, tmp_path):
        assert said == [
            "evaluating with several processes stopped: another process is gone (connection closed by peer); finished "
            "rows are saved, rerun to resume"
        ]


def test_what_cannot_be_done_together_is_said_once_and_the_rest_goes_on(run, tmp_path):
    bad = tmp_path / run.name
    shutil.copytree(run, bad, ignore=shutil.ignore_patterns("downstream*"))
    for file in bad.glob("checkpoint-5/*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])

    def command():
        lines = []
        rows = evaluate(bad, tasks="pylib_syntax", steps=(0, 5, 10), limit=24, warn=lines.append)
        evaluate(bad, tasks="pylib_syntax", steps=5, limit=24, warn=lines.append)
        rank = PartialState().process_index
        (tmp_path / f"{rank}.json").write_text(json.dumps([len(rows), lines]))

    in_two(command)
    said = []
    for rank in range(2):
        count, lines = json.loads((tmp_path / f"{rank}.json").read_text())
        assert count == len(read_scores(bad))
        said += lines
    assert {row.step for row in read_scores(bad)} == {0, 10}
    assert len(said) == 2  # in a share of whole tasks, and where the items were to be divided
    assert all("checkpoint-5" in line or "step 5" in line for line in said)
    assert all(line.count(f"{bad}/checkpoint-5") == 1 for line in said)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_lost_while_items_are_divided_ends_the_command_in_one_line(run, tmp_path, lost):
    folder = tmp_path / "two"
    table = folder / run.name / "downstream.jsonl"

    def command():
        answer = LowRankLM._answer_tokens

        def begun(lm, batch):
            (tmp_path / "begun").touch()
            return answer(lm, batch)

        LowRankLM._answer_tokens = begun
        try:
            evaluate(run, tasks="pylib_syntax", output=folder)
        except UserError as error:
            (tmp_path / "said").write_text(str(error))
            raise SystemExit(2) from None

    # Two of three checkpoints go up in shares, and of the third the items are begun.
    assert lose_one(command, lost, (tmp_path / "begun").exists) == 2
    assert "finished rows are saved, rerun to resume" in (tmp_path / "said").read_text()
    left = read_scores(table)
    assert {row.step for row in left} == {0, 5}
    assert evaluate(run, tasks="pylib_syntax", output=folder)[: len(left)] == left
    assert {row.step for row in read_scores(table)} == {0, 5, 10}


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_command_with_what_it_had_written(run, other_run, tmp_path, lost):
    tasks = {"tasks": "pylib_syntax,pylib_cloze", "limit": 24}
    alone = evaluate([run, other_run], output=tmp_path / "alone", **tasks)
    folder, names = tmp_path / "two", (run.name, other_run.name)
    parts = [folder / name / f".downstream-{rank}.part.jsonl" for rank, name in enumerate(names)]
    command = partial(evaluate, [run, other_run], output=folder, **tasks)
    assert lose_one(command, lost, lambda: bool(read_scores(parts[lost]))) not in (0, None)
    left = [set(map(repr, read_scores(part))) for part in parts]
    shares = [{repr(row) for row in alone if row.run == name} for name in names]
    assert left[lost] < shares[lost]
    assert left[1 - lost] == shares[1 - lost]
    assert not any((folder / name / "downstream.jsonl").exists() for name in names)
    assert sorted(map(repr, command())) == sorted(map(repr, alone))
    assert not list(folder.rglob("*.part.jsonl"))
