"""The page's data: as its schema says, with intervals over seeds that the page does not compute itself."""

import re
import types
import typing
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hf_lowrank.claims.results import load_results
from hf_lowrank.report.answer import groups
from hf_lowrank.report.curves import floor
from hf_lowrank.report.members import looks
from hf_lowrank.report.payload import payload
from hf_lowrank.report.schema import Payload
from hf_lowrank.runs.records import load_runs
from tests.report.payload_types import jsdoc

ASSETS = Path(str(resources.files("hf_lowrank.report"))) / "assets"
METHODS = ("full_rank", "galore", "fira")
TASKS = ("syntax", "cloze")


@pytest.fixture
def data(make_run, make_study, tmp_path):
    study = load_results(make_study(tmp_path, METHODS))
    folders = [
        make_run(
            f"{m}-seed{seed}",
            m,
            seed,
            loss=3.3 + 0.01 * seed**2,
            activations=True,
            barriers=("full_rank-seed0", "fira-seed0"),
            tasks=TASKS,
        )
        for m in METHODS
        for seed in range(4)
    ]
    runs = load_runs([*folders, make_run("alone", "muon", 0, tasks=TASKS)])
    return payload(groups(runs), study, looks([run.method for run in runs] + [rate.member for rate in study.sweep]))


def faults(value, hint, path):
    """Where `value` is not as `hint` says."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return []
    if origin is typing.NotRequired:
        return faults(value, args[0], path)
    if origin is types.UnionType:
        found = [faults(value, arg, path) for arg in args]
        return [] if [] in found else min(found, key=len)
    if typing.is_typeddict(hint):
        if not isinstance(value, dict):
            return [path]
        hints = typing.get_type_hints(hint, include_extras=True)
        needed = {name for name, kind in hints.items() if typing.get_origin(kind) is not typing.NotRequired}
        wrong = [f"{path}/{name}" for name in (needed - set(value)) | (set(value) - set(hints))]
        return wrong + [
            f for name in set(value) & set(hints) for f in faults(value[name], hints[name], f"{path}/{name}")
        ]
    if origin in (list, dict):
        if not isinstance(value, origin):
            return [path]
        parts = enumerate(value) if origin is list else value.items()
        return [found for key, part in parts for found in faults(part, args[-1], f"{path}/{key}")]
    return [] if isinstance(value, (int, float) if hint is float else hint) else [f"{path}: {value!r}"]


def test_the_payload_is_as_the_schema_says(data):
    assert faults(data, Payload, "") == []
    damaged = {**data, "runs": [{**data["runs"][0], "name": 3}], "more": 1}
    assert set(faults(damaged, Payload, "")) == {"/more", "/runs/0/name: 3"}


def test_the_scripts_document_the_same_types():
    assert (ASSETS / "types.js").read_text(encoding="utf-8") == jsdoc()
    assert "@type {Payload}" in (ASSETS / "core.js").read_text(encoding="utf-8")


def test_no_line_of_the_assets_is_longer_than_120():
    for file in [*ASSETS.glob("*.js"), *ASSETS.glob("*.css")]:
        assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 120, file.name


def of_method(data, name):
    number = next(i for i, method in enumerate(data["methods"]) if method["name"] == name)
    means = next(one for one in data["means"] if one["method"] == number)
    return means, [run for run in data["runs"] if run["method"] == number]


def interval(values):
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def test_means_have_the_interval_of_student_over_runs(data):
    means, runs = of_method(data, "galore")
    for key in ("train_seconds", "validation_loss", "update_norm"):
        values = [run["final"][key] for run in runs]
        found = means["final"][key]
        assert found["n"] == 4
        assert (found["mean"], found["lo"], found["hi"]) == pytest.approx(
            (np.mean(values), *interval(values)), rel=1e-6
        )
    for line, lines in (
        (means["loss"]["eval"], [run["loss"]["eval"] for run in runs]),
        (means["metrics"]["weight_stable_rank"], [run["metrics"]["weight_stable_rank"] for run in runs]),
    ):
        assert line["x"] == lines[0]["x"]
        values = np.array([one["y"] for one in lines])
        assert line["y"] == pytest.approx(values.mean(0), rel=1e-6)
        assert line["lo"] == pytest.approx([interval(column)[0] for column in values.T], rel=1e-5)
        assert line["hi"] == pytest.approx([interval(column)[1] for column in values.T], rel=1e-5)
    task = [run["tasks"]["syntax:acc"][0] for run in runs]
    assert means["tasks"]["syntax:acc"]["lo"] == pytest.approx(interval(task)[0], rel=1e-6)


def test_means_of_curves_and_layers(data):
    means, runs = of_method(data, "fira")
    curve, *curves = (
        next(one for one in entry["curves"]["method_path"] if one["step"] == 200) for entry in (means, *runs)
    )

    def rise(one):
        return np.array(one["y"]) - one["center"] - one["slope"] * np.array(one["t"])

    rises = np.array([rise(one) for one in curves])
    assert rises[:, [0, -1]] == pytest.approx(0, abs=1e-5)
    assert rise(curve) == pytest.approx(rises.mean(0), abs=1e-6)
    assert curve["slope"] == pytest.approx(np.mean([one["slope"] for one in curves]))
    inner = slice(1, -1)
    assert curve["rise_hi"][inner] == pytest.approx([interval(v)[1] for v in rises.T[inner]], rel=1e-3, abs=1e-5)
    assert "slope" not in means["curves"]["random_curve"][-1]
    table = means["metrics"]["weight_stable_rank"]["layers"]
    tables = [run["metrics"]["weight_stable_rank"]["layers"] for run in runs]
    assert table["runs"] == [4] * len(table["steps"])
    values = np.array([one["values"] for one in tables])
    assert np.array(table["values"]) == pytest.approx(values.mean(0), rel=1e-4)
    assert table["lo"][0][0] == pytest.approx(interval(values[:, 0, 0])[0], rel=1e-3)


@pytest.mark.parametrize(
    ("metric", "t", "losses", "found"),
    [
        ("method_path", [0.0, 0.5, 1.0], [3.0, 4.0, 1.0], (3.0, -2.0)),
        ("step_path", [-0.25, 0.0, 0.5, 1.0, 1.25], [9.0, 3.0, 4.0, 1.0, 9.0], (3.0, -2.0)),
        ("random_curve", [-1.0, 0.0, 1.0], [4.0, 3.0, 5.0], (3.0, 0.0)),
        ("method_path", [0.0, 1.0], [None, None], (None, None)),
    ],
)
def test_what_a_rise_is_measured_from(metric, t, losses, found):
    assert floor(metric, t, losses) == found


def test_a_method_of_one_run_has_no_means_and_pairs_of_methods_have_a_barrier(data):
    names = [method["name"] for method in data["methods"]]
    assert {names[means["method"]] for means in data["means"]} == set(METHODS)
    barriers = {(names[one["row"]], names[one["column"]]): one["value"] for one in data["barriers"]}
    assert {column for _, column in barriers} == {"full_rank", "fira"}
    assert barriers["full_rank", "fira"] == barriers["fira", "full_rank"] > 0


def test_the_scripts_hold_no_quantiles():
    for file in ASSETS.glob("*.js"):
        assert not re.search(r"12\.706|1\.96|quantile", file.read_text(encoding="utf-8")), file.name


def test_numbers_of_own_parameters_are_marked(make_run):
    """In trends, curves, planes and means, and nowhere else."""
    runs = load_runs(
        [make_run(f"{m}-seed{seed}", m, seed, activations=True) for m in ("fira", "cola") for seed in (0, 1)]
    )
    found = payload(groups(runs), load_results(None), looks([run.method for run in runs]))
    names = [method["name"] for method in found["methods"]]
    for entry in (*found["runs"], *found["means"]):
        own = names[entry["method"]] == "cola"
        assert ("own" in entry["metrics"]["random_sharpness"]) == own
        assert "own" not in entry["metrics"]["weight_effective_rank"]
        assert all(("own" in curve) == own for curve in entry["curves"]["random_curve"])
        assert "plane" not in entry or ("own" in entry["plane"]) == own
