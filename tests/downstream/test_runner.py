"""Checkpoints × tasks: rows, items, resuming, comparing, and lines for what cannot be done."""

import io
import json
import math
import shutil

import numpy as np
import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from hf_lowrank.cli import main
from hf_lowrank.downstream import TASK_FOLDER, catalogue, compare, evaluate
from hf_lowrank.downstream import runner as runner_module
from hf_lowrank.downstream.catalogue import OFFLINE, expand_tasks, wanted_tasks
from hf_lowrank.downstream.figures import score_table
from hf_lowrank.downstream.paired import paired_difference
from hf_lowrank.downstream.results import bootstrap
from hf_lowrank.downstream.runner import requested_scores, unscored
from hf_lowrank.errors import UserError
from hf_lowrank.runs.scores import (
    append_scores,
    item_file,
    read_item_scores,
    read_scores,
    write_item_scores,
)
from hf_lowrank.runs.trajectory import Trajectory


@pytest.fixture(scope="module")
def scored(run, other_run):
    lines = []
    rows = evaluate([run, other_run], steps="last", warn=lines.append)
    assert lines == []
    return rows


def test_every_offline_task_gets_rows_with_intervals(scored, run, other_run):
    assert {row.task for row in scored} == set(OFFLINE)
    assert {(row.run, row.step) for row in scored} == {(run.name, 10), (other_run.name, 10)}
    kinds = {row.metric for row in scored if row.task == "pylib_syntax"}
    assert kinds == {"acc", *(f"acc_{k}" for k in ("bracket", "colon", "keyword", "operator", "indentation", "name"))}
    for row in scored:
        assert row.n >= 100
        assert row.ci_low <= row.value <= row.ci_high
        if row.metric == "acc":
            assert row.n >= 500
            assert row.chance == (0.25 if row.task == "pylib_cloze" else 0.5)


def test_untrained_models_do_not_beat_chance(scored):
    for row in scored:
        if row.task in ("pylib_syntax", "pylib_copy") and row.metric == "acc":
            assert row.ci_low <= row.chance


def test_items_add_up_to_the_rows(scored, run):
    for row in scored:
        if row.run == run.name and row.metric.startswith("acc"):
            items = read_item_scores(item_file(run / "downstream.jsonl", row.step, row.task))
            values = [item[row.metric] for item in items if row.metric in item]
            assert len(values) == row.n
            assert np.mean(values) == pytest.approx(row.value)


def test_nothing_is_scored_twice(scored, run, other_run, monkeypatch):
    before = (run / "downstream.jsonl").read_bytes()
    monkeypatch.setattr(runner_module._Runner, "_score", lambda *_: pytest.fail("scored again"))
    assert evaluate([run, other_run], steps="last") == scored
    assert (run / "downstream.jsonl").read_bytes() == before


def test_a_torn_line_is_scored_again_alone(scored, run, tmp_path):
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    table = copy / "downstream.jsonl"
    lines = table.read_bytes().splitlines(keepends=True)
    last = json.loads(lines[-1])["task"]
    table.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    said = []
    rows = evaluate(copy, tasks=[last], steps=10, warn=said.append)
    assert len(read_scores(copy)) == len(lines)
    assert table.read_bytes().count(b"\n") == len(lines)
    assert [row.value for row in rows if row.task == last] == [
        row.value for row in scored if row.task == last and row.run == run.name
    ]


def test_problems_are_lines_and_the_rest_goes_on(run, tmp_path, tokenizer, make_run):
    said = []
    rows = evaluate(
        run,
        tasks=["pylib_sintax", "arc_easy", "pylib_bits_per_byte"],
        steps=5,
        limit=20,
        output=tmp_path,
        warn=said.append,
    )
    assert {row.task for row in rows} == {"pylib_bits_per_byte"}
    assert len(said) == 2
    assert "unknown task 'pylib_sintax'; did you mean 'pylib_syntax'" in said[0]
    assert "arc_easy: its data set is not on this machine" in said[1]
    assert all("\n" not in line for line in said)
    with pytest.raises(UserError, match="unknown task"):
        evaluate(run, tasks="pylib_sintax", output=tmp_path, warn=said.append)
    bare = make_run(tmp_path / "bare", tokenizer, steps=(5,))
    for folder in ("tokenizer", "checkpoint-5"):
        for file in (bare / folder).glob("tokenizer*"):
            file.unlink()
    said.clear()
    assert evaluate(bare, tasks="pylib_copy", warn=said.append) == []
    assert len(said) == 1
    assert "has no tokenizer" in said[0]


def test_groups_are_taken_apart_and_scored_groups_stay_one():
    found, problems = expand_tasks(["lowrank_paper"])
    assert problems == []
    assert found == ["piqa", "copa", "mrpc", "rte", "mnli", "arc_easy", "blimp", "sst2"]
    found, problems = expand_tasks(["lowrank_paper_full"])
    assert not problems
    assert set(found[8:]) == {
        "qqp", "qnli", "boolq", "multirc", "cola", "wsc", "truthfulqa_mc1", "truthfulqa_mc2", "toxigen"
    }  # fmt: skip
    assert expand_tasks(["pylib"])[0] == list(OFFLINE)
    assert wanted_tasks("a, b,a") == ["a", "b"]


def test_two_runs_are_compared_item_by_item(scored, run, other_run):
    (found,) = compare(run, other_run, tasks=["pylib_syntax"])
    by_run = {row.run: row.value for row in scored if row.task == "pylib_syntax" and row.metric == "acc"}
    assert found.difference == pytest.approx(by_run[other_run.name] - by_run[run.name])
    assert found.ci_low <= found.difference <= found.ci_high
    assert (found.only_second - found.only_first) / found.n == pytest.approx(found.difference)
    assert len(compare(run, other_run)) == 3
    with pytest.raises(UserError, match="did you mean"):
        compare(run, other_run, tasks=["pylib_sintax"])


def test_sign_flips_find_a_difference_and_no_difference():
    rng = np.random.default_rng(0)
    a = rng.normal(size=400)
    noise = rng.normal(size=400)
    difference, low, high, p, _ = paired_difference(a, a + 0.3 + 0.5 * noise)
    assert low < difference < high
    assert p < 0.001
    assert paired_difference(a, a + noise - noise.mean())[3] > 0.5


def test_the_bootstrap_agrees_with_the_closed_form():
    values = [float(v) for v in np.random.default_rng(0).random(600) < 0.7]
    mean = float(np.mean(values))
    error, low, high = bootstrap(values, np.mean, is_mean=True)
    expected = math.sqrt(mean * (1 - mean) / 600)
    assert error == pytest.approx(expected, rel=0.05)
    assert (mean - low) == pytest.approx(1.96 * expected, rel=0.1)
    assert (high - mean) == pytest.approx(1.96 * expected, rel=0.1)
    slow, _, _ = bootstrap(values, lambda v: sum(v) / len(v), is_mean=False)
    assert slow == pytest.approx(expected, rel=0.2)


def test_damaged_tables_are_one_line(tmp_path, scored):
    file = tmp_path / "downstream.jsonl"
    append_scores(file, scored[:2])
    file.write_bytes(b"{}\n" + file.read_bytes())
    with pytest.raises(UserError, match="line 1 is not a valid score"):
        read_scores(file)
    file.write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"line 1 is not a valid score: .*damage"):
        read_scores(file)
    with pytest.raises(UserError, match="its end is damaged"):
        append_scores(file, scored[:2])


def test_the_terminal_table_has_a_line_for_each_checkpoint_and_fits(scored):
    table = score_table(scored, last_only=False)
    assert table.row_count == len({(row.run, row.step) for row in scored})
    assert len(table.columns) == 1 + len({row.task for row in scored})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    for row in scored:
        if row.metric in ("acc", "bits_per_byte"):
            assert f"{row.value:.3f}" in text
            assert row.task.removeprefix("pylib_") in text
    assert score_table(scored).row_count == len({row.run for row in scored})


@pytest.mark.parametrize("by_size", [True, False])
def test_a_scored_group_has_one_row_of_its_own(run, tmp_path, monkeypatch, by_size):
    """As blimp: members' rows name their group, the group's row is lm-eval's mean of them."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "pair.yaml").write_text(
        "group: pair\ntask: [pylib_copy, pylib_cloze]\n"
        f"aggregate_metric_list: [{{metric: acc, weight_by_size: {str(by_size).lower()}}}]\n"
        "metadata: {version: 3.0}\n"
    )
    monkeypatch.setattr(catalogue, "TASK_FOLDERS", [TASK_FOLDER, folder])
    monkeypatch.setattr(runner_module, "expand_tasks", lambda names: (names, []))
    monkeypatch.setattr(runner_module, "OWN", ("pair",))
    rows = evaluate(run, tasks=["pair"], steps=5, limit=60, output=tmp_path)
    members = [row for row in rows if row.group == "pair" and row.metric == "acc"]
    (whole,) = [row for row in rows if row.task == "pair"]
    assert {row.task for row in members} == {"pylib_copy", "pylib_cloze"}
    assert whole.value == pytest.approx(np.mean([row.value for row in members]))
    assert whole.stderr == pytest.approx(math.hypot(*(row.stderr for row in members)) / 2)
    assert (whole.chance, whole.n, whole.task_version) == (0.375, 120, "3.0")
    monkeypatch.setattr(runner_module._Runner, "_score", lambda *_: pytest.fail("scored again"))
    evaluate(run, tasks=["pair"], steps=5, limit=60, output=tmp_path)


def test_a_score_of_a_task_whose_ids_are_numbers_is_there(run, tmp_path, few_shot, monkeypatch):
    rows = evaluate(run, tasks="spell", steps=10, output=tmp_path)
    file = item_file(tmp_path / run.name / "downstream.jsonl", 10, "spell")
    once = [{**item, "item": int(item["item"])} for item in read_item_scores(file)]
    write_item_scores(file, once)
    monkeypatch.setattr(runner_module._Runner, "_score", lambda *_: pytest.fail("scored again"))
    assert evaluate(run, tasks="spell", steps=10, output=tmp_path) == rows


def test_scores_name_the_hub_dataset_of_their_items(run, tmp_path, few_shot, monkeypatch):
    """Read by lm-eval from the Hub under its name; here the name leads to local files. Members give it to a group."""
    import datasets

    assert {(row.dataset, row.subset) for row in evaluate(run, tasks="spell", steps=10, output=tmp_path)} == {
        (None, None)
    }
    files = {split: str(few_shot / f"{split}.jsonl") for split in ("train", "test")}
    local = datasets.load_dataset("json", data_files=files)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **_: local)
    task = json.loads((few_shot / "spell.yaml").read_text())
    del task["dataset_kwargs"]
    for name in ("one", "two"):
        hub = {**task, "task": name, "dataset_path": "user/words", "dataset_name": f"easy-{name}"}
        (few_shot / f"{name}.yaml").write_text(json.dumps(hub))
    (few_shot / "both.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc}]\nmetadata: {version: 1.0}\n"
    )
    monkeypatch.setattr(runner_module, "OWN", ("both",))
    rows = evaluate(run, tasks="both", steps=10, output=tmp_path / "hub")
    assert {(row.task, row.dataset, row.subset) for row in rows} == {
        ("one", "user/words", "easy-one"),
        ("two", "user/words", "easy-two"),
        ("both", "user/words", None),
    }


def test_scores_of_another_run_of_that_name_are_not_taken_for_its_own(run, tmp_path, few_shot):
    other = tmp_path / "other" / run.name
    shutil.copytree(run, other)
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    (other / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "seed": 99}))
    with pytest.raises(UserError, match=r"downstream\.jsonl: .* would both write their rows to it"):
        evaluate([run, other], tasks="spell", steps=10, output=tmp_path)
    evaluate(run, tasks="spell", steps=10, output=tmp_path)
    with pytest.raises(UserError, match=r"downstream\.jsonl: holds rows of another run .* seed 99\)"):
        evaluate(other, tasks="spell", steps=10, output=tmp_path)


def test_scores_are_of_the_checkpoints_that_are_there(run, tmp_path, few_shot):
    other = tmp_path / "other" / run.name
    shutil.copytree(run, other)
    wanted = {"tasks": "spell", "steps": 10}
    rows = evaluate(run, output=tmp_path, **wanted)
    assert evaluate(other, output=tmp_path, **wanted) == rows
    file = other / "checkpoint-10" / "model.safetensors"
    weights = load_file(file)
    save_file({name: weight * 1.01 for name, weight in weights.items()}, file, {"format": "pt"})
    table = tmp_path / run.name / "downstream.jsonl"
    before = table.read_bytes()
    with pytest.raises(UserError, match=r"downstream\.jsonl: its rows of step 10 are not of .*/other/.*checkpoint-10"):
        evaluate(other, output=tmp_path, **wanted)
    assert table.read_bytes() == before
    shutil.copy(table, other)
    assert unscored(other, **wanted) == [(10, "spell")]


def test_the_command_shows_what_was_asked_for_and_fails_where_that_has_no_score(run, tmp_path, few_shot, capsys):
    def command(*more):
        with pytest.raises(SystemExit) as end:
            main(["evaluate", str(run), "--output", str(tmp_path), "--steps", "10", "--tasks", *more])
        return end.value.code, capsys.readouterr()

    status, said = command("spell", "--limit", "4")
    assert status == 0
    assert "spell" in said.out
    # What is there of other requests is no answer to this one.
    status, said = command("no_such_task,spell", "--limit", "3")
    assert status == 1
    assert said.err.splitlines()[-1] == f"hf-lowrank: without a score: {run.name}@10 no_such_task"
    assert "Traceback" not in said.err
    asked, missing = requested_scores([Trajectory(run)], output=tmp_path, tasks="spell", steps=10, limit=3)
    assert {(row.limit, row.step) for row in asked} == {(3, 10)}
    assert missing == []
    status, said = command("no_such_task,spell", "--limit", "3", "--json")
    document = json.loads(said.out)
    assert status == 1
    assert document["missing"] == [f"{run.name}@10 no_such_task"]
    assert [(row["task"], row["value"]) for row in document["scores"]] == [(row.task, row.value) for row in asked]
    assert requested_scores([Trajectory(run)], output=tmp_path, tasks="spell", steps=[5, 10], limit=5) == (
        [],
        [f"{run.name}@5 spell", f"{run.name}@10 spell"],
    )
    # The score of one does not answer for another of its name.
    other = shutil.copytree(run, tmp_path / "other" / run.name, ignore=shutil.ignore_patterns("downstream*"))
    copy = shutil.copytree(run, tmp_path / "copy" / run.name, ignore=shutil.ignore_patterns("downstream*"))
    evaluate(copy, tasks="spell", steps=10, limit=3)
    asked, missing = requested_scores([Trajectory(copy), Trajectory(other)], tasks="spell", steps=10, limit=3)
    assert {(row.limit, row.step) for row in asked} == {(3, 10)}
    assert missing == [f"{other}@10 spell"]


def test_parts_that_a_killed_process_left_are_merged(run, scored, tmp_path, monkeypatch):
    rows = [row for row in scored if row.run == run.name]
    folder = tmp_path / "left" / run.name
    folder.mkdir(parents=True)
    append_scores(folder / ".downstream-1.part.jsonl", rows)
    shutil.copytree(run / "downstream", folder / "downstream")
    monkeypatch.setattr(runner_module._Runner, "_score", lambda *_: pytest.fail("scored again"))
    assert evaluate(run, steps="last", output=tmp_path / "left") == rows


def test_damaged_scores_of_items_are_made_again(scored, run, tmp_path):
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    row = next(row for row in scored if row.run == run.name and row.group is None and row.task.startswith("pylib_"))
    file = item_file(copy / "downstream.jsonl", row.step, row.task)
    whole = file.read_text()
    for content in (whole.replace("0.", "1.", 1), whole[: len(whole) // 2], whole.partition("\n")[0] + "\n"):
        file.write_text(content)
        assert evaluate(copy, tasks=[row.task], steps=row.step) == read_scores(copy)
        assert file.read_text() == whole


@pytest.mark.parametrize("number", ["limit", "batch_size"])
def test_numbers_below_one_stop_before_any_score(run, tmp_path, number):
    with pytest.raises(UserError, match=f"{number} must be at least 1, got 0"):
        evaluate(run, output=tmp_path, **{number: 0})
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_stops_before_any_score(run, tmp_path):
    for device in ("abacus", "cuda:99"):
        with pytest.raises(UserError, match=f"device must be cpu.* on this machine, got '{device}'"):
            evaluate(run, steps="last", output=tmp_path, device=device)
    assert list(tmp_path.iterdir()) == []
