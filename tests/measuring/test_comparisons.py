"""Metrics along paths and against a baseline: through measure, against direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_lowrank import geometry as g
from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.trajectory import Trajectory

SMALL = {
    "sequences": 4,
    "steps": 3,
    "random": {"draws": 2, "steps": 1},
    "pca": {"count": 3, "steps": 1},
    "path": {"points": 3},
    "plane": {"steps": 1},
    "hessian": {"iterations": 4, "probes": 2},
    "curve": {"steps": 3, "batch": 2, "points": 3},
    "noise": {"batches": 4},
    "overlap": {"count": 3},
}


def model_row(rows, metric, run, step=20):
    (found,) = [r for r in rows if (r.metric, r.run, r.step, r.scope) == (metric, run, step, "model")]
    return found


def loss_of(run):
    chosen = run.evaluation_set().first(SMALL["sequences"])
    return g.TokenLoss(chosen.input_ids, chosen.attention_mask)


@pytest.fixture(scope="module")
def everything(tmp_path_factory, make_run):
    """(full-rank run, GaLore run, all rows of all metrics)."""
    folder = tmp_path_factory.mktemp("everything")
    runs = [make_run(folder / "full_rank-0"), make_run(folder / "galore-0", method="galore", noise_seed=2)]
    return *runs, measure(runs, metrics="all", settings=SMALL)


def test_every_metric_has_a_row_with_a_value_or_a_reason(everything):
    rows = everything[2]
    for metric in METRICS:
        for run in ("full_rank-0", "galore-0"):
            found = [row for row in rows if row.metric == metric and row.run == run and row.step == 20]
            assert found, (metric, run)
            for row in found:
                assert math.isfinite(row.value) or row.reason, row
            if run == "galore-0":
                assert all(math.isfinite(row.value) for row in found), (metric, found[0].reason)
            elif METRICS[metric].needs_baseline:
                assert {row.reason for row in found} == {"undefined: the run is its own baseline"}


def test_barriers_against_direct_paths(everything):
    full, galore, rows = everything
    run, base = Trajectory(galore), Trajectory(full)
    for metric, start, end in (
        ("step_barrier", run.model(10), run.model(20)),
        ("method_barrier", run.model(20), base.model(20)),
    ):
        path = {r.settings["t"]: r.value for r in rows if r.metric == metric.replace("barrier", "path")
                and r.run == "galore-0" and r.step == 20}  # fmt: skip
        grid = g.path_grid(3)
        t = np.array(sorted(path))
        assert set(grid.tolist()) < set(path)
        y = g.interpolation_curve(start, end, loss_of(run), positions=t).numpy()
        assert [path[position] for position in t] == pytest.approx(y, abs=1e-6)
        height = (y - ((1 - t) * y[0] + t * y[-1])).max()
        row = model_row(rows, metric, "galore-0")
        assert row.value == pytest.approx(height, abs=2e-7)
        assert row.settings["reference"] == "chord"
        inner = y[np.isin(t, grid.numpy()[1:-1])]
        assert model_row(rows, metric.replace("barrier", "imib"), "galore-0").value == pytest.approx(
            inner.max() - (y[0] + y[-1]) / 2, abs=2e-7
        )
    assert model_row(rows, "method_barrier", "galore-0").baseline == "full_rank-0"
    assert model_row(rows, "step_barrier", "galore-0").settings["from_step"] == 10


def test_principal_directions_use_the_one_decomposition(everything):
    _, galore, rows = everything
    run = Trajectory(galore)
    curve = g.pca_curve(run.model(20), loss_of(run), offsets=g.symmetric_grid(0.1, 1), count=3, normalize="tensor")
    assert model_row(rows, "pcak_sharpness", "galore-0").value == pytest.approx(
        g.expected_sharpness(curve.losses), rel=1e-3, abs=1e-7
    )
    assert model_row(rows, "pca1_sharpness", "galore-0").value == pytest.approx(
        g.expected_sharpness(curve.losses[:1]), rel=1e-3, abs=1e-7
    )


def test_activations_against_direct_computation(everything):
    full, galore, rows = everything
    run, base = Trajectory(galore), Trajectory(full)
    chosen = run.evaluation_set().first(SMALL["sequences"])
    layers = g.activation_similarity(run.model(20), base.model(20), [(chosen.input_ids, chosen.attention_mask)])
    got = [r for r in rows if (r.metric, r.run, r.step) == ("activation_cka", "galore-0", 20) and r.scope != "model"]
    assert [r.scope for r in got] == [f"hidden_states.{i}" for i in range(3)]
    assert [r.value for r in got] == pytest.approx([layer.cka for layer in layers], rel=1e-6)
    mean = sum(layer.l2 for layer in layers) / 3
    assert model_row(rows, "activation_l2", "galore-0").value == pytest.approx(mean, rel=1e-6)


def test_at_the_start_methods_coincide(everything):
    rows = everything[2]
    assert model_row(rows, "activation_l2", "galore-0", 0).value == 0
    assert model_row(rows, "activation_cka", "galore-0", 0).value == pytest.approx(1)
    assert model_row(rows, "weight_overlap", "galore-0", 0).value == pytest.approx(1)
    assert abs(model_row(rows, "method_barrier", "galore-0", 0).value) < 1e-6


def test_nothing_is_done_twice(everything):
    full, galore, rows = everything
    before = [(run / "measurements.jsonl").read_bytes() for run in (full, galore)]
    assert measure([full, galore], metrics="all", settings=SMALL) == rows
    assert [(run / "measurements.jsonl").read_bytes() for run in (full, galore)] == before


def test_batch_size_and_memory_mode_change_nothing_but_rounding(everything, tmp_path):
    _, galore, rows = everything
    other = measure(
        galore,
        metrics="random,pca,step,activations",
        settings={**SMALL, "batch_tokens": 24, "memory": "low"},
        baseline=everything[0],
        steps=20,
        output=tmp_path,
    )
    for row in other:
        if row.scope == "model" and row.metric in METRICS:
            expected = model_row(rows, row.metric, "galore-0")
            assert row.value == pytest.approx(expected.value, rel=1e-4, abs=1e-6), row.metric


def reasons(rows, metric="method_barrier"):
    return {row.run: row.reason for row in rows if row.metric == metric and row.scope == "model"}


def test_baselines_are_matched_by_seed_and_size(make_run, tmp_path):
    runs = [
        make_run(tmp_path / "full-0", steps=(0, 10)),
        make_run(tmp_path / "full-1", seed=1, steps=(0, 10)),
        make_run(tmp_path / "galore-1", method="galore", seed=1, steps=(0, 10)),
        make_run(tmp_path / "galore-2", method="galore", seed=2, steps=(0, 10)),
        make_run(tmp_path / "wide-1", method="galore", seed=1, steps=(0, 10), intermediate_size=56),
    ]
    rows = measure(runs, metrics="method_barrier,activation_cka", settings=SMALL, steps=10)
    assert model_row(rows, "method_barrier", "galore-1", 10).baseline == "full-1"
    found = reasons(rows)
    assert found["galore-1"] is None
    assert "seed 2 (there: 0, 1)" in found["galore-2"]
    assert "no full-rank run has the size of wide-1" in found["wide-1"]
    explicit = measure(runs[4], metrics="method_barrier", baseline=runs[0], settings=SMALL, steps=10)
    assert "different architectures" in reasons(explicit)["wide-1"]
    alone = measure(runs[3], metrics="activation_cka", settings=SMALL, steps=10)
    assert "--baseline" in reasons(alone, "activation_cka")["galore-2"]


def test_what_cannot_be_compared_is_named_and_the_rest_goes_on(make_run, tmp_path):
    full = make_run(tmp_path / "full-0", steps=(0, 10))
    galore = make_run(tmp_path / "galore-0", method="galore", steps=(0, 10, 20))
    rows = measure([full, galore], metrics="activation_cka,loss", settings=SMALL)
    late = [row for row in rows if row.metric == "activation_cka" and row.step == 20]
    assert "no checkpoint of step 20" in late[0].reason
    assert math.isfinite(model_row(rows, "loss", "galore-0").value)
    other = Trajectory(galore).evaluation_set()
    type(other)(other.input_ids.flip(0), other.attention_mask).save(galore)
    rows = measure([full, galore], metrics="activation_cka", settings=SMALL, steps=10, output=tmp_path / "out")
    marks = [Trajectory(run).evaluation_set().fingerprint[:12] for run in (galore, full)]
    reason = reasons(rows, "activation_cka")["galore-0"]
    assert "different evaluation sets" in reason
    assert all(mark in reason for mark in marks)


def test_tokens_of_another_vocabulary_are_named(make_run, tmp_path):
    run = make_run(tmp_path / "full-0", steps=(0,))
    chosen = Trajectory(run).evaluation_set()
    foreign = type(chosen)(chosen.input_ids + 100, chosen.attention_mask)
    rows = measure(run, metrics="loss,weight_stable_rank", evaluation_set=foreign)
    assert "another tokenizer" in reasons(rows, "loss")["full-0"]
    assert math.isfinite(model_row(rows, "weight_stable_rank", "full-0", 0).value)


def test_a_model_that_overflows_is_a_reason(make_run, tmp_path):
    run = make_run(tmp_path / "full-0", steps=(0, 10))
    model = Trajectory(run).model(10)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    model.save_pretrained(run / "checkpoint-10")
    rows = measure(run, metrics="loss,random_sharpness", settings=SMALL)
    assert "the loss is nan" in next(row.reason for row in rows if row.metric == "loss" and row.step == 10)
    assert math.isfinite(model_row(rows, "random_sharpness", "full-0", 0).value)


def test_a_trajectory_basis_needs_enough_checkpoints(everything):
    galore = everything[1]
    settings = {**SMALL, "pca": {"basis": "trajectory", "count": 2, "normalize": "none"}}
    rows = measure(galore, metrics="pcak_sharpness", settings=settings, steps=20)
    (row,) = [r for r in rows if r.metric == "pcak_sharpness" and r.settings.get("basis") == "trajectory"]
    assert math.isfinite(row.value)
    settings["pca"]["count"] = 3
    rows = measure(galore, metrics="pcak_sharpness", settings=settings, steps=20)
    assert any("need 4 checkpoints" in (r.reason or "") for r in rows)


def test_a_text_as_evaluation_set(everything, tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("words " * 10)
    with pytest.raises(UserError, match="no tokenizer"):
        measure(everything[1], metrics="loss", evaluation_set=text)
