"""Run directories: what they contain, who can resume them, and what makes two runs comparable."""

import json
import logging
import re
import shutil
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowrank.cli import main
from hf_lowrank.errors import UserError
from hf_lowrank.runs.checkpoints import last_resumable_checkpoint, why_not_resumable
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.storage.checksums import read_sealed_text, sealed_text
from hf_lowrank.storage.parsing import dump_yaml, parse_yaml
from hf_lowrank.study.checks import saved_steps
from hf_lowrank.training import load_recipe, pretrain
from hf_lowrank.training.sequences import train_tokenizer

METHODS = {
    "full_rank": {"name": "full_rank"},
    "galore": {"name": "galore", "rank": 4, "update_proj_gap": 4},
    "fira": {"name": "fira", "rank": 4, "update_proj_gap": 4},
}


def trained(path, output, *overrides, seed=None):
    return pretrain(load_recipe(path, overrides, seed=seed), output)


def state_of(run, step):
    return json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())


def weights_of(run, step):
    return load_file(run / f"checkpoint-{step}" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def mean_loss(folder, evaluation, dtype=torch.float64):
    """Nats per predicted token, computed by hand in float64 from the logits of the model in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(folder).to(dtype).eval()
    with torch.no_grad():
        logits = model(evaluation.input_ids, attention_mask=evaluation.attention_mask).logits[:, :-1].double()
    nll = -torch.log_softmax(logits, -1).gather(-1, evaluation.input_ids[:, 1:, None])[..., 0]
    mask = evaluation.attention_mask[:, 1:].bool()
    return nll[mask].mean().item()


@pytest.mark.parametrize("shape", ["packed", "documents"])
def test_a_run_directory_contains_what_later_stages_read(write_recipe, texts, tmp_path, shape):
    if shape == "documents":
        # Documents of many lengths, so that a mean over batches is not the mean over tokens.
        for number in range(20):
            (texts / f"held_short{number}.txt").write_text("alpha beta gamma"[: 2 + number])
    run = trained(write_recipe(data__shape=shape, data__evaluation_sequences=2), tmp_path / "run")
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "tokenizer",
        "evaluation.safetensors",
        "facts.json",
        "checkpoint-0",
        "checkpoint-3",
        "checkpoint-6",
    }
    recipe = parse_yaml((run / "recipe.yaml").read_text())
    assert recipe["method"] == {"name": "full_rank", "matrix_lr_scale": None, "target_modules": "auto"}
    assert recipe["training"]["max_steps"] == 6
    assert {"model.safetensors", "config.json"} <= {path.name for path in (run / "checkpoint-0").iterdir()}
    assert not (run / "checkpoint-0" / "trainer_state.json").exists()
    evaluation = EvaluationSet.load(run)
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(run / "checkpoint-0").config.vocab_size
    logged = [entry for entry in state_of(run, 6)["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [3, 6]
    for entry in logged:
        by_hand = mean_loss(run / f"checkpoint-{entry['step']}", evaluation)
        assert entry["eval_loss"] == pytest.approx(by_hand, rel=1e-5)
    losses = [entry for entry in state_of(run, 6)["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in losses] == [1, 2, 3, 4, 5, 6]
    assert all(entry["learning_rate"] > 0 for entry in losses)
    torch.load(run / "checkpoint-6" / "optimizer.pt", weights_only=True)


def test_the_facts_add_up(write_recipe, tmp_path):
    run = trained(write_recipe(training__gradient_accumulation_steps=2), tmp_path / "run")
    facts = json.loads((run / "facts.json").read_text())
    weights = weights_of(run, 0)
    assert facts["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert facts["tokens_seen"] == 6 * 4 * 2 * 16
    assert facts["step"] == 6
    assert facts["wall_seconds"] >= facts["training_seconds"] > 0
    assert facts["cpu_seconds"] > 0
    assert facts["peak_memory_bytes"] > 10**7
    # Two moments a weight in float32, and a step counter a tensor.
    assert facts["optimizer_state_bytes"] == facts["parameters"] * 8 + len(weights) * 4
    assert facts["evaluation_fingerprint"] == EvaluationSet.load(run).fingerprint
    assert facts["unigram_loss"] == pytest.approx(facts["unigram_loss"])
    assert list(facts["progress"]) == ["3", "6"]


def test_training_learns_more_than_word_frequencies(write_recipe, tmp_path):
    path = write_recipe(training__max_steps=150, training__learning_rate=0.01, training__save_steps=150)
    run = trained(path, tmp_path / "run", "training.logging_steps=50", "training.per_device_train_batch_size=16")
    facts = json.loads((run / "facts.json").read_text())
    final = [entry["eval_loss"] for entry in state_of(run, 150)["log_history"] if "eval_loss" in entry][-1]
    assert final < facts["unigram_loss"] - 1.0


def test_one_seed_gives_every_method_the_same_initial_weights_and_data(write_recipe, tmp_path, monkeypatch):
    from hf_lowrank.training import sequences

    seen = {}
    original = sequences.collate

    def recording(rows):
        batch = original(rows)
        seen.setdefault(current, []).append(batch["input_ids"].clone())
        return batch

    monkeypatch.setattr(sys.modules["hf_lowrank.training.pretrain"], "collate", recording)
    starts = {}
    for name, block in METHODS.items():
        for seed in (0, 1):
            current = (name, seed)
            run = trained(write_recipe(method=block), tmp_path / f"{name}-{seed}", seed=seed)
            starts[current] = weights_of(run, 0)
            assert not same(starts[current], weights_of(run, 6))
    for seed in (0, 1):
        for name in METHODS:
            assert same(starts[name, seed], starts["full_rank", seed])
            batches, baseline = seen[name, seed], seen["full_rank", seed]
            assert len(batches) == len(baseline) > 6
            assert all(torch.equal(one, other) for one, other in zip(batches, baseline, strict=True))
    assert not same(starts["full_rank", 0], starts["full_rank", 1])
    # The first train batch differs between seeds, the evaluation batches do not.
    assert not torch.equal(seen["full_rank", 0][0], seen["full_rank", 1][0])
    assert torch.equal(seen["full_rank", 0][-1], seen["full_rank", 1][-1])


def test_the_same_recipe_reproduces_the_same_weights(write_recipe, tmp_path):
    path = write_recipe(method=METHODS["galore"])
    one, other = trained(path, tmp_path / "one"), trained(path, tmp_path / "other")
    assert same(weights_of(one, 6), weights_of(other, 6))


def test_a_finished_run_is_not_touched(write_recipe, tmp_path, caplog, monkeypatch):
    path = write_recipe()
    run = trained(path, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    monkeypatch.setattr("hf_lowrank.training.corpus.cached_folder", None)
    with caplog.at_level(logging.INFO):
        assert trained(path, tmp_path / "run") == run
    assert "finished at step 6" in caplog.text
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def test_the_default_output_is_named_by_recipe_and_seed(write_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trained(write_recipe(name="mine"), None, seed=4)
    assert run.as_posix() == "runs/mine-seed4"
    assert (run / "checkpoint-6").is_dir()


def test_the_last_step_is_saved_whatever_the_intervals(write_recipe, tmp_path):
    path = write_recipe(training__save_steps=4, training__eval_strategy="no")
    assert (trained(path, tmp_path / "a") / "checkpoint-6").is_dir()
    path = write_recipe(training__save_strategy="no", training__eval_strategy="steps")
    run = trained(path, tmp_path / "b")
    assert (run / "checkpoint-6").is_dir()
    assert "eval_loss" in str(state_of(run, 6)["log_history"])


@pytest.mark.parametrize(
    "changes",
    [
        {"training__bf16": True},
        {"training__gradient_checkpointing": True, "training__dataloader_num_workers": 1},
        {
            "model": {"architecture": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16},
            "method": METHODS["galore"],
        },
    ],
    ids=["bf16", "checkpointing", "gpt2"],
)
def test_other_modes_of_trainer_work(write_recipe, tmp_path, changes):
    path = write_recipe(**changes)
    run = trained(path, tmp_path / "run")
    whole = weights_of(run, 6)
    shutil.rmtree(run / "checkpoint-6")
    assert same(weights_of(trained(path, run), 6), whole)


def test_epochs_instead_of_steps(write_recipe, tmp_path):
    path = write_recipe(training__max_steps=None, training__num_train_epochs=0.5, training__save_strategy="no")
    run = trained(path, tmp_path / "run")
    facts = json.loads((run / "facts.json").read_text())
    steps = -(-facts["train_sequences"] // 2 // 4)
    assert abs(facts["step"] - steps) <= 1
    assert trained(path, tmp_path / "run") == run


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["training.learning_rate=1e-4"], "training.learning_rate is 0.0001 now, 0.003 there"),
        (["training.max_steps=9"], "training.max_steps is 9 now, 6 there"),
        (["method={name: galore, rank: 4}"], "method.name is 'galore' now, 'full_rank' there"),
        (["training.warmup_steps=1"], "training.warmup_steps is 1 now, not set there"),
        (["seed=1"], "seed is 1 now, 0 there"),
    ],
)
def test_another_recipes_folder_is_not_touched(write_recipe, tmp_path, overrides, part):
    path = write_recipe()
    trained(path, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    with pytest.raises(UserError, match="belongs to another recipe") as error:
        trained(path, tmp_path / "run", *overrides)
    assert part in str(error.value)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before


def test_a_run_from_before_a_setting_existed_is_the_recipes(write_recipe, tmp_path):
    path = write_recipe(method={"name": "galore", "rank": 4})
    run = trained(path, tmp_path / "run")
    recipe = parse_yaml(read_sealed_text(run / "recipe.yaml"))
    assert recipe["method"].pop("target_parameters") == []
    (run / "recipe.yaml").write_text(sealed_text(dump_yaml(recipe)))
    assert trained(path, run) == run
    with pytest.raises(UserError, match=r"method\.scale is 0\.5 now, 0\.25 there"):
        trained(path, run, "method.scale=0.5")


def test_a_folder_with_other_files_is_not_touched(write_recipe, tmp_path):
    path = write_recipe()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"mine: --output must be a run directory or empty"):
        trained(path, tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: --output must be a folder"):
        trained(path, tmp_path / "file")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_run_does_not_resume_with_a_changed_corpus(write_recipe, texts, tmp_path):
    path = write_recipe()
    run = trained(path, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-6")
    (texts / "train0.txt").write_text("something else entirely")
    with pytest.raises(UserError, match="the corpus has changed since the run started"):
        trained(path, run)
    assert not (run / "checkpoint-6").exists()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"data__train_files": ["nowhere/*.txt"]}, "matches no file"),
        ({"model__vocab_size": 100}, r"tiny\.yaml: model.vocab_size must be at least"),
        ({"model__max_position_embeddings": 8}, "data.sequence_length must be at most model.max_position_embeddings"),
        ({"data__tokenizer": "no/such-tokenizer"}, r"tiny\.yaml: data.tokenizer must be a tokenizer"),
        ({"data__evaluation_sequences": 10**6}, r"tiny\.yaml: data.evaluation_sequences must be at most"),
    ],
)
def test_what_cannot_be_trained_writes_nothing(write_recipe, tmp_path, changes, part):
    path = write_recipe(**changes)
    with pytest.raises(UserError, match=part) as error:
        trained(path, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def cut(file, share=0.6):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


DAMAGES = {
    "model.safetensors is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "model.safetensors: not a complete safetensors file: .*not fully covered": lambda folder: cut(
        folder / "model.safetensors"
    ),
    "optimizer.pt is truncated": lambda folder: cut(folder / "optimizer.pt"),
    "scheduler.pt is missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "rng_state.pth is truncated": lambda folder: cut(folder / "rng_state.pth"),
    "rng_state.pth is missing": lambda folder: (folder / "rng_state.pth").unlink(),
    "trainer_state.json is missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "trainer_state.json: not a readable trainer state": lambda folder: cut(folder / "trainer_state.json"),
    "trainer_state.json says step 3": lambda folder: shutil.copy(
        folder.parent / "checkpoint-3" / "trainer_state.json", folder
    ),
    "model.safetensors: not a complete safetensors file: .*header too small": lambda folder: (
        folder / "model.safetensors"
    ).write_bytes(b"\x00\xff"),
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
}


def test_an_incomplete_checkpoint_is_skipped_with_a_warning(write_recipe, tmp_path, caplog):
    path = write_recipe(method=METHODS["fira"])
    run = trained(path, tmp_path / "run")
    whole = weights_of(run, 6)
    shutil.copytree(run / "checkpoint-6", tmp_path / "kept", ignore=shutil.ignore_patterns("checksums.json"))
    assert last_resumable_checkpoint(run) == run / "checkpoint-6"
    for part, damage in DAMAGES.items():
        shutil.rmtree(run / "checkpoint-6")
        shutil.copytree(tmp_path / "kept", run / "checkpoint-6")
        damage(run / "checkpoint-6")
        assert re.search(part, why_not_resumable(run / "checkpoint-6"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trained(path, run)
    assert "checkpoint-6 is skipped" in caplog.text
    assert same(weights_of(run, 6), whole)
    assert why_not_resumable(run / "checkpoint-6") is None
    with zipfile.ZipFile(run / "checkpoint-6" / "optimizer.pt") as archive:
        assert archive.testzip() is None


def test_a_streamed_run_resumes_where_it_stopped(write_recipe, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    texts = [f"{number} of {number * 31} documents " * (1 + number % 4) for number in range(150)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 300).save_pretrained(tmp_path / "tokenizer")
    path = write_recipe(
        data={
            "source": "hub",
            "dataset": str(folder),
            "streaming": True,
            "shuffle_buffer": 10,
            "sequence_length": 16,
            "shape": "documents",
            "tokenizer": str(tmp_path / "tokenizer"),
            "evaluation_sequences": 4,
        },
        # More than the stream holds: it is read again from its start.
        training__max_steps=30,
        training__save_steps=8,
    )
    run = trained(path, tmp_path / "run")
    whole = weights_of(run, 30)
    shutil.rmtree(run / "checkpoint-30")
    assert same(weights_of(trained(path, run), 30), whole)
    facts = json.loads((run / "facts.json").read_text())
    assert facts["train_sequences"] is None
    assert 2 < facts["unigram_loss"] < 6


def test_an_interrupted_start_is_completed(write_recipe, tmp_path):
    path = write_recipe()
    whole = trained(path, tmp_path / "whole")
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(whole / "recipe.yaml", begun)
    (begun / ".checkpoint-0.making").mkdir()
    run = trained(path, begun)
    assert same(weights_of(run, 0), weights_of(whole, 0))
    assert same(weights_of(run, 6), weights_of(whole, 6))
    assert EvaluationSet.load(run).fingerprint == EvaluationSet.load(whole).fingerprint


def test_the_command_trains_and_names_the_run(write_recipe, tmp_path, capsys):
    path = write_recipe()
    with pytest.raises(SystemExit) as stop:
        main(["train", str(path), "--set", "training.max_steps=3", "--seed", "2", "--output", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert stop.value.code == 0
    assert printed.out == f"run directory: {tmp_path / 'run'}\n"
    assert parse_yaml((tmp_path / "run" / "recipe.yaml").read_text())["seed"] == 2
    with pytest.raises(SystemExit) as stop:
        main(["train", str(path), "--set", "method.name=galor", "--output", str(tmp_path / "other")])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.count("\n") == 1
    assert "did you mean 'galore'" in printed.err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_strategies_by_epoch_follow_the_passes_over_the_text(write_recipe, tmp_path, accumulation):
    path = write_recipe(
        training__max_steps=None,
        training__num_train_epochs=3,
        training__save_steps=None,
        training__save_strategy="epoch",
        training__logging_strategy="epoch",
        training__logging_steps=None,
        training__per_device_train_batch_size=60,
        training__gradient_accumulation_steps=accumulation,
    )
    run = trained(path, tmp_path / "run")
    facts = json.loads((run / "facts.json").read_text())
    sequences, each = facts["train_sequences"], 60 * accumulation
    steps = [-(-epochs * sequences // each) for epochs in (1, 2, 3)]
    assert steps[2] < 3 * -(-sequences // each)  # a step may span two passes
    assert sorted(int(folder.name.split("-")[1]) for folder in run.glob("checkpoint-*")) == [0, *steps]
    history = state_of(run, steps[2])["log_history"]
    for key in ("loss", "eval_loss"):
        assert [entry["step"] for entry in history if key in entry] == steps
    # It is finished, and resumes to the same end.
    before = (run / "facts.json").read_text()
    assert trained(path, run) == run
    assert (run / "facts.json").read_text() == before
    shutil.rmtree(run / f"checkpoint-{steps[2]}")
    whole = trained(path, tmp_path / "whole")
    assert same(weights_of(trained(path, run), steps[2]), weights_of(whole, steps[2]))


@pytest.mark.parametrize(("every", "steps"), [(0.4, [0, 3, 6]), (0.7, [0, 5, 6]), (4, [0, 4, 6])])
def test_a_study_expects_the_steps_that_are_saved(write_recipe, tmp_path, every, steps):
    recipe = load_recipe(write_recipe(training__save_steps=every))
    run = pretrain(recipe, tmp_path / "run")
    assert sorted(int(folder.name.split("-")[1]) for folder in run.glob("checkpoint-*")) == steps
    assert saved_steps(recipe) == steps
