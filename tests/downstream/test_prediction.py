"""The statistics against scikit-learn, against planted effects, and against planted leaks."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from simulated_studies import simulated_table
from sklearn.linear_model import Ridge

from hf_lowrank.claims.predicted import prediction_claim
from hf_lowrank.cli import main
from hf_lowrank.downstream.gathering import gather, predict
from hf_lowrank.downstream.prediction import analyse, answer, gain_interval, question, without_useless
from hf_lowrank.downstream.ridge import PENALTIES, leave_one_group_out
from hf_lowrank.errors import UserError
from hf_lowrank.metrics import reference_of
from hf_lowrank.runs.measurements import OWN_BASELINE, UNDEFINED, Measurement, append_measurements, read_measurements
from hf_lowrank.runs.scores import Score, append_scores, read_scores


def reference(x, y, groups, weights):
    """The nested procedure, written out with scikit-learn and loops; every group has the same total weight."""
    predicted = np.empty_like(y)
    penalties = []
    share = weights / np.array([weights[groups == g].sum() for g in groups])

    def fitted(rows, penalty):
        w = share[rows]
        mean = np.average(x[rows], axis=0, weights=w)
        scale = np.sqrt(np.average((x[rows] - mean) ** 2, axis=0, weights=w))
        model = Ridge(alpha=penalty * w.sum()).fit((x[rows] - mean) / scale, y[rows], sample_weight=w)
        return lambda at: model.predict((x[at] - mean) / scale)

    for g in np.unique(groups):
        errors = []
        for penalty in PENALTIES:
            error = 0.0
            for h in np.unique(groups[groups != g]):
                inside = (groups != g) & (groups != h)
                error += (share[groups == h] * (fitted(inside, penalty)(groups == h) - y[groups == h]) ** 2).sum()
            errors.append(error)
        penalties.append(PENALTIES[int(np.argmin(errors))])
        predicted[groups == g] = fitted(groups != g, penalties[-1])(groups == g)
    return predicted, penalties


def columns_of(asked):
    return np.concatenate([asked.base_nB, asked.geometry_nP], axis=1)


@pytest.mark.parametrize("name", ["unseen_method", "unseen_run"])
def test_leave_one_group_out_is_the_nested_procedure(name):
    table = ragged(simulated_table(3, methods=6, runs=2, steps=3, metrics=4, between=0.5, within=0.5))
    asked = question(table, name)
    predicted, folds = asked.both
    expected, penalties = reference(columns_of(asked), asked.target_n, asked.groups_n, asked.weights_n)
    np.testing.assert_allclose(predicted, expected, rtol=1e-8, atol=1e-9)
    assert [fold.penalty for fold in folds] == pytest.approx(penalties)


def ragged(table):
    """The table without some checkpoints, and with one run fewer."""
    keep = np.ones(len(table.target_N), dtype=bool)
    keep[[1, 8, 9]] = False
    keep[table.run_N == len(table.runs) - 1] = False
    used, run_N = np.unique(table.run_N[keep], return_inverse=True)
    return replace(
        table, runs=[table.runs[r] for r in used], method_R=table.method_R[used], run_N=run_N,
        step_N=table.step_N[keep], log_perplexity_N=table.log_perplexity_N[keep],
        geometry_NP=table.geometry_NP[keep], target_N=table.target_N[keep],
    )  # fmt: skip


def test_every_method_weighs_the_same_however_many_runs_it_has():
    asked = question(ragged(simulated_table(3, methods=6, runs=2)), "unseen_method")
    np.testing.assert_allclose(np.bincount(asked.groups_n, asked.share_n), 1.0)
    lone = asked.share_n[asked.groups_n == 5]
    np.testing.assert_allclose(lone, 1 / len(lone))  # its other run is gone


def test_within_methods_nothing_of_a_method_is_left():
    table = simulated_table(2, methods=6, runs=3)
    shifted = replace(
        table, target_N=table.target_N + 5.0 * table.method_N, geometry_NP=table.geometry_NP + table.method_N[:, None]
    )
    before, after = (question(t, "unseen_run").both[0] for t in (table, shifted))
    np.testing.assert_allclose(before, after, atol=1e-9)


def test_nothing_of_the_left_out_group_reaches_its_fit():
    asked = question(simulated_table(1, methods=9, between=0.5), "unseen_method")
    x, y, groups = columns_of(asked), asked.target_n, asked.groups_n
    _, before = leave_one_group_out(x, y, groups)
    x2, y2 = x.copy(), y.copy()
    x2[groups == 4] = 1e6 * x2[groups == 4] + 1e5
    y2[groups == 4] = -1e6
    _, after = leave_one_group_out(x2, y2, groups)
    for name in ("mean_P", "scale_P", "mean_y", "coef_P", "penalty"):
        np.testing.assert_array_equal(getattr(before[4], name), getattr(after[4], name))
        assert not np.array_equal(getattr(before[3], name), getattr(after[3], name)) or name == "penalty"


def test_five_seeds_of_a_method_are_one_observation():
    """Geometry that is a random fingerprint of the method predicts runs of known methods, and no unknown method."""
    rng = np.random.default_rng(0)
    table = simulated_table(0, methods=8, runs=5, steps=1)
    fingerprints, offsets = rng.normal(size=(8, 16))[table.method_N], 0.5 * rng.normal(size=8)[table.method_N]
    table = replace(
        table,
        geometry_NP=fingerprints + 0.05 * rng.normal(size=fingerprints.shape),
        target_N=offsets - table.log_perplexity_N + 0.05 * rng.normal(size=len(offsets)),
    )
    perplexity = table.log_perplexity_N[:, None]
    both = np.concatenate([perplexity, table.geometry_NP], axis=1)
    errors = [
        ((leave_one_group_out(x, table.target_N, table.run_N)[0] - table.target_N) ** 2).sum()
        for x in (perplexity, both)
    ]
    assert errors[1] < 0.1 * errors[0]  # leaving one run out, geometry seems to explain nearly all
    found = answer(table, question(table, "unseen_method"), permutations=39)
    assert found.gain < 0.0
    assert found.p_value > 0.05


@pytest.mark.parametrize("name", ["unseen_method", "unseen_run"])
def test_the_interval_covers_the_expected_gain(name):
    """A small share of benchmarks/prediction_calibration.py."""
    shape = {"methods": 7, "runs": 2, "steps": 2, "metrics": 4, "between": 0.8, "within": 0.8}
    gains, intervals = [], []
    for seed in range(40):
        table = simulated_table(seed, **shape)
        asked = question(table, name)
        gains.append(asked.gain)
        intervals.append(gain_interval(table, asked))
    truth = float(np.mean(gains))
    assert sum(low <= truth <= high for low, high in intervals) >= 35


@pytest.mark.parametrize(
    ("name", "effect", "other"),
    [("unseen_method", {"between": 1.5}, {"within": 1.5}), ("unseen_run", {"within": 1.5}, {"between": 1.5})],
)
def test_each_question_finds_its_own_effect_and_not_the_other(name, effect, other):
    shape = {"methods": 12, "runs": 3, "steps": 2, "metrics": 4}
    found = answer_of(simulated_table(1, **shape, **effect), name)
    assert found.p_value == pytest.approx(1 / 40)
    assert found.gain > 0.1
    assert {c.name for c in found.coefficients[:4]} >= {"metric_0", "metric_1"}
    p_values = [answer_of(simulated_table(100 + seed, **shape, **other), name).p_value for seed in range(12)]
    assert sum(p <= 0.05 for p in p_values) <= 3
    assert 0.25 < float(np.mean(p_values)) < 0.85


def answer_of(table, name):
    return answer(table, question(table, name), permutations=39)


def test_too_few_methods_or_runs_leave_one_question_open():
    few = analyse(simulated_table(0, methods=4, runs=3, within=1.0), permutations=19)
    assert few.unseen_method.reason == "leaving a method out needs at least 6 methods, got 4"
    assert math.isnan(few.unseen_method.gain)
    assert few.unseen_run.reason is None
    assert (few.unseen_run.methods, few.unseen_run.runs, few.unseen_run.checkpoints) == (4, 12, 36)
    lone = analyse(simulated_table(0, methods=8, runs=1), permutations=19)
    assert lone.unseen_method.reason is None
    assert "at least 8 runs of methods with several runs, got 0" in lone.unseen_run.reason


def test_nothing_to_predict_is_refused():
    with pytest.raises(UserError, match=r"at least 6 methods, got 3; .* at least 8 runs .*, got 6"):
        analyse(simulated_table(0, methods=3, runs=2))
    table = simulated_table(0)
    with pytest.raises(UserError, match="do not vary"):
        analyse(replace(table, target_N=0 * table.target_N))


def test_constant_and_null_metrics_are_left_out_with_a_note():
    table = simulated_table(0, metrics=3)
    table.geometry_NP[:, 1] = 0.7
    table.geometry_NP[7, 2] = np.nan
    left = without_useless(table)
    assert left.metrics == ["metric_0"]
    assert left.notes == ["metric_1 is constant: left out", "metric_2 is null in method0-seed2: left out"]


def write_tables(folder, number, table):
    """A run directory's two tables with the numbers of a simulated run."""
    folder.mkdir()
    rows, scores = [], []
    for s, n in enumerate(np.flatnonzero(table.run_N == number)):
        method = table.methods[table.method_R[number]]
        common = {"run": folder.name, "method": method, "seed": number, "step": int(table.step_N[n])}
        rows.append(Measurement(**common, metric="perplexity", value=float(np.exp(table.log_perplexity_N[n]))))
        for p, metric in enumerate(("random_sharpness", "weight_stable_rank")):
            rows.append(Measurement(**common, metric=metric, value=float(table.geometry_NP[n, p])))
        update = math.nan if s == 0 else float(table.geometry_NP[n, 2])
        rows.append(
            Measurement(
                **common,
                metric="update_norm",
                value=update,
                settings={"from_step": s - 1, **reference_of("update_norm")},
            )
        )
        scores.append(
            Score(
                **common, task="pylib_syntax", metric="acc", value=0.5 + 0.1 * float(table.target_N[n]),
                stderr=0.01, ci_low=0.4, ci_high=0.6, n=700, chance=0.5, higher_is_better=True, group=None,
                task_version="1", lm_eval_version="0", items="x",
            )
        )  # fmt: skip
    append_measurements(folder / "measurements.jsonl", rows)
    append_scores(folder / "downstream.jsonl", scores)
    return folder


def write_study(folder, **shape):
    table = simulated_table(0, **{"methods": 6, "runs": 2, "steps": 3, "between": 1.0, **shape})
    return table, [write_tables(folder / name, number, table) for number, name in enumerate(table.runs)]


def test_predict_reads_runs_and_writes_its_answer(tmp_path, capsys):
    table, runs = write_study(tmp_path)
    gathered = gather(runs, metrics=["random_sharpness", "weight_stable_rank", "update_norm"])
    later = table.step_N > 0
    assert gathered.methods == table.methods
    assert gathered.runs == [str(run) for run in runs]
    np.testing.assert_array_equal(gathered.step_N, table.step_N[later])
    np.testing.assert_array_equal(gathered.method_N, table.method_N[later])
    np.testing.assert_allclose(gathered.target_N, 0.2 * table.target_N[later], atol=1e-12)
    np.testing.assert_allclose(gathered.log_perplexity_N, table.log_perplexity_N[later], atol=1e-12)
    np.testing.assert_allclose(gathered.geometry_NP, table.geometry_NP[later, :3], atol=1e-12)
    prediction = predict(runs, permutations=19, output=tmp_path / "answer")
    assert [found.checkpoints for found in prediction.answers] == [24, 24]
    assert any("update_norm is null at steps 0" in note for note in prediction.notes)
    assert any(note.startswith("random_variance is null") for note in prediction.notes)
    content = json.loads((tmp_path / "answer" / "prediction.json").read_text())
    for found in prediction.answers:
        assert content[found.question]["gain"] == pytest.approx(found.gain)
        assert content[found.question]["methods"] == 6
        assert content[found.question]["rows"][0] == [str(runs[0]), 1]
    assert (tmp_path / "answer" / "prediction.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as stop:
        main(["predict", *map(str, runs), "--permutations", "19", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert printed["notes"] == prediction.notes
    for found in prediction.answers:
        assert printed[found.question]["gain"] == pytest.approx(found.gain)
        assert printed[found.question]["predicted_both"] == pytest.approx(found.predicted_both.tolist())


def test_own_parameters_take_part_and_the_claim_says_so(tmp_path):
    """Where a run has both, its dense number counts, whichever was measured last."""
    table, runs = write_study(tmp_path)
    for number, run in enumerate(runs):
        method = table.methods[table.method_R[number]]
        rows = read_measurements(run)
        for row in [row for row in rows if row.metric == "random_sharpness"]:
            both = [
                replace(row, settings={"space": "dense"}),
                replace(row, value=9.0, settings={"space": "parameters"}),
            ]
            if method == table.methods[2]:
                both = [replace(row, settings={"space": "parameters"})]
            rows += both
        rows = [row for row in rows if row.metric != "random_sharpness" or row.settings]
        (run / "measurements.jsonl").unlink()
        append_measurements(run / "measurements.jsonl", rows)
    metrics = ["random_sharpness", "weight_stable_rank"]
    np.testing.assert_allclose(gather(runs, metrics=metrics).geometry_NP, table.geometry_NP[:, :2], atol=1e-12)
    prediction = predict(runs, metrics=metrics, permutations=19, output=tmp_path / "answer")
    note = (
        f"not dense: random_sharpness of {table.methods[2]} moves the model's own parameters, those of the other "
        "methods dense weights"
    )
    assert note in prediction.notes
    assert prediction_claim(tmp_path / "answer").sentence.endswith(f" N{note[1:]}.")


def test_runs_of_other_lengths_join_their_method(tmp_path):
    """As runs of a sweep, a third as long, do."""
    table, runs = write_study(tmp_path)
    short = simulated_table(5, methods=6, runs=1, steps=1)
    short = replace(short, step_N=short.step_N + 40, runs=[f"{name}-sweep" for name in short.methods])
    more = [write_tables(tmp_path / name, number, short) for number, name in enumerate(short.runs)]
    gathered = gather([*runs, *more], metrics=["random_sharpness", "weight_stable_rank"])
    assert gathered.methods == table.methods
    assert len(gathered.runs) == 18
    assert set(gathered.step_N) == {0, 1, 2, 40}
    np.testing.assert_array_equal(gathered.method_R, np.r_[table.method_R, np.arange(6)])


def test_the_baseline_is_at_no_distance_from_itself(tmp_path):
    table, runs = write_study(tmp_path)
    for number, run in enumerate(runs):
        rows = []
        method = table.methods[table.method_R[number]]
        for step in range(3):
            common = {"run": run.name, "method": method, "seed": number, "step": step}
            value = (
                {"reason": UNDEFINED + OWN_BASELINE}
                if number == 0
                else {"value": float(step + 1), "baseline": table.runs[0]}
            )
            rows += [Measurement(**common, **value, metric=m) for m in ("activation_l2", "activation_cka")]
        append_measurements(run / "measurements.jsonl", rows)
    gathered = gather(runs, metrics=["activation_l2", "activation_cka"])
    np.testing.assert_array_equal(gathered.step_N, table.step_N)
    np.testing.assert_array_equal(gathered.geometry_NP[:3], [[0.0, 1.0]] * 3)
    np.testing.assert_array_equal(gathered.geometry_NP[15:18, 0], [1.0, 2.0, 3.0])


def test_a_metric_that_a_run_lacks_costs_the_metric_and_not_the_run(tmp_path):
    table, runs = write_study(tmp_path)
    for number, run in enumerate(runs[:-2]):  # as the barrier to the baseline, which one method has none of
        method = table.methods[table.method_R[number]]
        common = {"run": run.name, "method": method, "seed": number, "metric": "method_barrier"}
        common["settings"] = reference_of("method_barrier")
        append_measurements(
            run / "measurements.jsonl", [Measurement(**common, step=s, value=0.1 * s) for s in range(3)]
        )
    prediction = predict(runs, metrics=["random_sharpness", "method_barrier"], permutations=19)
    assert prediction.unseen_method.methods == 6
    assert any(note.startswith("method_barrier is null in") for note in prediction.notes)


def test_a_scored_step_that_was_not_measured_is_noted(tmp_path):
    table, runs = write_study(tmp_path)
    append_scores(runs[0] / "downstream.jsonl", [replace(read_scores(runs[0])[0], step=99)])
    gathered = gather(runs, metrics=["random_sharpness"])
    assert len(gathered.target_N) == len(table.target_N)
    assert "left out: some runs have a score but no perplexity at steps 99" in gathered.notes


def test_scores_on_the_first_items_take_part_where_no_run_has_more(tmp_path):
    _, runs = write_study(tmp_path)
    whole = gather(runs, metrics=["random_sharpness"])

    def limit(chosen, items):
        for run in chosen:
            rows = [replace(row, limit=items) for row in read_scores(run)]
            (run / "downstream.jsonl").unlink()
            append_scores(run / "downstream.jsonl", rows)

    limit(runs, 150)
    gathered = gather(runs, metrics=["random_sharpness"])
    np.testing.assert_array_equal(gathered.target_N, whole.target_N)
    assert "scores are those of the first 150 items of each task" in gathered.notes
    limit(runs[:1], None)
    with pytest.raises(UserError, match="1 of 12 runs can take part"):
        predict(runs)
    limit(runs, 20)
    with pytest.raises(UserError, match="got 0 of 12"):
        predict(runs)


def test_settings_of_one_method_that_are_given_as_several_are_several(tmp_path):
    table, runs = write_study(tmp_path)
    assert gather(runs, metrics=["random_sharpness"]).methods == table.methods
    apart = [f"{table.methods[method]}-{number % 2}" for number, method in enumerate(table.method_R)]
    gathered = gather(runs, methods=apart, metrics=["random_sharpness"])
    assert [gathered.methods[method] for method in gathered.method_R] == apart
    assert len(set(apart)) == 2 * len(table.methods)


def test_folders_without_a_recipe_are_methods_of_their_own(tmp_path):
    table, runs = write_study(tmp_path)
    named = [
        run.with_name(f"m{method}-seed-{k}") for k, (run, method) in enumerate(zip(runs, table.method_R, strict=True))
    ]
    for run, renamed in zip(runs, named, strict=True):
        rows = [replace(row, method="unknown") for row in read_measurements(run / "measurements.jsonl")]
        renamed.mkdir()
        append_measurements(renamed / "measurements.jsonl", rows)
        (run / "downstream.jsonl").rename(renamed / "downstream.jsonl")
    gathered = gather(named, metrics=["random_sharpness"])
    assert [gathered.methods[method] for method in gathered.method_R] == [
        str(tmp_path / f"m{method}") for method in table.method_R
    ]


def test_predict_says_what_is_missing(tmp_path):
    _, runs = write_study(tmp_path, methods=4, runs=2)
    (runs[3] / "downstream.jsonl").unlink()
    (runs[5] / "measurements.jsonl").unlink()
    with pytest.raises(UserError) as fault:
        predict(runs)
    message = str(fault.value)
    assert "at least 6 methods, got 4" in message
    assert "6 of 8 runs can take part" in message
    assert f"{runs[3]} has no downstream scores" in message
    assert f"{runs[5]} has no perplexity" in message
    assert "\n" not in message
