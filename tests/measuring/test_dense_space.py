"""Landscapes and interpolation move dense weights: an exact merge changes no number; what has none says so."""

from __future__ import annotations

import gc
import math
import shutil
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from hf_lowrank import geometry as g
from hf_lowrank.adapters.modeling import target_layers
from hf_lowrank.adapters.relora import merge_and_reinit
from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure
from hf_lowrank.measuring.runner import unmeasured
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.measure_settings import resolve_settings
from hf_lowrank.runs.measurements import NOT_DENSE, read_measurements
from hf_lowrank.runs.trajectory import Trajectory
from tests.distributed.processes import in_processes
from tests.distributed.sharded_training import launched
from tests.measuring.adapted import write_adapted

# Ten directions of factors of rank four: those beyond the rank of a matrix must not count.
SMALL = {
    "random": {"draws": 3, "steps": 1},
    "pca": {"count": 10, "steps": 1},
    "path": {"points": 3},
    "plane": {"steps": 1},
    "hessian": {"iterations": 4, "probes": 2},
}
TRAJECTORY = {**SMALL, "pca": {"count": 2, "steps": 1, "basis": "trajectory"}}
MOVED = ("random_sharpness", "random_variance", "pca1_sharpness", "pcak_sharpness", "step_barrier", "random_plane")
# The low-rank control in one process alone: what several do with it is what they do with the others.
WAYS = [(method, way) for method in ("relora", "sltrain") for way in ("copy", "low", "two", "sharded")]
WAYS += [("low_rank", "copy"), ("low_rank", "low")]


def merged(run, folder):
    """The ReLoRA run with its last checkpoint merged and restarted."""
    shutil.copytree(run, folder)
    model = Trajectory(run).model(20)
    merge_and_reinit(model, seed=7, step=20)
    model.save_pretrained(folder / "checkpoint-20")
    return folder


def exported(run, folder):
    """The run with the dense weights of every checkpoint."""
    shutil.copytree(run, folder)
    for step in Trajectory(run).steps:
        shutil.rmtree(folder / f"checkpoint-{step}")
        Trajectory(run).dense_model(step).save_pretrained(folder / f"checkpoint-{step}")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, make_run):
    """The full-rank run, and by method a run and a twin that computes the same with other tensors."""
    folder = tmp_path_factory.mktemp("dense")
    full = make_run(folder / "full_rank-0")
    runs = {
        method: write_adapted(folder / f"{method}-0", full, method) for method in ("relora", "sltrain", "low_rank")
    }
    twins = {method: exported(runs[method], folder / f"{method}-twin") for method in ("sltrain", "low_rank")}
    twins["relora"] = merged(runs["relora"], folder / "relora-twin")
    return full, {method: (run, twins[method]) for method, run in runs.items()}


def measure_all(pairs, output, way, **options):
    full, found = pairs
    memory = "low" if way == "low" else "copy"
    for run in [run for method, pair in found.items() if (method, way) in WAYS for run in pair]:
        for name, settings in (("weights", SMALL), ("trajectory", TRAJECTORY)):
            metrics = [*METRICS.sixteen, "random_plane"] if name == "weights" else ["pca"]
            measure(
                run,
                metrics=metrics,
                steps=20,
                baseline=full,
                settings={**settings, "memory": memory},
                output=output / way / name,
                **options,
            )


def measure_in_process(pairs, output, rank, world):
    launched(rank, world, on_accelerators=False)
    for way in ("two", "sharded"):
        measure_all(pairs, output, way, sharded=way == "sharded")
    return []


@pytest.fixture(scope="module")
def outputs(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for way in ("copy", "low"):
        measure_all(pairs, folder, way)
    in_processes(2, partial(measure_in_process, pairs, folder), folder / "of", ACCELERATE_USE_CPU="true")
    return folder


def values(folder):
    """Finite values of the model by metric and position on a grid."""
    rows = [row for row in read_measurements(folder) if row.scope == "model"]
    where = ("t", "x", "y", "from_step")
    return {(row.metric, *(row.settings.get(key) for key in where)): row.value for row in rows if row.has_value}


@pytest.mark.parametrize(("method", "way"), WAYS)
def test_a_merge_moves_nothing(outputs, pairs, method, way):
    for name in ("weights", "trajectory"):
        run, twin = (values(outputs / way / name / one.name) for one in pairs[1][method])
        assert run.keys() == twin.keys()
        assert {metric for metric, *_ in run} >= ({*METRICS.sixteen} if name == "weights" else {"pcak_sharpness"})
        for key, value in run.items():
            assert twin[key] == pytest.approx(value, rel=1e-4, abs=1e-9), (name, key)


@pytest.mark.parametrize(("method", "way"), [(method, way) for method, way in WAYS if way != "copy"])
def test_every_way_gives_the_same_numbers(outputs, pairs, method, way):
    run = pairs[1][method][0].name
    for name in ("weights", "trajectory"):
        one, other = (values(outputs / chosen / name / run) for chosen in ("copy", way))
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)


def last(rows, metric):
    return next(row for row in rows if row.metric == metric and row.scope == "model" and row.step == 20)


def test_parameters_are_what_the_study_moves(pairs, tmp_path):
    """Against the functions on the stored model; rows of the two spaces stand side by side."""
    run = shutil.copytree(pairs[1]["relora"][0], tmp_path / "relora-0")
    options = {"metrics": ["random", "pca", "step_barrier"], "steps": 20}
    measure(run, settings=SMALL, **options)
    settings = {**SMALL, "space": "parameters"}
    assert unmeasured(run, settings=SMALL, **options) == []
    assert {metric for _, metric in unmeasured(run, settings=settings, **options)} == {*MOVED[:5]}
    rows = [row for row in measure(run, settings=settings, **options) if row.settings.get("space") == "parameters"]
    trajectory = Trajectory(run)
    model, sequences = trajectory.model(20), trajectory.evaluation_set()
    loss = g.TokenLoss(sequences.input_ids, sequences.attention_mask)
    curve = g.random_curve(model, loss, offsets=g.symmetric_grid(0.3 * g.weight_scale(model), 1), draws=3)
    assert last(rows, "random_sharpness").value == pytest.approx(g.random_sharpness(curve).value, rel=1e-5)
    curve = g.pca_curve(model, loss, offsets=g.symmetric_grid(0.1, 1), count=10, normalize="tensor")
    assert last(rows, "pcak_sharpness").value == pytest.approx(g.expected_sharpness(curve.losses), rel=1e-5)
    positions = g.path_grid(3)
    losses = g.interpolation_curve(trajectory.model(10), model, loss, positions=positions)
    path = {row.settings["t"]: row.value for row in rows if row.metric == "step_path"}
    assert [path[t] for t in positions.tolist()] == pytest.approx(losses.tolist(), rel=1e-6)
    remark = f"{NOT_DENSE}moves the model's own parameters, as the settings ask"
    assert {last(rows, metric).reason for metric in MOVED[:5]} == {remark}
    both = read_measurements(run)
    for metric in (*MOVED[:4], "step_imib"):  # both step barriers are 0
        found = {row.settings["space"]: row for row in both if row.metric == metric}
        assert found["dense"].reason is None
        assert found["dense"].value != pytest.approx(found["parameters"].value, rel=1e-2)


def test_a_plain_model_is_dense_in_either_space(pairs, tmp_path):
    full = pairs[0]
    measured = [
        measure(
            full, metrics=["random", "step_barrier"], steps=20, output=tmp_path, settings={**SMALL, "space": space}
        )
        for space in ("dense", "parameters")
    ]
    assert measured[0] == measured[1]
    assert last(measured[0], "random_sharpness").settings["space"] == "dense"


def test_what_has_no_dense_equivalent_moves_its_own_parameters_and_says_so(pairs, tmp_path):
    full = pairs[0]
    cola = write_adapted(tmp_path / "cola-0", full, "cola")
    rows = measure(cola, metrics="all", baseline=full, settings=SMALL, steps=20)
    named = ["hessian_top", "hessian_trace", "critical_sharpness"]
    remark = f"{NOT_DENSE}moves the model's own parameters, as its layers have no dense equivalent"
    for metric in (*MOVED[:5], *named):
        row = last(rows, metric)
        assert math.isfinite(row.value), (metric, row.reason)
        assert row.settings["space"] == "parameters"
        assert row.reason.endswith(remark)
    for metric in ("random_curve", "pca1_curve", "step_path", "random_plane"):
        found = [row for row in rows if row.metric == metric and row.step == 20]
        assert found
        assert {row.settings["space"] for row in found} == {"parameters"}
    assert last(rows, "method_barrier").settings["space"] == "dense"
    assert last(rows, "loss").reason is None
    asked = measure(cola, metrics="all", baseline=full, settings={**SMALL, "space": "parameters"}, steps=20)
    assert asked == rows


def test_derivatives_are_those_of_the_dense_model(pairs, tmp_path):
    """SLTrain's layers have no second derivatives of their own."""
    run, twin = pairs[1]["sltrain"]
    found = [
        measure(one, metrics="hessian_top,hessian_trace,critical_sharpness", steps=20, settings=SMALL, output=tmp_path)
        for one in (run, twin)
    ]
    for metric in ("hessian_top", "hessian_trace", "critical_sharpness"):
        one, other = (last(rows, metric) for rows in found)
        assert one.value == pytest.approx(other.value, rel=1e-4), one.reason
        assert one.settings["space"] == "dense"


def test_another_space_is_one_line():
    with pytest.raises(UserError) as error:
        resolve_settings("fast", {"space": "factors"})
    assert "space" in str(error.value)
    assert "'dense' or 'parameters'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["relora", "sltrain", "low_rank"])
def test_a_dense_model_takes_the_place_of_the_adapted_one(pairs, method):
    """Made in place, it shares what is no target, and no adapted layer outlives its turn."""
    model = Trajectory(pairs[1][method][0]).model(20)
    ids = torch.arange(12)[None]
    expected, copied = model(ids).logits, model.to_dense()
    layers = target_layers(model)
    alive, seen = [weakref.ref(layer) for layer in layers.values()], []
    embeddings = model.get_input_embeddings().weight.data_ptr()
    assert copied.get_input_embeddings().weight.data_ptr() != embeddings
    del layers
    for reference in alive:
        weakref.finalize(reference(), lambda: seen.append(sum(ref() is not None for ref in alive)))
    dense = model.to_dense(in_place=True).eval()
    assert seen == [*range(len(alive) - 1, -1, -1)]
    assert dense.get_input_embeddings().weight.data_ptr() == embeddings
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, copied.get_parameter(name))
    torch.testing.assert_close(dense(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc")
def test_a_dense_model_lets_go_of_the_file_with_the_factors(pairs):
    run = pairs[1]["relora"][0]
    maps, file = Path("/proc/self/maps"), str(run / "checkpoint-20" / "model.safetensors")
    model = Trajectory(run).model(20)
    assert file in maps.read_text()
    del model
    gc.collect()
    dense = Trajectory(run).dense_model(20)
    gc.collect()
    assert file not in maps.read_text()
    assert dense.get_input_embeddings().weight.is_contiguous()
