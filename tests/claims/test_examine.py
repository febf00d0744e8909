"""From run folders to verdicts: planted effects, planted reverses, and what is missing."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import yaml
from rich.console import Console

from hf_lowrank.claims import Claim, Detail, claims_table, examine, read_claims, write_claims
from hf_lowrank.errors import UserError
from hf_lowrank.runs.measurements import NO_EQUIVALENT

IDS = ["random_sharpness", "pca1_sharpness", "barriers", "activations", "downstream_order", "prediction",
       "rank_structure"]  # fmt: skip


def verdicts(runs, **how):
    return {claim.id: claim.verdict for claim in examine(runs, **how)}


def claim_of(runs, name, **how):
    return next(claim for claim in examine(runs, **how) if claim.id == name)


def test_planted_effects_are_reproduced(simulation, prediction, tmp_path):
    claims = examine(simulation.write(tmp_path), prediction=prediction())
    assert [claim.id for claim in claims] == IDS
    assert {claim.verdict for claim in claims} == {"reproduced"}
    assert all(claim.sentence and claim.test and claim.reason for claim in claims)


def test_planted_reverses_are_contradicted(simulation, prediction, tmp_path):
    simulation.random, simulation.pca = simulation.pca, simulation.random
    simulation.barrier = 0.0
    simulation.depth = simulation.course = -0.3
    simulation.far = {"galore": 1.2, "fira": 0.8, "cola": 1.0}
    simulation.loss = {"full_rank": 3.0, "galore": 3.2, "fira": 3.4, "cola": 3.6}
    simulation.score = {"full_rank": 0.6, "galore": 0.5, "fira": 0.4, "cola": 0.3}
    simulation.weights = simulation.updates = dict.fromkeys(simulation.methods, 1.0)
    simulation.noise = 0.01
    runs = simulation.write(tmp_path)
    found = verdicts(runs, prediction=prediction(gain=-0.2, gain_low=-0.3, gain_high=-0.1, p_value=0.9))
    assert found == dict.fromkeys(IDS, "contradicted")
    parts = {d.label: d.verdict for d in claim_of(runs, "activations").details if d.verdict}
    assert parts == {"over layers": "contradicted", "over training": "contradicted", "GaLore closest": "contradicted"}


def test_nothing_planted_is_left_open(simulation, tmp_path):
    level = dict.fromkeys(simulation.methods, 1.0)
    simulation.random = simulation.pca = simulation.loss = simulation.score = simulation.far = level
    simulation.weights = simulation.updates = level
    simulation.depth = simulation.course = 0.0
    simulation.barrier, simulation.noise = 0.05, 0.1
    assert verdicts(simulation.write(tmp_path)) == dict.fromkeys(IDS, "undecided")


def test_a_reverse_that_correction_takes_away_is_not_said_to_include_zero(simulation, tmp_path):
    """0.02 < p < 0.05 on the wrong side: no verdict after correction, and no interval that includes zero."""
    simulation.random["cola"] = 0.316
    simulation.noise = 0.03
    claim = claim_of(simulation.write(tmp_path), "random_sharpness")
    cola = claim.details[-1]
    assert cola.ci_high < 0
    assert 0.05 / 3 < cola.p_value < 0.05
    assert claim.verdict == "undecided"
    assert claim.reason == "CoLA goes the other way, but not significantly so among 3 comparisons"


@pytest.mark.parametrize("metric", ["random_sharpness", "pca1_sharpness"])
def test_sharpness_of_own_parameters_is_not_compared_with_that_of_dense_weights(simulation, tmp_path, metric):
    """What has no dense equivalent is left out by name; what was only measured otherwise leaves the claim open."""
    simulation.random["cola"] = simulation.pca["cola"] = 40.0
    simulation.not_dense["cola"] = f"not dense: moves the model's own parameters, as {NO_EQUIVALENT}"
    claim = claim_of(simulation.write(tmp_path / "none"), metric)
    assert claim.verdict == "reproduced"
    assert "CoLA is left out: no dense equivalent." in claim.finding
    assert [(detail.label, detail.n) for detail in claim.details] == [("GaLore", 5), ("Fira", 5), ("CoLA", 0)]
    assert claim.details[-1].reason == simulation.not_dense["cola"]
    simulation.not_dense["fira"] = "not dense: moves the model's own parameters, as the settings ask"
    claim = claim_of(simulation.write(tmp_path / "asked"), metric)
    assert claim.verdict == "undecided"
    assert claim.reason == f"Fira: {simulation.not_dense['fira']}"
    assert {detail.label: detail.n for detail in claim.details} == {"GaLore": 5, "Fira": 0, "CoLA": 0}
    del simulation.not_dense["fira"]
    simulation.not_dense["full_rank"] = "not dense: moves the model's own parameters, as the settings ask"
    claim = claim_of(simulation.write(tmp_path / "baseline"), metric)
    assert claim.reason == f"Full-rank: {simulation.not_dense['full_rank']}"
    simulation.methods = ("full_rank", "cola")
    del simulation.not_dense["full_rank"]
    claim = claim_of(simulation.write(tmp_path / "alone"), metric)
    assert claim.reason == "no other method has dense weights"
    assert claim.verdict == "undecided"


def test_rows_of_before_the_spaces_are_not_taken_for_dense(simulation, tmp_path):
    """Those of an adapted model moved its factors."""
    runs = simulation.write(tmp_path)
    for run in runs:
        table = run / "measurements.jsonl"
        table.write_text(table.read_text().replace(', "space": "dense"', ""))
        checkpoint = run / "checkpoint-300"
        checkpoint.mkdir()
        kind = "lowrank" if run.name.startswith("cola") else "llama"
        (checkpoint / "config.json").write_text(json.dumps({"model_type": kind}))
    claim = claim_of(runs, "random_sharpness")
    assert claim.verdict == "undecided"
    assert claim.reason == "CoLA: not dense: measured before dense weights were moved; measure again"


def test_numbers_are_those_of_the_rows(simulation, tmp_path):
    claim = claim_of(simulation.write(tmp_path), "random_sharpness", alpha=0.1)
    sharp = {
        (method, seed): next(
            row["value"]
            for row in simulation.rows(method, seed)
            if row["metric"] == "random_sharpness" and row["step"] == 300
        )
        for method in simulation.methods
        for seed in simulation.seeds
    }
    for detail, method in zip(claim.details, ("galore", "fira", "cola"), strict=True):
        logs = [math.log(sharp["full_rank", s] / sharp[method, s]) for s in simulation.seeds]
        reference = scipy.stats.ttest_1samp(logs, 0)
        assert detail.effect == pytest.approx(np.mean(logs))
        assert (detail.ci_low, detail.ci_high) == pytest.approx(tuple(reference.confidence_interval(0.9)))
        assert (detail.p_value, detail.n) == (pytest.approx(reference.pvalue), 5)
        assert detail.p_sign_flip == pytest.approx(2 / 2**5)
    weakest = max(claim.details, key=lambda detail: detail.p_value)
    assert (claim.effect, claim.p_value) == (weakest.effect, weakest.p_value)
    assert f"{math.exp(weakest.effect):.2f} times (90 % interval" in claim.sentence


def test_barriers_are_those_of_the_rows(simulation, tmp_path):
    claim = claim_of(simulation.write(tmp_path), "barriers")
    rows = {(m, s): list(simulation.rows(m, s)) for m in simulation.methods for s in simulation.seeds}

    def value(method, seed, metric, baseline=None):
        return next(
            row["value"]
            for row in rows[method, seed]
            if (row["metric"], row["step"], row["baseline"]) == (metric, 300, baseline)
        )

    rises = [value("fira", s, "method_barrier", f"galore-seed{s}") for s in simulation.seeds]
    pair = next(detail for detail in claim.details if detail.label == "GaLore – Fira")
    assert pair.effect == pytest.approx(np.mean(rises))
    assert pair.p_value == pytest.approx(scipy.stats.ttest_1samp(rises, 0.05).pvalue)
    null = [detail for detail in claim.details if "CoLA" in detail.label]
    assert {detail.reason for detail in null} == {
        "the layers are not linear and have no dense weights to interpolate"
    }  # fmt: skip
    assert all(detail.effect is None for detail in null)


def test_barriers_with_the_baseline_alone_are_not_any_two(simulation, tmp_path):
    simulation.keep = lambda row: row.get("metric") != "method_barrier" or "galore" not in (row["baseline"] or "")
    claim = claim_of(simulation.write(tmp_path), "barriers")
    assert claim.verdict == "undecided"
    assert "2 of 3 pairs were measured; GaLore – Fira: not measured" in claim.reason


def test_a_pair_measured_from_both_ends_counts_once(simulation, tmp_path):
    runs = simulation.write(tmp_path)
    before = next(d for d in claim_of(runs, "barriers").details if d.label == "Full-rank – Fira")
    for seed in simulation.seeds:
        there = [row for row in simulation.rows("fira", seed) if row["metric"] == "method_barrier"]
        row = next(r for r in there if r["step"] == 300 and r["baseline"].startswith("full"))
        back = {**row, "baseline": f"fira-seed{seed}", "value": row["value"] + 0.2}
        with (tmp_path / f"full_rank-seed{seed}" / "measurements.jsonl").open("a") as file:
            file.write(json.dumps(back) + "\n")
    after = next(d for d in claim_of(runs, "barriers").details if d.label == "Full-rank – Fira")
    assert (after.effect, after.n) == (pytest.approx(before.effect + 0.1), 5)


def test_slopes_are_over_depth_and_over_training_without_step_0(simulation, tmp_path):
    simulation.noise = 1e-3
    details = {d.label: d for d in claim_of(simulation.write(tmp_path), "activations").details}
    assert details["over layers"].effect == pytest.approx(simulation.depth, abs=3e-3)
    assert details["over training"].effect == pytest.approx(simulation.course, abs=3e-3)
    assert "mean distance at step 0" not in details
    assert "mean distance at hidden_states.4" in details
    assert details["Fira minus GaLore"].effect == pytest.approx(0.2, abs=0.05)


def test_activations_against_other_runs_are_not_distances_from_the_baseline(simulation, tmp_path):
    runs = simulation.write(tmp_path)
    for run in runs:
        file = run / "measurements.jsonl"
        file.write_text(file.read_text().replace('"baseline": "full_rank', '"baseline": "elsewhere/full_rank'))
    claim = claim_of(runs, "activations")
    assert claim.verdict == "undecided"
    assert "GaLore: measured against elsewhere/full_rank-seed4, which is not a run of the baseline" in claim.reason


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_decide_nothing(simulation, tmp_path, seeds):
    simulation.seeds = range(seeds)
    claims = examine(simulation.write(tmp_path))
    assert {claim.verdict for claim in claims} == {"undecided"}
    for claim in claims:
        if claim.id != "prediction":
            assert "too few seeds" in claim.reason, claim
            assert claim.n == seeds


def test_nothing_measured_is_said(simulation, tmp_path):
    simulation.keep = lambda row: row.get("metric") == "loss"
    claims = {claim.id: claim for claim in examine(simulation.write(tmp_path))}
    assert {claim.verdict for claim in claims.values()} == {"undecided"}
    assert "not measured" in claims["random_sharpness"].reason
    assert "no downstream scores" in claims["downstream_order"].reason
    assert all(claim.sentence.strip() for claim in claims.values())
    claims_table(list(claims.values()), 80)


@pytest.mark.parametrize("gone", ["random_sharpness", "activation_l2", "weight_stable_rank", "update_effective_rank"])
def test_a_method_without_a_metric_keeps_every_from_being_said(simulation, tmp_path, gone):
    simulation.keep = lambda row: not (row["method"] == "fira" and row["metric"] == gone)
    found = {claim.id: claim for claim in examine(simulation.write(tmp_path))}
    open_ = {"random_sharpness": "random_sharpness", "activation_l2": "activations"}.get(gone)
    if open_ is None:  # the other of the two measures still tells them apart
        assert found["rank_structure"].verdict == "reproduced"
        gaps = [d for d in found["rank_structure"].details if d.reason == "not measured"]
        assert [d.label for d in gaps] == [f"Fira, {gone.replace('_', ' ')}"]
    else:
        assert (found[open_].verdict, "Fira: not measured" in found[open_].reason) == ("undecided", True)


def test_without_the_baseline_what_needs_none_is_still_tested(simulation, tmp_path):
    simulation.methods = ("galore", "fira", "cola")
    found = {claim.id: claim for claim in examine(simulation.write(tmp_path))}
    assert found["downstream_order"].verdict == "reproduced"
    assert "no run of the baseline full_rank" in found["random_sharpness"].reason
    alone = examine([tmp_path / "galore-seed0"], baseline="galore")
    assert {claim.verdict for claim in alone} == {"undecided"}


def test_a_run_that_ended_early_does_not_take_the_others_back(simulation, tmp_path):
    simulation.keep = lambda row: not (row["run"] == "fira-seed3" and row["step"] > 100)
    claim = claim_of(simulation.write(tmp_path), "random_sharpness")
    assert "step 300" in claim.sentence
    assert {d.label: d.n for d in claim.details} == {"GaLore": 5, "Fira": 4, "CoLA": 5}


def test_a_method_that_ended_early_is_compared_where_all_are(simulation, tmp_path):
    simulation.keep = lambda row: not (row["method"] == "cola" and row["step"] > 200)
    claim = claim_of(simulation.write(tmp_path), "random_sharpness")
    assert (claim.verdict, "step 200" in claim.sentence) == ("reproduced", True)


def test_only_equal_settings_are_compared(simulation, tmp_path):
    runs = simulation.write(tmp_path)
    file = tmp_path / "fira-seed0" / "measurements.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    changed = [
        {**r, "value": 99.0, "settings": {**r["settings"], "draws": 3}}
        for r in lines
        if r["metric"] == "random_sharpness"
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in [*lines, *changed]))
    both = claim_of(runs, "random_sharpness")
    assert (both.verdict, both.n) == ("reproduced", 5)
    file.write_text("".join(json.dumps(r) + "\n" for r in changed))
    assert {d.label: d.n for d in claim_of(runs, "random_sharpness").details}["Fira"] == 4


def test_sharpness_that_is_not_positive_is_compared_in_nats(simulation, tmp_path):
    simulation.random["cola"] = -0.05
    claim = claim_of(simulation.write(tmp_path), "random_sharpness")
    assert (claim.verdict, claim.unit) == ("reproduced", "nats")
    assert {d.label: d.effect for d in claim.details}["CoLA"] == pytest.approx(0.35, abs=0.05)


def test_different_evaluation_sets_are_refused_by_name(simulation, tmp_path):
    runs = simulation.write(tmp_path)
    file = tmp_path / "fira-seed2" / "measurements.jsonl"
    file.write_text(file.read_text().replace("ab" * 8, "cd" * 8))
    with pytest.raises(UserError, match=r"full_rank-seed0 with fingerprint abab\w+ and fira-seed2 with cdcd\w+;"):
        examine(runs)
    file.write_text("")
    (tmp_path / "fira-seed2" / "facts.json").write_text(json.dumps({"evaluation_fingerprint": "ef" * 32}))
    with pytest.raises(UserError, match=r"full_rank-seed0 with fingerprint abab\w+ and fira-seed2 with efef\w+;"):
        examine(runs)


def test_runs_of_one_method_and_seed_need_names(simulation, tmp_path):
    simulation.methods = ("full_rank", "galore")
    runs = simulation.write(tmp_path / "a")
    simulation.methods = ("galore",)
    more = simulation.write(tmp_path / "b")
    with pytest.raises(UserError, match=r"both galore with seed 0; give the methods names of their own"):
        examine([*runs, *more])
    names = ["full_rank"] * 5 + ["galore"] * 5 + ["galore_r8"] * 5
    claim = claim_of([*runs, *more], "random_sharpness", methods=names)
    assert {d.label for d in claim.details} == {"GaLore", "galore_r8"}
    with pytest.raises(UserError, match="methods must be one for each run, got 1 for 15 runs"):
        examine([*runs, *more], methods=["x"])


def test_runs_without_a_seed_are_named_or_given_one(simulation, tmp_path):
    runs = simulation.write(tmp_path)
    for seed in simulation.seeds:
        (tmp_path / f"cola-seed{seed}" / "recipe.yaml").write_text(yaml.safe_dump({"method": {"name": "cola"}}))
    claim = claim_of(runs, "random_sharpness")
    assert (claim.verdict, "CoLA: cola-seed" in claim.reason) == ("undecided", True)
    seeds = [int(run.name[-1]) for run in runs]
    assert claim_of(runs, "random_sharpness", seeds=seeds).verdict == "reproduced"


def test_losses_that_training_logged_count_before_measured_ones(simulation, tmp_path):
    runs = simulation.write(tmp_path)
    for run in runs:
        checkpoint = run / "checkpoint-300"
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text("{}")
        better = {"full_rank": 4.0, "galore": 1.0, "fira": 2.0, "cola": 3.0}[run.name.partition("-")[0]]
        history = [{"step": 300, "eval_loss": better + 0.01 * np.random.default_rng(len(run.name)).normal()}]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    claim = claim_of(runs, "downstream_order")
    assert "Lowest loss: GaLore" in claim.sentence


def test_tasks_on_other_items_are_not_compared(simulation, tmp_path):
    runs = simulation.write(tmp_path)
    file = tmp_path / "fira-seed0" / "downstream.jsonl"
    file.write_text(file.read_text().replace("pylib_cloze-items", "others"))
    assert "mean of 1 task," in claim_of(runs, "downstream_order").sentence
    file.write_text(file.read_text().replace("pylib_syntax-items", "others"))
    claim = claim_of(runs, "downstream_order")
    assert (claim.verdict, claim.reason) == ("undecided", "the runs have no task of equal items in common")


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({}, "reproduced", "permuted geometry does not reach it"),
        ({"p_value": 0.3}, "undecided", "permuted geometry gains as much"),
        ({"gain_low": -0.1}, "undecided", "includes zero, though p = 0.005"),
        ({"gain_low": None}, "undecided", "lacks a gain with interval"),
        ({"gain": -0.2, "gain_low": -0.3, "gain_high": -0.1, "p_value": 0.8}, "contradicted", "below zero"),
        (
            {"gain": None, "gain_low": None, "gain_high": None, "p_value": None, "reason": "5 methods are too few"},
            "undecided",
            "5 methods are too few",
        ),
        ({"unseen_run": {"gain": -9, "gain_low": -9.5, "gain_high": -8.5}}, "reproduced", "does not reach it"),
    ],
)
def test_the_prediction_is_judged_by_interval_and_permutation(
    simulation, prediction, tmp_path, changes, verdict, reason
):
    runs = simulation.write(tmp_path / "runs")
    claim = claim_of(runs[:2], "prediction", prediction=prediction(**changes))
    assert (claim.verdict, reason in claim.reason) == (verdict, True)


def test_the_prediction_counts_methods_and_states_both_questions(simulation, prediction, tmp_path):
    runs = simulation.write(tmp_path / "runs")
    refused = {"gain": None, "reason": "it has one run per method"}
    claim = claim_of(runs[:2], "prediction", prediction=prediction(unseen_run=refused))
    assert claim.n == 8
    assert "Methods left out (8 methods): geometry changes R² from 0.4" in claim.sentence
    assert "not tested, it has one run per method" in claim.sentence
    assert {detail.label for detail in claim.details} == {"update_norm (unseen methods)", "update_norm (unseen runs)"}


def test_a_prediction_that_takes_seeds_for_witnesses_decides_nothing(simulation, tmp_path):
    """As versions before 0.2 wrote it."""
    runs = simulation.write(tmp_path / "runs")[:2]
    old = {"runs": 40, "gain": 0.05, "gain_low": 0.01, "gain_high": 0.1, "p_value": 0.005, "seen": [0.1]}
    (tmp_path / "prediction.json").write_text(json.dumps(old))
    claim = claim_of(runs, "prediction", prediction=tmp_path)
    assert claim.verdict == "undecided"
    assert "earlier version" in claim.reason


def test_a_missing_prediction_is_no_error_and_a_damaged_one_is(simulation, tmp_path):
    runs = simulation.write(tmp_path / "runs")[:2]
    assert "no prediction.json" in claim_of(runs, "prediction", prediction=tmp_path / "prediction.json").reason
    assert claim_of(runs, "prediction", prediction=tmp_path).verdict == "undecided"
    (tmp_path / "prediction.json").write_text("[1")
    with pytest.raises(UserError, match="not readable as JSON"):
        examine(runs, prediction=tmp_path)


def test_bad_levels_and_runs_are_refused(simulation, tmp_path):
    runs = simulation.write(tmp_path)
    with pytest.raises(UserError, match="alpha must be between 0 and 1, got 5"):
        examine(runs, alpha=5)
    with pytest.raises(UserError, match="at least one run"):
        examine([])


def test_claims_come_back_as_they_were_written(simulation, prediction, tmp_path):
    claims = examine(simulation.write(tmp_path / "runs"), prediction=prediction())
    file = write_claims(claims, tmp_path, alpha=0.05)
    assert (file.name, read_claims(file)) == ("claims.json", claims)
    content = json.loads(file.read_text())
    assert content["alpha"] == 0.05
    needed = {"id", "statement", "verdict", "effect", "ci_low", "ci_high", "unit", "p_value", "n", "test", "reason"}
    assert needed < set(content["claims"][0])
    assert {"label", "effect", "ci_low", "ci_high", "p_value", "n"} < set(content["claims"][0]["details"][0])
    odd = Claim(id="x", statement="s", verdict="undecided", effect=math.nan, details=(Detail(label="l"),))
    assert read_claims(write_claims([odd], tmp_path / "odd.json"))[0].effect is None
    for damaged in ("{", '{"claims": 3}', '{"claims": [{"id": "x"}]}', "[]"):
        file.write_text(damaged)
        with pytest.raises(UserError, match="not a valid claims file"):
            read_claims(file)


@pytest.mark.parametrize("seeds", [1, 5])
def test_a_finding_gives_the_reason_once_and_ends_with_a_full_stop(simulation, tmp_path, seeds):
    simulation.seeds = range(seeds)
    simulation.noise = 0.5
    claims = examine(simulation.write(tmp_path))
    assert "undecided" in {claim.verdict for claim in claims}
    for claim in claims:
        assert claim.finding.count(claim.reason[1:]) == 1
        assert claim.finding.endswith(".")
        assert not claim.finding.endswith("..")


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_is_readable(simulation, tmp_path, width):
    claims = examine(simulation.write(tmp_path))
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(claims_table(claims, width))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    assert "7 claims: 6 reproduced, 0 contradicted, 1 undecided" in text
    for word in ("GaLore closest", "Kendall's τ", "nothing was", "at this scale"):
        assert word in text, word
    assert ("ln ratio" in text) == (width >= 120)
