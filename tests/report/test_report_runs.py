"""Reading run folders: what is damaged is named in one line, what is torn is dropped."""

import json
import os

import pytest
import torch

from hf_lowrank.errors import UserError
from hf_lowrank.report.curves import curves, plane
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.measurements import read_measurements
from hf_lowrank.runs.records import load_run, load_runs
from hf_lowrank.storage.checksums import sealed_text, write_checksums


def test_a_run_is_read(make_run):
    run = load_run(make_run("g", "galore", 3, loss=3.25))
    assert (run.name, run.method, run.seed, run.steps) == ("g", "galore", 3, (0, 50, 100, 150, 200))
    assert run.final_loss == 3.25
    assert run.perplexity == pytest.approx(25.790339917193062)
    assert run.fact("tokens_seen") == 819200
    assert run.fact("torch") is None
    assert run.last("random_sharpness").step == 200


def test_a_folder_of_checkpoints_without_a_recipe_is_a_run(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "config.json").write_text("{}")
    run = load_run(tmp_path)
    assert (run.method, run.seed, run.steps, run.final_loss, run.rows) == ("unknown", None, (7,), None, ())


def test_the_evaluation_file_outranks_the_facts(make_run):
    folder = make_run("a")
    kept = EvaluationSet(torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.long))
    kept.save(folder)
    assert load_run(folder).fingerprint == kept.fingerprint
    (folder / "evaluation.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"evaluation\.safetensors: not a readable"):
        load_run(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "recipe.yaml").write_text("method: [galore"), "recipe.yaml: not a readable recipe"),
        (lambda run: (run / "recipe.yaml").write_text("- 1"), "recipe.yaml: a recipe must be a mapping"),
        (lambda run: (run / "facts.json").write_text("{"), "facts.json: damaged: "),
        (lambda run: (run / "measurements.jsonl").write_text('{"a": 1}\n{}\n'), "line 1 is not a valid measurement"),
        (lambda run: (run / "measurements.jsonl").write_bytes(b"\xff\xfe\n"), "line 1 is not a valid measurement"),
        (lambda run: (run / "checkpoint-200" / "trainer_state.json").write_text("{"), "not a readable trainer state"),
        (lambda run: [os.remove(p) for p in run.glob("checkpoint-*/config.json")], "no complete checkpoint"),
    ],
)
def test_damage_is_named_in_one_line(make_run, spoil, said):
    run = make_run("a")
    spoil(run)
    with pytest.raises(UserError, match=said) as fault:
        load_run(run)
    assert "\n" not in str(fault.value)
    assert str(run) in str(fault.value)


@pytest.mark.parametrize("name", ["trainer_state.json", "config.json"])
def test_a_file_that_was_written_and_is_gone_is_damage(make_run, name):
    run = make_run("a")
    (run / "recipe.yaml").write_text(sealed_text((run / "recipe.yaml").read_text()))
    for checkpoint in run.glob("checkpoint-*"):
        write_checksums(checkpoint)
    load_run(run)
    (run / "checkpoint-200" / name).unlink()
    with pytest.raises(UserError, match=rf"checkpoint-200: damaged: {name} is missing"):
        load_run(run)


def test_the_loss_is_the_last_that_is_known(make_run):
    run = make_run("a", loss=3.4)
    row = {"run": "a", "method": "galore", "seed": 0, "step": 200, "metric": "loss", "value": 3.2}
    with open(run / "measurements.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    assert load_run(run).final_loss == 3.4
    # Checkpoints from elsewhere have no trainer's state of their last step.
    state = run / "checkpoint-200" / "trainer_state.json"
    log = [entry for entry in json.loads(state.read_text())["log_history"] if entry["step"] <= 100]
    (run / "checkpoint-100" / state.name).write_text(json.dumps({"log_history": log}))
    state.unlink()
    assert load_run(run).final_loss == 3.2


def test_no_run_is_an_error(tmp_path, make_run):
    with pytest.raises(UserError, match="is not a run folder"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="at least one run"):
        load_runs([])
    run = make_run("a")
    with pytest.raises(UserError, match="named twice"):
        load_runs([run, str(run)])


def test_runs_of_one_folder_name_get_names_of_their_own(make_run):
    names = [run.name for run in load_runs([make_run("x/seed0"), make_run("y/seed0"), make_run("z")])]
    assert names == ["x/seed0", "y/seed0", "z"]


def test_the_last_row_of_a_key_counts_and_a_torn_line_is_dropped(tmp_path):
    row = {"run": "a", "method": "galore", "seed": 0, "step": 1, "metric": "loss", "scope": "model", "value": 2.0}
    path = tmp_path / "measurements.jsonl"
    lines = [json.dumps(row), json.dumps(row | {"value": 3.0}), json.dumps(row | {"step": 2, "value": None})]
    path.write_text("\n".join(lines) + "\n" + '{"step": 3, "met')
    rows = read_measurements(path)
    assert [(r.step, r.value) for r in rows if r.has_value] == [(1, 3.0)]
    assert [r.step for r in rows] == [1, 2]


def test_curves_are_put_together_in_units_that_compare(make_run):
    (*_, last) = curves(load_run(make_run("a")), "random_curve")
    assert last.step == 200
    assert last.relative
    assert last.t[0] == -0.3
    assert last.t == tuple(sorted(last.t))
    assert all(low < mean < high for low, mean, high in zip(last.low, last.mean, last.high, strict=True))
    assert curves(load_run(make_run("b", measured=False)), "random_curve") == []


def test_a_plane_is_put_together(make_run):
    found = plane(load_run(make_run("a", activations=True)))
    assert found.step == 200
    assert found.x == found.y == tuple(i / 5 for i in range(-5, 6))
    middle = found.loss[5][5]
    assert middle == min(value for row in found.loss for value in row)
    assert found.loss[5][10] - middle == pytest.approx((found.loss[10][5] - middle) / 2)
    assert plane(load_run(make_run("b"))) is None
