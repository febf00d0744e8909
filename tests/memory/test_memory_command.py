"""`hf-lowrank memory`: tables, sentences, and wrong input in one line."""

import json
import shutil
from dataclasses import replace

import pytest

from hf_lowrank.cli import main
from hf_lowrank.formats import byte_size
from hf_lowrank.memory import estimate
from hf_lowrank.memory.compare import compare, verdicts

from .conftest import NANO, TINY

SET = [part for change in TINY for part in ("--set", change)]


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["memory", *map(str, arguments)])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_one_recipe_is_itemised_next_to_full_rank(capsys, tiny):
    status, out, err = run(capsys, NANO / "sltrain.yaml", *SET, "--set", "method.r=8", "--batch-size", 2)
    assert (status, err) == (0, "")
    found = estimate(tiny("sltrain"), batch_size=2, both_activations=True)
    for item in ("weights", "factors", "sparse", "moments", "activations_plain", "activations_checkpointed", "peak"):
        assert byte_size(getattr(found, item)) in out, item
    assert "2 sequences of 32 tokens" in out
    assert "full_rank" in out


def test_one_recipe_as_json(capsys, tiny):
    status, out, err = run(capsys, NANO / "galore.yaml", *SET, "--set", "method.rank=8", "--batch-size", 2, "--json")
    assert (status, err) == (0, "")
    (document,) = json.loads(out)
    (compared,) = compare([tiny("galore")], batch_size=2)
    assert document["peak"] == compared.estimate.peak
    assert document["phases"] == compared.estimate.phases
    assert document["full_rank_peak"] - document["peak"] == document["saved"] == compared.saved
    assert document["verdict"] == compared.verdict


def test_all_methods_in_one_table(capsys, tmp_path):
    for name in ("_base", "full_rank", "cola"):
        shutil.copy(NANO / f"{name}.yaml", tmp_path)
    status, out, _ = run(capsys, tmp_path / "cola.yaml", "--all-methods", *SET, "--world-size", 2)
    assert status == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line.strip().startswith(("full_rank", "cola"))] == [
        "full_rank",
        "cola",
    ]
    assert "100.0%" in out
    assert "each of 2 processes under ddp" in out


def test_full_rank_is_estimated_once_for_recipes_that_share_it(monkeypatch, tiny):
    estimated = []

    def counting(recipe, **options):
        estimated.append(recipe.method.name)
        return estimate(recipe, **options)

    monkeypatch.setattr("hf_lowrank.memory.compare.estimate", counting)
    galore = tiny("galore")
    others = [
        replace(galore, training={**galore.training, **change})
        for change in ({"learning_rate": 0.3, "adam_epsilon": 1e-3, "warmup_steps": 7}, {"max_grad_norm": 1.0})
    ]
    compare([galore, others[0]], batch_size=2)
    assert estimated == ["galore", "full_rank", "galore"]
    estimated.clear()
    compare([galore, others[1]], batch_size=2)
    assert estimated == ["galore", "full_rank", "galore", "full_rank"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--batch-size", "0"], "batch size must be at least 1, got 0"),
        (["--world-size", "-1"], "world size must be at least 1, got -1"),
        (["--sharding", "zero"], "'--sharding': 'zero' is not one of 'ddp', 'fsdp2'"),
        (["--dtype", "int8"], "'--dtype': 'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        (["--device", "abacus"], "got 'abacus'"),
        (["--sequence-length", "999"], "sequence length must be from 2 to model.max_position_embeddings (128)"),
        (["--set", "method.rank=0"], "method.rank"),
        (["--set", "training.max_grad_norm=0", "--set", "method.layerwise=true", "--world-size", "2"], "layerwise"),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, line):
    status, out, err = run(capsys, NANO / "galore.yaml", *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert line in err


def test_a_missing_recipe_or_folder_of_recipes_is_named(capsys, tmp_path):
    status, _, err = run(capsys, tmp_path / "none.yaml")
    assert status == 2
    assert "none.yaml: no such recipe file" in err
    shutil.copy(NANO / "_base.yaml", tmp_path)
    status, _, err = run(capsys, tmp_path / "_base.yaml", "--all-methods")
    assert status == 2
    assert "--all-methods needs recipes" in err


def test_the_verdict_says_why_a_method_does_not_help(tiny):
    # Many tokens, a small model: what passes through the layers is nearly everything.
    (busy,) = compare([tiny("galore", "training.per_device_train_batch_size=32")])
    assert "saves only" in busy.verdict
    assert "activations" in busy.verdict
    assert "gradient checkpointing would keep" in busy.verdict
    # Few tokens, a vocabulary as large as the rest of the model several times.
    changes = ["data.vocabulary_size=20000", "training.gradient_checkpointing=true"]
    (wordy,) = compare([tiny("galore", *changes)], batch_size=1, sequence_length=4)
    assert "embeddings and head" in wordy.verdict
    assert "smaller vocabulary" in wordy.verdict
    # A wide model and few tokens: the state is what counts.
    wide = ["model.hidden_size=512", "model.intermediate_size=1376", "model.num_hidden_layers=1"]
    (helped,) = compare([tiny("galore", *wide)], batch_size=1, sequence_length=4)
    assert helped.verdict.startswith("GaLore saves ")
    assert helped.saved > 0.05 * helped.full_rank.peak
    # One sentence for one reason, also where the baselines' settings differ; another for what needs more.
    others = {name: replace(busy.estimate, method=name) for name in ("fira", "cola", "sst")}
    fira = replace(busy, estimate=others["fira"], full_rank=replace(busy.full_rank))
    phases = {**busy.full_rank.phases, "backward": busy.full_rank.peak + 1}
    larger = [replace(busy, estimate=replace(others[name], phases=phases)) for name in ("cola", "sst")]
    saving, needing = verdicts([busy, larger[0], fira, larger[1]])
    assert saving.startswith("GaLore and Fira save less than 5% of full-rank's ")
    assert needing.startswith("CoLA and SST need more than full-rank's ")


def test_sizes_are_readable():
    sizes = [0, 1023, 1024, 1536, 10 * 1024, 153 * 2**20 + 1, 2**30, 7.5 * 2**40]
    assert [byte_size(size) for size in sizes] == [
        "0 B", "1023 B", "1.00 KiB", "1.50 KiB", "10.0 KiB", "153 MiB", "1.00 GiB", "7 680 GiB",
    ]  # fmt: skip
