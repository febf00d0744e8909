"""The statistics against scikit-learn, against planted effects, and against planted leaks."""

import json
import math

import numpy as np
import pytest
from simulated_studies import simulated_table
from sklearn.linear_model import Ridge

from hf_lowrank.downstream.gathering import gather, predict
from hf_lowrank.downstream.prediction import (
    Table,
    _with_usable_metrics,
    analyse,
    gain_interval,
    permutation_p_value,
)
from hf_lowrank.downstream.ridge import PENALTIES, leave_one_group_out
from hf_lowrank.errors import UserError
from hf_lowrank.runs.measurements import OWN_BASELINE, UNDEFINED, Measurement, append_measurements
from hf_lowrank.runs.scores import Score, append_scores


def reference(x, y, runs):
    """The nested procedure, written out with scikit-learn and loops."""
    predicted = np.empty_like(y)
    penalties = []

    def fitted(rows, penalty):
        mean, scale = x[rows].mean(0), x[rows].std(0)
        model = Ridge(alpha=penalty * rows.sum()).fit((x[rows] - mean) / scale, y[rows])
        return lambda at: model.predict((x[at] - mean) / scale)

    for g in np.unique(runs):
        errors = []
        for penalty in PENALTIES:
            error = 0.0
            for h in np.unique(runs[runs != g]):
                inside = (runs != g) & (runs != h)
                error += ((fitted(inside, penalty)(runs == h) - y[runs == h]) ** 2).sum()
            errors.append(error)
        penalties.append(PENALTIES[int(np.argmin(errors))])
        predicted[runs == g] = fitted(runs != g, penalties[-1])(runs == g)
    return predicted, penalties


def test_leave_one_group_out_is_the_nested_procedure():
    table = simulated_table(3, runs=8, steps=3, metrics=4, effect=0.5)
    x, y, runs = table.columns(), table.target.reshape(-1), table.run_of_row
    predicted, folds = leave_one_group_out(x, y, runs)
    expected, penalties = reference(x, y, runs)
    np.testing.assert_allclose(predicted, expected, rtol=1e-9, atol=1e-10)
    assert [fold.penalty for fold in folds] == pytest.approx(penalties)


def test_nothing_of_the_left_out_run_reaches_its_fit():
    table = simulated_table(1, runs=9, effect=0.5)
    x, y, runs = table.columns(), table.target.reshape(-1), table.run_of_row
    _, before = leave_one_group_out(x, y, runs)
    x2, y2 = x.copy(), y.copy()
    x2[runs == 4] = 1e6 * x2[runs == 4] + 1e5
    y2[runs == 4] = -1e6
    _, after = leave_one_group_out(x2, y2, runs)
    for name in ("mean_P", "scale_P", "mean_y", "coef_P", "penalty"):
        np.testing.assert_array_equal(getattr(before[4], name), getattr(after[4], name))
        assert not np.array_equal(getattr(before[3], name), getattr(after[3], name)) or name == "penalty"


def test_a_planted_leak_does_not_help():
    """A metric that tells the runs apart predicts rows of runs that were seen, and none of a run that was not."""
    rng = np.random.default_rng(0)
    runs, steps = 12, 6
    level = rng.normal(size=(runs, 1))
    marks = np.eye(runs)[:, None, :].repeat(steps, 1) + 0.01 * rng.normal(size=(runs, steps, runs))
    target = level + 0.05 * rng.normal(size=(runs, steps))
    perplexity = rng.normal(size=(runs, steps))
    names = [f"mark_{r}" for r in range(runs)]
    table = Table([f"r{i}" for i in range(runs)], list(range(steps)), names, perplexity, marks, target)
    y = target.reshape(-1)
    honest, _ = leave_one_group_out(table.columns(), y, table.run_of_row)
    split_runs = np.tile(np.arange(steps), runs)
    leaky, _ = leave_one_group_out(table.columns(), y, split_runs)

    def r2(p):
        return 1 - ((p - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()

    assert r2(leaky) > 0.9
    assert r2(honest) < 0.1


def test_the_interval_covers_the_expected_gain():
    """A small share of benchmarks/prediction_calibration.py."""
    gains, intervals = [], []
    for seed in range(60):
        table = simulated_table(seed, effect=0.5)
        y, runs = table.target.reshape(-1), table.run_of_row
        base, _ = leave_one_group_out(table.columns([]), y, runs)
        both, _ = leave_one_group_out(table.columns(), y, runs)
        squares = ((y - y.mean()) ** 2).sum()
        gains.append((((base - y) ** 2).sum() - ((both - y) ** 2).sum()) / squares)
        intervals.append(gain_interval(table.target, base, both, resamples=500))
    truth = float(np.mean(gains))
    assert truth > 0.15
    assert sum(low <= truth <= high for low, high in intervals) >= 54


def test_the_permutation_test_tells_an_effect_from_none():
    with_effect = analyse(simulated_table(0, effect=1.0), permutations=39)
    assert with_effect.p_value == pytest.approx(1 / 40)
    assert with_effect.gain > 0.3
    assert "metric_0" in {ranked.metric for ranked in with_effect.ranking[:2]}
    assert {c.name for c in with_effect.coefficients[:3]} == {"log_perplexity", "metric_0", "metric_1"}
    none = [permutation_p_value(table, _gain(table), permutations=19, seed=s) for s, table in _nulls(20)]
    assert sum(p <= 0.05 for p in none) <= 4
    assert 0.25 < float(np.mean(none)) < 0.85


def _nulls(count):
    return [(seed, simulated_table(900 + seed, effect=0.0)) for seed in range(count)]


def _gain(table):
    y, runs = table.target.reshape(-1), table.run_of_row
    errors = [((leave_one_group_out(table.columns(c), y, runs)[0] - y) ** 2).sum() for c in ([], None)]
    return (errors[0] - errors[1]) / ((y - y.mean()) ** 2).sum()


def test_too_few_runs_and_nothing_to_predict_are_refused():
    with pytest.raises(UserError, match="at least 8 runs, got 7"):
        analyse(simulated_table(0, runs=7))
    table = simulated_table(0, runs=8)
    flat = Table(table.runs, table.steps, table.metrics, table.log_perplexity, table.geometry, 0 * table.target)
    with pytest.raises(UserError, match="do not vary"):
        analyse(flat)


def test_constant_and_null_metrics_are_left_out_with_a_note():
    table = simulated_table(0, runs=8, metrics=3)
    table.geometry[:, :, 1] = 0.7
    table.geometry[2, 0, 2] = np.nan
    left = _with_usable_metrics(table)
    assert left.metrics == ["metric_0"]
    assert left.notes == ["metric_1 is constant: left out", "metric_2 is null in run2: left out"]


def write_tables(folder, number, table, *, steps=None):
    """A run directory's two tables with the numbers of a simulated one."""
    folder.mkdir()
    rows, scores = [], []
    for s, step in enumerate(table.steps):
        common = {"run": folder.name, "method": "full_rank", "seed": number, "step": int(step)}
        rows.append(Measurement(**common, metric="perplexity", value=float(np.exp(table.log_perplexity[number, s]))))
        for p, metric in enumerate(("random_sharpness", "weight_stable_rank")):
            rows.append(Measurement(**common, metric=metric, value=float(table.geometry[number, s, p])))
        update = math.nan if s == 0 else float(table.geometry[number, s, 2])
        rows.append(Measurement(**common, metric="update_norm", value=update, settings={"from_step": s - 1}))
        scores.append(
            Score(
                **common, task="pylib_syntax", metric="acc", value=0.5 + 0.1 * float(table.target[number, s]),
                stderr=0.01, ci_low=0.4, ci_high=0.6, n=700, chance=0.5, higher_is_better=True, group=None,
                task_version="1", lm_eval_version="0", items="x",
            )
        )  # fmt: skip
    append_measurements(folder / "measurements.jsonl", rows)
    append_scores(folder / "downstream.jsonl", scores)
    return folder


def test_predict_reads_runs_and_writes_its_answer(tmp_path):
    table = simulated_table(0, runs=9, effect=1.0)
    runs = [write_tables(tmp_path / f"run{i}", i, table) for i in range(9)]
    gathered = gather(runs, metrics=["random_sharpness", "weight_stable_rank", "update_norm"])
    assert gathered.steps == [1, 2, 3, 4]
    np.testing.assert_allclose(gathered.target, 0.2 * table.target[:, 1:], atol=1e-12)
    np.testing.assert_allclose(gathered.log_perplexity, table.log_perplexity[:, 1:], atol=1e-12)
    prediction = predict(runs, permutations=19, output=tmp_path / "answer")
    assert prediction.checkpoints == 36
    assert prediction.gain > 0
    assert any("update_norm is null at steps 0" in note for note in prediction.notes)
    assert any(note.startswith("random_variance is null") for note in prediction.notes)
    answer = json.loads((tmp_path / "answer" / "prediction.json").read_text())
    assert answer["gain"] == pytest.approx(prediction.gain)
    assert (tmp_path / "answer" / "prediction.png").read_bytes().startswith(b"\x89PNG")


def test_the_baseline_is_at_no_distance_from_itself(tmp_path):
    table = simulated_table(0, runs=9, effect=1.0)
    runs = [write_tables(tmp_path / f"run{i}", i, table) for i in range(9)]
    for number, run in enumerate(runs):
        rows = []
        for s, step in enumerate(table.steps):
            common = {"run": run.name, "method": "full_rank", "seed": number, "step": int(step)}
            value = (
                {"reason": UNDEFINED + OWN_BASELINE} if number == 0 else {"value": float(s + 1), "baseline": "run0"}
            )
            rows += [Measurement(**common, **value, metric=m) for m in ("activation_l2", "activation_cka")]
        append_measurements(run / "measurements.jsonl", rows)
    gathered = gather(runs, metrics=["activation_l2", "activation_cka"])
    assert gathered.steps == list(table.steps)
    np.testing.assert_array_equal(gathered.geometry[0], [[0.0, 1.0]] * len(table.steps))
    np.testing.assert_array_equal(gathered.geometry[5, :, 0], np.arange(len(table.steps)) + 1)


def test_predict_says_what_is_missing(tmp_path):
    table = simulated_table(0, runs=8)
    runs = [write_tables(tmp_path / f"run{i}", i, table) for i in range(8)]
    (runs[3] / "downstream.jsonl").unlink()
    (runs[5] / "measurements.jsonl").unlink()
    with pytest.raises(UserError) as fault:
        predict(runs)
    message = str(fault.value)
    assert "got 6 of 8" in message
    assert f"{runs[3]} has no downstream scores" in message
    assert f"{runs[5]} has no perplexity" in message
    assert "\n" not in message
