"""The `evaluate` module, loaded as users do, and its card."""

from __future__ import annotations

import ast
from pathlib import Path

import evaluate
import pytest
import yaml

from hf_lowrank.errors import UserError
from hf_lowrank.evaluate_modules import path
from hf_lowrank.measuring import measure
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.measurements import NOT_DENSE
from tests.measuring.adapted import write_adapted

FAST = {"random": {"draws": 2, "steps": 1}, "pca": {"count": 2, "steps": 1}, "path": {"points": 1}}


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return evaluate.load(path("lowrank_geometry"), cache_dir=str(tmp_path / "cache"))


def test_the_sixteen_of_checkpoints_against_baselines(module, two_runs):
    full, galore = two_runs
    result = module.compute(
        predictions=[f"{galore}/checkpoint-20", f"{galore}/checkpoint-0"],
        references=[f"{full}/checkpoint-20", f"{full}/checkpoint-0"],
        settings=FAST,
    )
    assert list(result) == [*METRICS.sixteen, "reasons", "remarks"]
    assert all(isinstance(result[metric][0], float) for metric in METRICS.sixteen)
    assert result["reasons"][0] == {}
    assert result["remarks"] == [{}, {}]
    assert result["update_norm"][1] is None
    assert "first checkpoint" in result["reasons"][1]["update_norm"]
    rows = measure(galore, baseline=full, metrics="activation_cka", steps=20, settings=FAST)
    assert result["activation_cka"][0] == rows[-1].value
    assert not (full / "measurements.jsonl").exists()


def test_remarks_say_what_is_not_of_dense_weights(module, two_runs, tmp_path):
    full = two_runs[0]
    cola = write_adapted(tmp_path / "cola-0", full, "cola")
    result = module.compute(
        predictions=[f"{cola}/checkpoint-20"],
        references=[f"{full}/checkpoint-20"],
        metrics=["random_sharpness", "step_barrier", "method_barrier", "weight_stable_rank", "activation_cka"],
        settings=FAST,
    )
    (remarks,) = result["remarks"]
    assert remarks.keys() == {"random_sharpness", "step_barrier", "weight_stable_rank"}
    assert remarks["random_sharpness"] == remarks["step_barrier"]
    assert remarks["step_barrier"].startswith(NOT_DENSE)
    assert remarks["weight_stable_rank"].startswith("surrogate")
    assert result["reasons"][0].keys() == {"method_barrier"}


def test_pairs_must_fit(module, two_runs):
    full, galore = two_runs
    with pytest.raises(UserError, match="one step"):
        module.compute(predictions=[f"{galore}/checkpoint-20"], references=[f"{full}/checkpoint-10"])
    with pytest.raises(UserError, match="must name one checkpoint"):
        module.compute(predictions=[str(galore)], references=[str(full)])


def test_card_and_app():
    folder = Path(path("lowrank_geometry"))
    header = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio"
    assert (folder / header["app_file"]).is_file()
    for metric in METRICS.sixteen:
        assert f"`{metric}`" in (folder / "README.md").read_text()
    ast.parse((folder / "app.py").read_text())
    with pytest.raises(ValueError, match="there are: lowrank_geometry"):
        path("other")
