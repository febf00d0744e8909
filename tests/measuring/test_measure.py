"""Measuring run directories: rows, their agreement with direct computation, resuming, faults."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure, unmeasured
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.measurements import read_measurements
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.checksums import sealed_text, write_checksums

SMALL = {"random": {"draws": 3, "steps": 1}}


def value(rows, metric, step, scope="model"):
    (found,) = [row for row in rows if (row.metric, row.step, row.scope) == (metric, step, scope)]
    return found.value


def test_spectral_rows_agree_with_numpy(two_runs):
    rows = measure(two_runs[1], metrics="spectra,total", settings=SMALL)
    run = Trajectory(two_runs[1])
    means = []
    for name in run.targets:
        weight = run.dense_weight(20, name).double().numpy()
        earlier, first = (run.dense_weight(step, name).double().numpy() for step in (10, 0))
        delta = weight - earlier
        for prefix, matrix in (("weight", weight), ("update", delta)):
            sigma = np.linalg.svd(matrix, compute_uv=False)
            p = sigma / sigma.sum()
            effective = math.exp(-(p * np.log(p)).sum()) / len(p)
            assert value(rows, f"{prefix}_effective_rank", 20, name) == pytest.approx(effective, rel=1e-5)
            stable = (sigma**2).sum() / sigma[0] ** 2
            assert value(rows, f"{prefix}_stable_rank", 20, name) == pytest.approx(stable, rel=1e-5)
            if prefix == "weight":
                gap = (sigma[0] - sigma[1]) / sigma[0]
                assert value(rows, "weight_spectral_gap", 20, name) == pytest.approx(gap, rel=1e-5)
                assert value(rows, "weight_sv_fraction", 20, name) == pytest.approx((sigma > 0.1).mean())
                means.append(effective)
            else:
                norm = np.linalg.norm(matrix) / np.linalg.norm(earlier)
                assert value(rows, "update_norm", 20, name) == pytest.approx(norm, rel=1e-6)
                total = np.linalg.norm(weight - first) / np.linalg.norm(first)
                assert value(rows, "total_update_norm", 20, name) == pytest.approx(total, rel=1e-6)
    assert value(rows, "weight_effective_rank", 20) == pytest.approx(np.mean(means), rel=1e-6)


def test_the_first_checkpoint_has_no_update_and_says_so(two_runs):
    rows = measure(two_runs[0], metrics="update_norm", steps=0)
    assert [row.reason for row in rows] == ["undefined: the first checkpoint has none before it"]


def test_loss_and_random_rows(two_runs):
    rows = measure(two_runs[0], metrics="loss,perplexity,random_sharpness,random_variance", steps=20, settings=SMALL)
    loss = value(rows, "loss", 20)
    assert value(rows, "perplexity", 20) == pytest.approx(math.exp(loss))
    curve = sorted(
        (row.settings["t"], row.value, row.ci_low, row.ci_high) for row in rows if row.metric == "random_curve"
    )
    assert len(curve) == 3
    assert curve[1][:2] == (0, loss)
    (sharpness,) = [row for row in rows if row.metric == "random_sharpness"]
    assert sharpness.value == pytest.approx((curve[0][1] + curve[2][1]) / 2 - loss)
    assert sharpness.ci_low < sharpness.value < sharpness.ci_high
    assert (sharpness.n, sharpness.settings["draws"], sharpness.settings["sequences"]) == (3, 3, 6)


def test_principal_directions_are_the_same_where_spectra_have_decomposed_the_matrices(two_runs, tmp_path):
    """GPT-2 keeps the transposes of its matrices, of which some are square."""
    folder = tmp_path / "gpt2" / "checkpoint-1"
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 80}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    shutil.copyfile(two_runs[0] / "evaluation.safetensors", folder.parent / "evaluation.safetensors")
    found = []
    for metrics in ("pca1_sharpness", "pca1_sharpness,weight_stable_rank"):
        rows = measure(folder.parent, metrics=metrics, output=tmp_path / metrics)
        found.append([row.value for row in rows if row.metric in ("pca1_curve", "pca1_sharpness")])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_what_is_there_is_not_done_again(two_runs):
    first = measure(two_runs[0], metrics="loss,spectra,random", settings=SMALL)
    file = two_runs[0] / "measurements.jsonl"
    content = file.read_bytes()
    assert measure(two_runs[0], metrics="loss,spectra,random", settings=SMALL) == first
    assert file.read_bytes() == content
    other = {"random": {"draws": 4, "steps": 1}}
    measure(two_runs[0], metrics="random_sharpness", settings=other, steps="last")
    draws = [row.n for row in read_measurements(file) if row.metric == "random_sharpness" and row.step == 20]
    assert draws == [3, 4]


def test_a_torn_table_is_completed(two_runs):
    wanted = {"metrics": "loss,random", "settings": SMALL}
    expected = measure(two_runs[0], **wanted)
    file = two_runs[0] / "measurements.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    again = measure(two_runs[0], **wanted)
    assert {row.key: row for row in again} == {row.key: row for row in expected}


def test_a_damaged_checkpoint_is_a_reason_and_the_others_go_on(two_runs):
    weights = two_runs[0] / "checkpoint-10" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-40])
    rows = measure(two_runs[0], metrics="loss,weight_stable_rank,update_norm", settings=SMALL)
    for metric in ("loss", "weight_stable_rank", "update_norm"):
        (bad,) = [row for row in rows if (row.metric, row.step) == (metric, 10)]
        assert math.isnan(bad.value)
        assert "checkpoint-10/model.safetensors" in bad.reason
    assert math.isfinite(value(rows, "loss", 20))
    weights.write_bytes(whole)
    mended = measure(two_runs[0], metrics="loss,weight_stable_rank,update_norm", settings=SMALL)
    values = [row.value for row in mended if row.scope == "model" and row.step]
    assert len(values) == 6
    assert all(math.isfinite(value) for value in values)


def test_steps_and_metrics_are_chosen_or_refused(two_runs):
    assert {row.step for row in measure(two_runs[0], metrics="loss", steps="last")} == {20}
    with pytest.raises(UserError, match=r"step 15; there are: 0, 10, 20"):
        measure(two_runs[0], metrics="loss", steps="15")
    with pytest.raises(UserError, match="weight_stable_rank"):
        measure(two_runs[0], metrics="stable_rank")
    with pytest.raises(UserError, match=r"random\.drawz"):
        measure(two_runs[0], metrics="loss", settings={"random": {"drawz": 3}})
    with pytest.raises(UserError, match="preset"):
        measure(two_runs[0], preset="fastest")


def test_settings_from_yaml(two_runs, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("sequences: 2\nrandom: {draws: 2, steps: 1}\n")
    rows = measure(two_runs[0], metrics="random", settings=file, steps="last")
    assert {row.settings["sequences"] for row in rows} == {2}
    file.write_text("sequences: 0\n")
    with pytest.raises(UserError, match=r"own\.yaml: sequences"):
        measure(two_runs[0], settings=file)


def test_output_goes_elsewhere_when_asked(two_runs, tmp_path):
    measure(two_runs[0], metrics="loss", output=tmp_path / "out")
    assert not (two_runs[0] / "measurements.jsonl").exists()
    lines = (tmp_path / "out" / "full_rank-0" / "measurements.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[0])["run"] == "full_rank-0"


@pytest.mark.parametrize("other", [{"seed": 7}, {"method": "galore"}])
def test_rows_of_another_run_of_that_name_are_not_taken_for_its_own(make_run, tmp_path, other):
    ours, theirs = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", noise_seed=9, **other)
    out = tmp_path / "out"
    both = r"run/measurements\.jsonl: .*/a/run and .*/b/run would both write their rows to it"
    with pytest.raises(UserError, match=both):
        measure([ours, theirs], metrics="loss", output=out)
    assert not out.exists()
    rows = measure([ours, ours], metrics="loss", output=out)
    table = (out / "run" / "measurements.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"another run of that name \(full_rank, seed 0\) than .*/b/"):
        measure(theirs, metrics="loss", output=out)
    assert (out / "run" / "measurements.jsonl").read_bytes() == table
    assert measure(ours, metrics="loss", output=out) == rows[: len(rows) // 2]


@pytest.mark.parametrize("with_checksums", [False, True])
def test_rows_are_of_the_checkpoints_that_are_there(make_run, tmp_path, with_checksums):
    """As two learning rates leave them: names, method, seed, first weights and steps are equal."""
    ours, theirs = (make_run(tmp_path / place / "run", noise_seed=noise) for place, noise in (("a", 1), ("b", 2)))
    for run in (ours, theirs) if with_checksums else ():
        (run / "recipe.yaml").write_text(sealed_text((run / "recipe.yaml").read_text()))
        for checkpoint in run.glob("checkpoint-*"):
            write_checksums(checkpoint)
    out, wanted = tmp_path / "out", {"metrics": "loss,weight_stable_rank"}
    table = out / "run" / "measurements.jsonl"
    rows = measure(ours, output=out, **wanted)
    before = table.read_bytes()
    with pytest.raises(UserError, match=r"run/measurements\.jsonl: its rows of step 10 are not of .*/b/run/check"):
        measure(theirs, output=out, **wanted)
    assert table.read_bytes() == before
    assert measure(shutil.copytree(ours, tmp_path / "c" / "run"), output=out, **wanted) == rows
    # Tables of before, and failures, say nothing about it.
    old = [replace(row, checkpoint=None) for row in rows]
    table.write_text("".join(row.to_line() for row in old))
    assert measure(theirs, output=out, **wanted) == old
    # A run that was trained again where it had been measured: what it was is not done.
    shutil.copy(table.with_name("measurements.jsonl"), theirs)
    assert unmeasured(theirs, **wanted) == []
    (theirs / "measurements.jsonl").write_bytes(before)
    assert {step for step, _ in unmeasured(theirs, **wanted)} == {10, 20}


def test_rows_stay_those_of_weights_that_travelled_without_their_checksums(make_run, tmp_path):
    """As from the Hub, where there are none, with a configuration that was cleaned; or that another tool divided."""
    run = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_text(sealed_text((run / "recipe.yaml").read_text()))
    for checkpoint in run.glob("checkpoint-*"):
        write_checksums(checkpoint)
    rows = measure(run, metrics="loss")
    copy = shutil.copytree(run, tmp_path / "copy" / "run", ignore=shutil.ignore_patterns("checksums.json"))
    (copy / "recipe.yaml").write_text("method: {name: full_rank}\nseed: 0\n")
    for config in copy.glob("*/config.json"):
        config.write_text(config.read_text().replace("{", '{"_name_or_path": "run",', 1))
    assert measure(copy, metrics="loss") == rows
    assert unmeasured(copy, metrics="loss") == []
    for step, other in ((10, 20), (20, 10)):  # under names of their own
        weights = load_file(run / f"checkpoint-{other}" / "model.safetensors")
        folder = copy / f"checkpoint-{step}"
        (folder / "model.safetensors").unlink()
        save_file(weights, folder / "part.safetensors", metadata={"format": "pt"})
        index = {"weight_map": dict.fromkeys(weights, "part.safetensors"), "metadata": {}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Trajectory(copy).fingerprint(10) != Trajectory(copy).fingerprint(20)
    with pytest.raises(UserError, match="its rows of step 10 are not of"):
        measure(copy, metrics="loss")


def test_nothing_is_said_of_a_checkpoint_that_cannot_be_read(make_run, tmp_path):
    """Not even what would need none of it: the first update has none before it."""
    run = make_run(tmp_path / "run", method="galore")
    (run / "recipe.yaml").write_text(sealed_text((run / "recipe.yaml").read_text()))
    for checkpoint in run.glob("checkpoint-*"):
        write_checksums(checkpoint)
    checksums = run / "checkpoint-0" / "checksums.json"
    whole = checksums.read_bytes()
    checksums.write_bytes(b"")
    (row,) = measure(run, metrics="update_norm", steps=0)
    assert row.failed
    assert "checksums.json is unreadable" in row.reason
    checksums.write_bytes(whole)
    (row,) = measure(run, metrics="update_norm", steps=0)
    assert row.reason == "undefined: the first checkpoint has none before it"
    assert row.checkpoint is not None


def test_comparisons_are_with_the_baseline_that_is_given(make_run, two_runs, tmp_path):
    run, wanted = two_runs[1], {"metrics": "activation_cka,loss", "settings": SMALL, "steps": "20"}
    twin = make_run(tmp_path / "other" / two_runs[0].name, noise_seed=5)
    rows = measure(run, baseline=two_runs[0], **wanted)
    table = run / "measurements.jsonl"
    before = table.read_bytes()
    assert unmeasured(run, baseline=twin, **wanted) == [(20, "activation_cka")]
    with pytest.raises(UserError, match=r"rows of step 20 compare with another run named full_rank-0 than .*/other/"):
        measure(run, baseline=twin, **wanted)
    assert measure(run, baseline=twin, **{**wanted, "metrics": "loss"}) == rows
    assert table.read_bytes() == before
    other = measure(run, baseline=twin, output=tmp_path / "out", **wanted)
    assert value(other, "activation_cka", 20) != value(rows, "activation_cka", 20)
    assert measure(run, baseline=two_runs[0], **wanted) == rows


def test_the_table_of_metrics_names_everything(two_runs):
    for metric in METRICS.values():
        assert metric.title
        assert metric.summary.endswith(".")
    with pytest.raises(UserError, match="did you mean"):
        METRICS["random_sharpnes"]
