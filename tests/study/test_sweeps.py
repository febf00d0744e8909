"""Sweeps: what is tried for each member, which trial wins, what follows at an edge, and what a kill leaves of it."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from hf_lowrank.errors import UserError
from hf_lowrank.measuring.plan import find_baseline
from hf_lowrank.report.answer import groups
from hf_lowrank.report.members import baseline_of, sweep_of, with_distinct_methods
from hf_lowrank.report.plots import loss_curves
from hf_lowrank.runs.measurements import read_measurements
from hf_lowrank.runs.records import load_runs
from hf_lowrank.runs.run_files import read_facts
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.study import load_study
from hf_lowrank.study.layout import planned_trials
from hf_lowrank.study.ranges import edge_distances, grid, one_step_beyond, sample
from hf_lowrank.study.show import print_result
from hf_lowrank.study.stages import choose, read_winners
from tests.study.test_kills import drill

RATE, SCALE, DECAY = "training.learning_rate", "method.scale", "training.weight_decay"


def rows_of(out):
    return json.loads((out / "sweep.json").read_text())


def final_loss_in(folder, steps):
    file = folder / f"checkpoint-{steps}" / "trainer_state.json"
    losses = [entry["eval_loss"] for entry in json.loads(file.read_text())["log_history"] if "eval_loss" in entry]
    return losses[-1]


def recipe_of(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())


# -- what is tried


def test_a_grid_has_every_combination():
    found = grid({RATE: [1, 2, 3], SCALE: [0.5, "x"]})
    assert [(values[RATE], values[SCALE]) for values in found] == list(itertools.product([1, 2, 3], [0.5, "x"]))


def test_a_sample_has_one_value_in_each_part_of_a_range():
    ranges = {
        RATE: {"log_uniform": [1e-3, 1e-1]},
        DECAY: {"uniform": [-1, 3]},
        "method.rank": {"log_uniform": [1, 1000], "integer": True},
        "method.proj_type": ["left", "right"],
    }
    found = sample(ranges, 8, "7 galore")
    parts = [sorted(math.floor(8 * math.log10(v[RATE] / 1e-3) / 2 + 1e-3) for v in found)]
    parts.append(sorted(math.floor(8 * (v[DECAY] + 1) / 4 + 1e-2) for v in found))
    assert parts == [list(range(8))] * 2
    assert all(float(f"{v[RATE]:.3g}") == v[RATE] and isinstance(v["method.rank"], int) for v in found)
    assert sorted(v["method.proj_type"] for v in found) == ["left"] * 4 + ["right"] * 4
    assert [v[RATE] for v in found] != sorted(v[RATE] for v in found)
    assert sample(ranges, 8, "7 galore") == found
    assert sample(ranges, 8, "7 fira") != found
    assert sample(ranges, 8, "8 galore") != found
    # A key's values do not depend on the other keys.
    assert [v[RATE] for v in sample({RATE: ranges[RATE]}, 8, "7 galore")] == [v[RATE] for v in found]


def test_a_sample_of_lists_is_without_replacement():
    ranges = {RATE: [1, 2, 3], SCALE: [1, 2]}
    found = sample(ranges, 6, "0 a")
    assert sorted(map(str, found)) == sorted(map(str, grid(ranges)))
    assert len({str(values) for values in sample(ranges, 4, "0 a")}) == 4
    with pytest.raises(ValueError, match="6 combinations"):
        sample(ranges, 7, "0 a")
    with pytest.raises(ValueError, match="too few"):
        sample({"method.rank": {"uniform": [1, 3], "integer": True}}, 8, "0 a")


@pytest.mark.parametrize(
    ("values", "winner", "distance", "beyond"),
    [
        ([1, 10, 100], 100, 0, 1000),
        ([1, 10, 100], 1, 0, None),  # a tenth is not a whole number
        ([1.0, 10.0, 100.0], 1.0, 0, 0.1),
        ([1.0, 10.0, 100.0], 10.0, 1, None),
        ([0.0, 0.1, 0.2], 0.2, 0, 0.3),
        ([0.0, 0.1, 0.2], 0.0, 0, -0.1),
        ([1e-3, 2e-3, 3e-3, 1e-2], 2e-3, 1, None),
        ([1e-3, 2e-3, 3e-3, 1e-2, 2e-2], 3e-3, 2, None),
        ([16, 32], 32, 0, 64),
        ([0.5], 0.5, None, None),
        (["a", "b"], "b", None, None),
        ([True, False], True, None, None),
    ],
)
def test_edges_and_one_step_beyond_them(values, winner, distance, beyond):
    trials = [{RATE: 1.0, SCALE: value} for value in values]
    won = {RATE: 1.0, SCALE: winner}
    assert edge_distances(trials, won) == ({} if distance is None else {SCALE: distance})
    moved = one_step_beyond(trials, won)
    assert moved == ([] if beyond is None else [{RATE: 1.0, SCALE: pytest.approx(beyond)}])


def test_each_edge_is_passed_alone():
    trials = grid({RATE: [1.0, 2.0], SCALE: [1.0, 3.0, 9.0]})
    assert one_step_beyond(trials, {RATE: 1.0, SCALE: 9.0}) == [{RATE: 0.5, SCALE: 9.0}, {RATE: 1.0, SCALE: 27.0}]


def test_members_have_equal_trials_of_their_own(write_study, tmp_path):
    sweep = {"trials": 8, "over": {RATE: {"log_uniform": [1e-4, 1e-2]}}}
    own = {
        "full_rank": {"recipe": "full_rank.yaml", "sweep": {"method.matrix_lr_scale": {"log_uniform": [0.1, 1]}}},
        "galore": {"recipe": "galore.yaml", "sweep": {SCALE: [0.1, 0.25, 1], RATE: {"log_uniform": [1e-3, 1]}}},
        "fixed": {"recipe": "galore.yaml", "learning_rate": 0.1},
    }
    few = planned_trials(load_study(write_study(members=own, sweep=sweep)), tmp_path)
    assert {name: sum(trial.member == name for trial in few) for name in own} == {
        "full_rank": 8,
        "galore": 8,
        "fixed": 0,
    }
    assert all(list(trial.values) == [RATE, SCALE] for trial in few if trial.member == "galore")
    assert all(1e-3 <= trial.values[RATE] <= 1 for trial in few if trial.member == "galore")
    assert all(1e-4 <= trial.values[RATE] <= 1e-2 for trial in few if trial.member == "full_rank")
    assert len({trial.folder for trial in few}) == 16
    # Another member changes no trial of the others.
    more = planned_trials(load_study(write_study(members={"new": "galore.yaml", **own}, sweep=sweep)), tmp_path)
    assert [trial for trial in more if trial.member != "new"] == few


# -- which one wins


@pytest.mark.parametrize(
    ("losses", "chosen", "edges"),
    [
        ({1.0: 3.0, 2.0: 2.0, 3.0: 4.0}, 2.0, {RATE: 1}),
        ({1.0: 3.0, 2.0: 2.0, 3.0: 1.0}, 3.0, {RATE: 0}),
        ({3.0: 1.0, 2.0: 2.0, 1.0: math.nan}, 3.0, {RATE: 0}),
        ({1.0: math.nan, 2.0: 2.0, 3.0: math.nan}, 2.0, {RATE: 1}),
        ({1.0: 2.0, 2.0: 2.0, 3.0: 2.0}, 1.0, {RATE: 0}),
        ({1.0: 2.0}, 1.0, {}),
        ({1.0: math.nan, 2.0: math.nan}, None, {}),
    ],
)
def test_ties_divergence_and_edges_of_a_sweep(losses, chosen, edges, tmp_path, monkeypatch, write_study):
    file = load_study(write_study(members={"full_rank": "full_rank.yaml"}, sweep={"learning_rate": list(losses)}))
    trials = planned_trials(file, tmp_path)
    by_rate = lambda folder: losses[float(folder.name.rpartition("lr")[2])]  # noqa: E731
    monkeypatch.setattr("hf_lowrank.study.stages.final_loss", by_rate)
    rows = choose(SimpleNamespace(directory=tmp_path, trials=trials, settings=file.settings))
    winners = [row for row in rows if row["chosen"]]
    assert [row["values"] for row in winners] == ([] if chosen is None else [{RATE: chosen}])
    assert [row["edges"] for row in winners] == ([] if chosen is None else [edges])
    assert [row["loss"] for row in rows] == [None if math.isnan(v) else v for _, v in sorted(losses.items())]
    assert [row["failure"] is None for row in rows] == [not math.isnan(v) for _, v in sorted(losses.items())]
    (tmp_path / "sweep.json").write_text(json.dumps(rows))
    assert read_winners(file, tmp_path) == ({} if chosen is None else {"full_rank": {RATE: chosen}})


def test_a_file_of_learning_rates_alone_still_counts(write_study, tmp_path):
    file = load_study(write_study(members={"full_rank": "full_rank.yaml"}, sweep={"learning_rate": [1e-3, 2e-3]}))
    rows = [
        {"member": "full_rank", "learning_rate": rate, "loss": rate, "chosen": rate == 1e-3, "at_edge": True}
        for rate in (1e-3, 2e-3)
    ]
    (tmp_path / "sweep.json").write_text(json.dumps(rows))
    assert read_winners(file, tmp_path) == {"full_rank": {RATE: 1e-3}}


def test_the_sweep_takes_the_rate_of_the_lowest_loss(write_study, tmp_path, run):
    rates = [1e-6, 3e-3, 1e9]
    study = write_study(
        members={"full_rank": "full_rank.yaml", "fixed": {"recipe": "galore.yaml", "learning_rate": 2e-3}},
        sweep={"learning_rate": rates, "seed": 5, "set": ["training.save_steps=12"]},
        seeds=[0],
    )
    out = tmp_path / "out"
    result, said = run(study, output=out, stages="sweep,train", jobs=2)
    assert result.failures == []
    rows = rows_of(out)
    assert [(row["member"], row["values"][RATE], row["run"]) for row in rows] == [
        ("full_rank", rate, f"sweep/full_rank-lr{rate:g}") for rate in rates
    ]
    for row in rows:
        if row["failure"] is None:
            assert row["loss"] == final_loss_in(out / row["run"], 12)
        else:
            assert row["values"] == {RATE: 1e9}  # it diverged and was stopped
            assert row["failure"] == read_facts(out / row["run"])["diverged"]
            assert row["loss"] is None
        assert recipe_of(out / row["run"])["seed"] == 5
        assert row["ranges"] == {RATE: rates}
    losses = [row["loss"] if row["loss"] is not None else math.inf for row in rows]
    assert [row["chosen"] for row in rows] == [loss == min(losses) for loss in losses]
    chosen = next(row for row in rows if row["chosen"])
    assert (chosen["values"], chosen["edges"]) == ({RATE: 3e-3}, {RATE: 1})
    assert recipe_of(out / "runs" / "full_rank-seed0")["training"]["learning_rate"] == 3e-3
    assert recipe_of(out / "runs" / "fixed-seed0")["training"]["learning_rate"] == 2e-3
    assert not any("edge" in line for line in said)
    # The same call finds all of it done; overrides in another order are the same recipe.
    data = yaml.safe_load(study.read_text())
    data["sweep"]["set"] = ["training.logging_steps=4", *data["sweep"]["set"]]
    study.write_text(yaml.safe_dump(data, sort_keys=False))
    result, _ = run(study, output=out, stages="sweep,train", dry_run=True)
    assert result.plan.left == 0


def test_an_edge_is_passed_once_for_every_member_and_then_said(write_study, tmp_path, run):
    """Rates that are all far too low: the highest wins, and so does the step beyond it."""
    members = {
        "full_rank": "full_rank.yaml",
        "galore": {"recipe": "galore.yaml", "sweep": {RATE: [2e-6, 4e-6], SCALE: [0.25]}},
    }
    study = write_study(members=members, sweep={"learning_rate": [1e-6, 3e-6], "steps": 8}, seeds=[0])
    out = tmp_path / "out"
    result, said = run(study, output=out, stages="sweep,train")
    assert result.failures == []
    rows = rows_of(out)
    found = {}
    for row in rows:
        found.setdefault(row["member"], []).append((row["values"][RATE], row["extension"], row["chosen"]))
        assert row["loss"] == final_loss_in(out / row["run"], 8)
        assert recipe_of(out / row["run"])["training"]["max_steps"] == 8
        assert {path.name for path in (out / row["run"]).glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-8"}
    assert found == {
        "full_rank": [(1e-6, False, False), (3e-6, False, False), (9e-6, True, True)],
        "galore": [(2e-6, False, False), (4e-6, False, False), (8e-6, True, True)],
    }
    assert [row["edges"] for row in rows if row["chosen"]] == [{RATE: 0}, {RATE: 0}]
    assert sum("at the edge" in line for line in said) == 2
    assert (
        recipe_of(out / "runs" / "galore-seed0")["training"] | {"learning_rate": 8e-6, "max_steps": 12}
        == recipe_of(out / "runs" / "galore-seed0")["training"]
    )
    plan = run(study, output=out, stages="sweep,train", dry_run=True)[0].plan
    assert (plan.left, plan.stages[0].total) == (0, 6)
    assert [member.what for member in plan.members] == [
        "full_rank, learning rate 9e-06, at the edge of learning rate",
        "galore, learning rate 8e-06, scale 0.25, at the edge of learning rate",
    ]


def test_a_step_that_the_recipe_refuses_is_left_out(write_study, tmp_path, run):
    members = {
        "full_rank": "full_rank.yaml",
        # Rank 16 is the width of the matrices.
        "galore": {"recipe": "galore.yaml", "sweep": {RATE: None, "method.rank": [4, 16]}},
    }
    study = write_study(members=members, sweep={"learning_rate": [1e-3, 3e-3], "steps": 4}, seeds=[0])
    run(study, output=tmp_path / "out", stages="sweep")
    rows = [row for row in rows_of(tmp_path / "out") if row["member"] == "galore"]
    assert [row["values"]["method.rank"] for row in rows if not row["extension"]] == [4, 16]
    assert {row["values"]["method.rank"] for row in rows if row["extension"]} <= {1, 2, 4}


def test_a_killed_sweep_over_two_keys_ends_with_the_same_trials_and_winner(tmp_path, corpus):
    """Eight trials per member, by SIGKILL of the process group at random times; results compared bit by bit."""
    expected = drill(
        tmp_path,
        corpus,
        kills=4,
        seed=2,
        stages="sweep,train",
        members={
            "full_rank": {
                "recipe": "full_rank.yaml",
                "sweep": {"method.matrix_lr_scale": {"log_uniform": [0.1, 1]}},
            },
            "galore": {"recipe": "galore.yaml", "sweep": {SCALE: [0.1, 0.25, 1]}},
        },
        sweep={"trials": 8, "steps": 8, "seed": 3, "over": {RATE: {"log_uniform": [1e-4, 3e-2]}}},
        seeds=[0],
    )
    rows = expected["sweep.json"]
    for member in ("full_rank", "galore"):
        own = [row for row in rows if row["member"] == member]
        assert sum(not row["extension"] for row in own) == 8
        assert len({tuple(row["values"].values()) for row in own}) == len(own)
        assert all(len(row["values"]) == 2 for row in own)
        assert [row["loss"] for row in own if row["chosen"]] == [min(row["loss"] for row in own)]
    assert sum(name.startswith("runs/") and name.endswith("model.safetensors") for name in expected) == 2 * 3


def test_two_full_rank_members_are_told_apart(write_study, tmp_path, run, capsys):
    """One rate, and two rates as the baseline: measured, claimed, shown and compared under names of their own."""
    members = {
        "full_rank": "full_rank.yaml",
        "two_rates": {
            "recipe": "full_rank.yaml",
            "title": "Full-rank, two rates",
            "sweep": {"method.matrix_lr_scale": [0.25, 0.5]},
        },
        "galore": {"recipe": "galore.yaml", "sweep": {SCALE: [0.25, 0.5]}},
    }
    sweep = {"over": {RATE: [1e-3, 3e-3]}, "steps": 6}
    members["full_rank"] = {"recipe": "full_rank.yaml", "sweep": {DECAY: [0.0, 0.1]}}
    study = write_study(members=members, baseline="two_rates", sweep=sweep, seeds=[0, 1], evaluate=None)
    out = tmp_path / "out"
    stages = "sweep,train,measure,claims,report"
    result, _ = run(study, output=out, stages=stages)
    assert result.failures == []
    for name, method in (("full_rank", "full_rank"), ("two_rates", "full_rank"), ("galore", "galore")):
        rows = [row for row in read_measurements(out / "runs" / f"{name}-seed1") if row.metric == "method_barrier"]
        assert {row.method for row in rows} == {method}
        assert {row.baseline for row in rows} == ({None} if name == "two_rates" else {"two_rates-seed1"})
        assert all(row.has_value for row in rows if row.step > 0) is (name != "two_rates")
    records = with_distinct_methods(load_runs(sorted((out / "runs").iterdir())), out)
    assert baseline_of(records, out) == "Full-rank, two rates"
    assert {record.method for record in records} == {"full_rank", "Full-rank, two rates", "galore"}
    for given in (records, [record.path for record in records]):
        (axes,) = loss_curves(given).axes
        assert sorted(name[:9] for name in axes.get_legend_handles_labels()[1]) == ["Full-rank", "Full-rank", "GaLore"]
    assert {trial.member for trial in sweep_of(records, out)} == {"full_rank", "Full-rank, two rates", "galore"}
    (group,) = groups(records, baseline_of(records, out), sweep_of(records, out))
    assert group.standings.baseline_title == "Full-rank, two rates"
    beside = {row.title: row.standings[0].beside for row in group.standings.rows}
    assert beside["Full-rank, two rates"] == "baseline"
    assert beside["Full-rank"].endswith("%")
    claims = {claim["id"]: claim for claim in json.loads((out / "claims.json").read_text())["claims"]}
    labels = [part["label"] for part in claims["rank_structure"]["details"] if part["n"]]
    assert labels == ["weights", "Full-rank, weight stable rank", "GaLore, weight stable rank"]
    print_result(result, Console(width=160))
    shown = capsys.readouterr().out
    assert "Tuning" in shown
    assert "matrix lr scale 0.25, 0.5" in shown
    # Measured by hand, the command asks which of the two is meant.
    trajectories = [Trajectory(out / "runs" / f"{name}-seed0") for name in members]
    other, why = find_baseline(trajectories[2], trajectories)
    assert other is None
    assert "several full-rank runs have seed 0 (full_rank-seed0, two_rates-seed0); name one with --baseline" in why
    assert run(study, output=out, stages=stages, dry_run=True)[0].plan.left == 1  # the report, which is always written


def test_titles_must_differ(write_study):
    members = {"full_rank": "full_rank.yaml", "galore": {"recipe": "galore.yaml", "title": "full_rank"}}
    with pytest.raises(UserError, match=r"members\.galore\.title must differ from that of full_rank"):
        load_study(write_study(members=members))
