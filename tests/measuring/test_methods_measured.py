"""Every kind of method gets every metric: adapters' checkpoints against the full-rank run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_lowrank.measuring import measure
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.trajectory import Trajectory
from tests.measuring.adapted import ADAPTERS, write_adapted

SMALL = {"random": {"draws": 2, "steps": 1}, "pca": {"count": 2, "steps": 1}, "path": {"points": 1}, "sequences": 4}


@pytest.fixture(scope="module", params=list(ADAPTERS))
def measured(request, tmp_path_factory, make_run):
    folder = tmp_path_factory.mktemp(request.param)
    full = make_run(folder / "full_rank-0")
    run = write_adapted(folder / request.param, full, request.param)
    return request.param, run, measure(run, baseline=full, settings=SMALL, steps=20)


def test_all_sixteen_have_values_or_one_sound_reason(measured):
    method, _, rows = measured
    for metric in METRICS.sixteen:
        (row,) = [row for row in rows if row.metric == metric and row.scope == "model"]
        if method == "cola" and metric == "method_barrier":
            assert row.reason == "undefined: the layers are not linear and have no dense weights to interpolate"
        else:
            assert math.isfinite(row.value), (metric, row.reason)
        if method == "cola" and METRICS[metric].dimension == "spectra":
            assert row.reason.startswith("surrogate")


def test_spectra_are_those_of_the_dense_weights(measured):
    method, folder, rows = measured
    run = Trajectory(folder)
    assert run.adapted
    assert len(run.targets) == 14
    dense = None if method == "cola" else run.dense_model(20)
    for name in run.targets[:3]:
        weight, before = run.dense_weight(20, name), run.dense_weight(10, name)
        if dense is not None:
            torch.testing.assert_close(weight, dense.get_submodule(name).weight.detach(), rtol=1e-5, atol=1e-6)
        sigma = np.linalg.svd(weight.double().numpy(), compute_uv=False)
        delta = np.linalg.svd((weight.double() - before.double()).numpy(), compute_uv=False)
        expected = {
            "weight_stable_rank": (sigma**2).sum() / sigma[0] ** 2,
            "update_norm": np.linalg.norm(delta) / np.linalg.norm(before.double().numpy()),
            "update_stable_rank": (delta**2).sum() / delta[0] ** 2,
        }
        for metric, value in expected.items():
            (row,) = [row for row in rows if row.metric == metric and row.scope == name]
            assert row.value == pytest.approx(value, rel=1e-5)
        factors = run.low_rank_factors(20, name)
        assert (factors is not None) == (method in ("cola", "low_rank"))


def test_low_memory_gives_the_same_numbers(measured, tmp_path):
    _, folder, rows = measured
    settings = {**SMALL, "memory": "low"}
    other = measure(folder, metrics="random,pca,step_barrier", settings=settings, steps=20, output=tmp_path)
    expected = {row.metric: row.value for row in rows if row.scope == "model"}
    for metric in ("random_sharpness", "pca1_sharpness", "pcak_sharpness", "step_barrier"):
        (row,) = [row for row in other if row.metric == metric]
        assert row.value == pytest.approx(expected[metric], rel=1e-4, abs=1e-6), (metric, row.reason)


def test_what_has_no_meaning_beside_one_run_is_measured_beside_another(tmp_path, make_run):
    galore, full_rank = (make_run(tmp_path / name, noise_seed=seed) for name, seed in (("galore-0", 2), ("full-0", 3)))
    cola = write_adapted(tmp_path / "cola-0", full_rank, "cola")
    settings = {"metrics": "method_barrier", "steps": "last", "settings": SMALL}
    measure(galore, baseline=cola, **settings)
    rows = measure(galore, baseline=full_rank, **settings)
    barriers = {row.baseline: row for row in rows if row.metric == "method_barrier"}
    assert "has no dense weights" in barriers["cola-0"].reason
    assert math.isfinite(barriers["full-0"].value)
    before = (tmp_path / "galore-0" / "measurements.jsonl").read_bytes()
    measure(galore, baseline=cola, **settings)
    assert (tmp_path / "galore-0" / "measurements.jsonl").read_bytes() == before
