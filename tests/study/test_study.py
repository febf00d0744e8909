"""What a study does: stages, results, choices, finished work, failures."""

import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hf_lowrank.cli import main
from hf_lowrank.errors import UserError
from hf_lowrank.report import write_report
from hf_lowrank.runs.measurements import read_measurements
from hf_lowrank.runs.records import load_run
from hf_lowrank.runs.run_files import read_facts
from hf_lowrank.storage.checksums import sealed_text, unsealed
from hf_lowrank.storage.parsing import dump_yaml
from hf_lowrank.study import load_study, run_study
from hf_lowrank.study.executors import ForkExecutor, WorkerExecutor
from hf_lowrank.study.plan import probe
from hf_lowrank.study.units import TrainUnit
from hf_lowrank.training import load_recipe
from tests.study.tiny import METHODS, TRAINING, study_data, write_recipe

PAIRS = {"metrics": "loss,method_barrier", "settings": {"sequences": 4, "path": {"points": 1}}, "pairs": "last"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """(study file, its directory, what the first call said) of a complete study with a third member."""
    folder = tmp_path_factory.mktemp("study")
    for method in METHODS:
        write_recipe(folder, corpus, method)
    members = {"full_rank": "full_rank.yaml", "low": {"recipe": "galore.yaml", "learning_rate": 1e-3}}
    members["high"] = {"recipe": "galore.yaml", "set": ["method.rank=8"]}
    study = folder / "study.yaml"
    study.write_text(yaml.safe_dump(study_data(members=members, seeds=[0, 1], measure=PAIRS), sort_keys=False))
    said = []
    result = run_study(study, output=folder / "out", fork_here=True, say=said.append, jobs=2)
    assert result.failures == []
    return study, folder / "out", said


def test_every_stage_writes_its_files(finished):
    study, out, said = finished
    runs = sorted(path.name for path in (out / "runs").iterdir())
    assert runs == ["full_rank-seed0", "full_rank-seed1", "high-seed0", "high-seed1", "low-seed0", "low-seed1"]
    for run in runs:
        assert sorted(load_run(out / "runs" / run).steps) == [0, 6, 12]
        assert (out / "runs" / run / "downstream.jsonl").stat().st_size > 0
    assert len(json.loads((out / "claims.json").read_text())["claims"]) == 7
    assert (out / "report" / "report.html").stat().st_size > 10_000
    assert not (out / "failures.json").exists()
    assert any(line.startswith("skipped predict: leaving a method out needs at least 6 methods") for line in said)
    assert any("s left" in line for line in said)
    resolved = load_study(out / "study.yaml").settings
    assert resolved == load_study(study).settings


def test_each_run_is_trained_by_its_recipe_seed_and_overrides(finished):
    out = finished[1]
    recipes = {path.parent.name: yaml.safe_load(path.read_text()) for path in (out / "runs").glob("*/recipe.yaml")}
    assert {name: recipe["seed"] for name, recipe in recipes.items()} == {name: int(name[-1]) for name in recipes}
    assert recipes["low-seed1"]["training"]["learning_rate"] == 1e-3
    assert recipes["high-seed0"]["method"]["rank"] == 8
    assert recipes["low-seed0"]["method"]["rank"] == METHODS["galore"]["rank"]


def test_runs_are_compared_with_the_baseline_of_their_seed_and_every_pair_once(finished):
    out = finished[1]
    pairs = {}
    for run in (out / "runs").iterdir():
        for row in read_measurements(run):
            if row.metric == "method_barrier" and row.baseline is not None:
                assert row.run[-1] == row.baseline[-1]
                pairs.setdefault((frozenset((row.run, row.baseline)), row.step), []).append(row.value)
    last = {names: values for (names, step), values in pairs.items() if step == 12}
    assert len(last) == 3 * 2  # pairs of three members, for each seed
    assert all(len(values) == 1 and math.isfinite(values[0]) for values in last.values())
    # To the baseline at both checkpoints that have landscapes, between others at the last one only.
    assert {step for names, step in pairs if not any("full_rank" in name for name in names)} == {12}
    assert {step for names, step in pairs if any("full_rank" in name for name in names)} == {6, 12}


def test_a_second_call_skips_finished_work(finished, run):
    study, out, _ = finished
    kept = [
        path for path in out.rglob("*") if path.is_file() and "report" not in path.parts and "logs" not in path.parts
    ]
    before = {path: path.stat().st_mtime_ns for path in kept if path.name not in ("study.yaml", ".timings.json")}
    result, said = run(study, output=out)
    assert result.failures == []
    assert {stage.stage: stage.total - stage.done for stage in result.plan.stages} == {
        "train": 0, "measure": 0, "evaluate": 0, "predict": 0, "claims": 0, "report": 1,
    }  # fmt: skip
    assert [line.split(":")[0] for line in said if line.startswith("[")] == ["[1/1] report report"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data.replace(b"0.", b"1.", 1)])
def test_a_damaged_result_is_recomputed(finished, run, tmp_path, damage):
    study, out, _ = finished
    copy = shutil.copytree(out, tmp_path / "out", symlinks=True)
    file = copy / "claims.json"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    with pytest.raises(UserError, match=r"claims\.json: .*; rerun that stage of the study"):
        write_report([*(copy / "runs").iterdir()], tmp_path / "page", study=copy)
    result, _ = run(study, output=copy)
    assert result.failures == []
    assert result.page is not None
    assert file.read_bytes() == whole


def test_a_changed_setting_is_redone_and_nothing_else(finished, run, tmp_path):
    study, out, _ = finished
    changed = yaml.safe_load(study.read_text())
    changed["evaluate"]["steps"] = [6, 12]
    other = study.with_name("changed.yaml")
    other.write_text(yaml.safe_dump(changed))
    result, _ = run(other, output=out, dry_run=True)
    left = {stage.stage: stage.total - stage.done for stage in result.plan.stages}
    assert (left["train"], left["measure"], left["evaluate"]) == (0, 0, 6)


def test_dry_run_by_command_writes_nothing(write_study, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = write_study(sweep={"learning_rate": [1e-3, 2e-3]})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["study", str(study), "--dry-run", "--jobs", "2"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert sorted(tmp_path.rglob("*")) == before
    for part in (
        "full_rank",
        "galore",
        "sweep",
        "train",
        "measure",
        "runs/tiny",
        "2 in parallel with 1 thread each",
        "disk",
    ):
        assert part in out
    (sweep,) = [line for line in out.splitlines() if line.startswith("│ sweep")]
    assert sweep.split("│")[2].strip() == "4"


def test_a_narrow_terminal_shows_what_each_member_is(write_study, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    study = write_study(members={"full_rank": "full_rank.yaml", "galore_at_a_low_rate": "galore.yaml"})
    with pytest.raises(SystemExit):
        main(["study", str(study), "--dry-run"])
    table = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    shown = ["".join(cells[column].strip() for cells in table) for column in (1, 2)]
    assert "galore_at_a_low_rate" in shown[0]
    assert shown[1].count("galore") == 1
    assert any(cells[3].strip() == "0 of 2" for cells in table)


def test_the_plan_as_json(write_study, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = write_study()
    with pytest.raises(SystemExit) as stop:
        main(["study", str(study), "--dry-run", "--jobs", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    (train,) = [stage for stage in found["plan"]["stages"] if stage["stage"] == "train"]
    assert train["total"] == sum(member["runs"] for member in found["plan"]["members"])
    assert found["left"] == sum(stage["total"] - stage["done"] for stage in found["plan"]["stages"])
    assert (found["failures"], found["page"], found["claims"], found["answer"]) == ([], None, [], [])


def test_the_cost_of_a_step_is_probed(write_study, monkeypatch):
    """Time from steps on this machine, disk and memory from the model and its optimizer."""
    study = write_study(members={"full_rank": "full_rank.yaml"})
    monkeypatch.setattr("hf_lowrank.study.plan.probe", probe)
    plan = run_study(study, dry_run=True).plan
    (member,) = plan.members
    # embeddings, head, two blocks and norms of width 16, with AdamW's two moments, in float32
    parameters = 2 * 300 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    assert member.checkpoint_bytes == pytest.approx(3 * 4 * parameters, rel=0.05)
    assert member.checkpoints == 3
    assert 0 < member.seconds < 60
    assert plan.disk_bytes == 2 * 3 * member.checkpoint_bytes
    assert plan.estimates["train full_rank-seed0"] == pytest.approx(member.seconds)
    assert 0 < plan.estimates["measure full_rank-seed0"] < 60


def test_stages_one_by_one(write_study, tmp_path, run):
    study = write_study(seeds=[0])
    out = tmp_path / "out"
    result, _ = run(study, output=out, stages="train")
    assert [stage.stage for stage in result.plan.stages] == ["train"]
    assert result.page is None
    assert not list(out.rglob("measurements.jsonl"))
    result, _ = run(study, output=out, stages=["report", "measure"])
    assert [stage.stage for stage in result.plan.stages] == ["measure", "report"]
    assert len(list(out.rglob("measurements.jsonl"))) == 2
    assert not list(out.rglob("downstream.jsonl"))
    assert result.page == out / "report" / "report.html"


def broken_run(study, folder):
    """The start of a run whose held-out sequences are damaged."""
    recipe = load_recipe(load_study(study).settings.members["galore"].recipe, seed=0)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(sealed_text(dump_yaml(recipe.plain())))
    (folder / "evaluation.safetensors").write_bytes(b"no tensors")
    return folder


def test_a_failed_run_is_named_and_stops_no_other(write_study, tmp_path, run):
    study, out = write_study(measure={"metrics": "loss"}, seeds=[0]), tmp_path / "out"
    broken = broken_run(study, out / "runs" / "galore-seed0")
    result, _ = run(study, output=out, stages="train,measure,report")
    (failure,) = result.failures
    assert (failure.what, failure.stage) == ("galore-seed0", "train")
    assert "evaluation.safetensors" in failure.reason
    assert [unsealed(entry) for entry in json.loads((out / "failures.json").read_text())] == [vars(failure)]
    assert "evaluation.safetensors" in (out / "logs" / "train" / "galore-seed0.log").read_text()
    assert [path.parent.name for path in out.rglob("measurements.jsonl")] == ["full_rank-seed0"]
    assert result.page is not None
    said = run(study, output=out, stages="measure")[1]
    assert "skipped, not trained: galore-seed0" in said
    # The next call tries again.
    (broken / "evaluation.safetensors").unlink()
    result, _ = run(study, output=out, stages="train,measure")
    assert result.failures == []
    assert not (out / "failures.json").exists()
    assert (broken / "measurements.jsonl").exists()


def test_the_command_runs_workers_and_reports_failures(write_study, tmp_path, capsys, finished):
    """Through the worker process, with the same results as forks from here, and status 1 for a failure."""
    study, out = write_study(seeds=[0]), tmp_path / "out"
    broken_run(study, out / "runs" / "galore-seed0")
    with pytest.raises(SystemExit) as stop:
        main(["study", str(study), "--output", str(out), "--jobs", "2", "--stages", "train,report"])
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert "train full_rank-seed0: done in" in printed.err
    assert "failed: train galore-seed0: " in printed.out
    assert f"page: {out / 'report' / 'report.html'}" in printed.out
    weights = "runs/full_rank-seed0/checkpoint-12/model.safetensors"
    assert (out / weights).read_bytes() == (finished[1] / weights).read_bytes()


EXECUTORS = {
    "fork": lambda: ForkExecutor(1),
    "worker that forks": lambda: WorkerExecutor(1),
    "worker for each": lambda: WorkerExecutor(1, fork=False),
}


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_process_that_dies_fails_its_unit_alone(kind, tmp_path, write_study):
    recipe = load_study(write_study()).settings.members["full_rank"].recipe
    long = TrainUnit(
        name="killed",
        recipe=recipe,
        overrides=["training.max_steps=100000"],
        seed=0,
        folder="",
        output=str(tmp_path / "a"),
    )
    executor = EXECUTORS[kind]()
    executor.start(long, tmp_path / "log", 0)
    if kind == "fork":
        os.kill(next(iter(executor._children)), signal.SIGKILL)
    else:
        dead = executor._running[long.key]
        dead.kill()
        dead.wait()
    executor.start(replace(long, name="wrong", recipe="none.yaml"), tmp_path / "other", 1)
    outcomes, deadline = {}, time.monotonic() + 120
    while len(outcomes) < 2 and time.monotonic() < deadline:
        outcomes |= {outcome.key: outcome for outcome in executor.wait(0.2)}
    assert kind == "fork" or dead.stdin.closed
    executor.stop()
    assert outcomes["train wrong"].reason == "none.yaml: no such recipe file"
    assert "SIGKILL" in outcomes["train killed"].reason


def test_a_unit_sent_to_a_worker_that_has_just_ended_is_reported(tmp_path, write_study, monkeypatch):
    recipe = load_study(write_study()).settings.members["full_rank"].recipe
    unit = TrainUnit(name="late", recipe=recipe, overrides=[], seed=0, folder="", output=str(tmp_path / "a"))
    executor = WorkerExecutor(1)
    worker = executor._spawn()
    worker.kill()
    worker.wait()
    monkeypatch.setattr(worker, "poll", lambda: None)  # it was alive when it was chosen
    executor.start(unit, tmp_path / "log")
    (outcome,) = executor.wait(10)
    assert outcome.key == "train late"
    assert "SIGKILL" in outcome.reason
    executor.stop()


def test_time_left_comes_from_what_has_run(finished):
    out = finished[1]
    timings = json.loads((out / ".timings.json").read_text())
    assert timings["train full_rank-seed0"] > 0
    facts = read_facts(out / "runs" / "full_rank-seed0")
    assert facts["step"] == TRAINING["max_steps"]
    data = yaml.safe_load(Path(finished[0]).read_text())
    data["seeds"] = [0, 1, 2]
    study = Path(finished[0]).with_name("more.yaml")
    study.write_text(yaml.safe_dump(data))
    plan = run_study(study, output=out, dry_run=True).plan
    seconds = sorted(read_facts(out / "runs" / f"full_rank-seed{seed}")["wall_seconds"] for seed in (0, 1))
    assert seconds[0] - 1e-6 <= plan.estimates["train full_rank-seed2"] <= seconds[1] + 1e-6  # decimals
    assert plan.estimates["evaluate low-seed2"] in [
        value for key, value in timings.items() if key.startswith("evaluate")
    ]
