"""Runs that are killed at random times end with the bits of uninterrupted ones."""

import json
import multiprocessing
import random
import shutil
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from hf_lowrank.errors import UserError
from hf_lowrank.storage.checksums import write_checksums
from hf_lowrank.training import load_recipe, pretrain
from hf_lowrank.training.pretrain import RunTrainer

METHODS = {
    "full_rank": {"name": "full_rank"},
    "two_rates": {"name": "full_rank", "matrix_lr_scale": 0.25},
    "galore": {"name": "galore", "rank": 4, "update_proj_gap": 7},
    # The interval of settled subspaces is lengthened at steps 5, 6, 8, …: every checkpoint is inside some.
    "q_galore": {"name": "q_galore", "rank": 4, "update_proj_gap": 1},
    "fira": {"name": "fira", "rank": 4, "update_proj_gap": 7},
    "normuon": {"name": "normuon"},
    "dion": {"name": "dion", "rank": 4, "matrix_lr_scale": 5.0},
    "dion2": {"name": "dion2", "fraction": 0.4},
    "ldadam": {"name": "ldadam", "rank": 4},
    "cosmos": {"name": "cosmos", "rank": 4},
}
STEPS, EVERY = 40, 5


@pytest.fixture(scope="module")
def processes():
    """A server that imports once and forks a fresh process for each run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_lowrank.training", "transformers.models.llama.modeling_llama"])
    return context


def train_in_process(path, output):
    torch.set_num_threads(1)
    pretrain(load_recipe(path), output)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_with_the_same_bits(write_recipe, tmp_path, processes, method):
    path = write_recipe(
        method=METHODS[method],
        # Dropout draws from torch's generator at each step: it must continue too.
        model__attention_dropout=0.1,
        training__max_steps=STEPS,
        training__save_steps=EVERY,
        training__weight_decay=0.1,
        training__warmup_steps=5,
        training__lr_scheduler_type="cosine",
    )
    whole = pretrain(load_recipe(path), tmp_path / "whole")
    run = tmp_path / "killed"
    steps_at_kill = []
    for _ in range(2):
        process = processes.Process(target=train_in_process, args=(path, run))
        process.start()
        _wait_for_progress(run, process)
        time.sleep(random.uniform(0, 0.15))
        process.kill()
        process.join(60)
        steps_at_kill.append(_last_step(run))
    assert EVERY <= steps_at_kill[0] < STEPS, steps_at_kill
    pretrain(load_recipe(path), run)

    for step in (0, *range(EVERY, STEPS + 1, EVERY)):
        one, other = (load_file(folder / f"checkpoint-{step}" / "model.safetensors") for folder in (whole, run))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), (steps_at_kill, step, name)
    _assert_equal(*(torch.load(f / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True) for f in (whole, run)))
    logs = [_eval_losses(folder) for folder in (whole, run)]
    assert logs[0] == logs[1]
    facts = json.loads((run / "facts.json").read_text())
    assert facts["step"] == STEPS
    assert [int(step) for step in facts["progress"]] == list(range(EVERY, STEPS + 1, EVERY))
    seconds = [costs["training_seconds"] for costs in facts["progress"].values()]
    assert seconds == sorted(seconds)


MIXTURE = {"architecture": "mixtral", "num_local_experts": 4, "num_key_value_heads": 2}
GALORE = {"name": "galore", "rank": 4, "update_proj_gap": 2}


@pytest.mark.parametrize(
    ("method", "model", "stored"),
    [
        ({"name": "full_rank"}, {"architecture": "gpt_neox"}, "embed_out"),
        ({"name": "full_rank"}, MIXTURE, "experts.3"),
        ({**GALORE, "target_parameters": ["experts.down_proj"]}, MIXTURE, "experts.3"),
        ({"name": "cola", "r": 4}, MIXTURE, "experts.3"),
    ],
)
def test_weights_stored_under_other_names_are_resumed(write_recipe, tmp_path, method, model, stored):
    """transformers stores e.g. a mixture's experts one by one, and Trainer would reinitialise them."""
    path = write_recipe(method=method, **{f"model__{key}": value for key, value in model.items()})
    whole = pretrain(load_recipe(path), tmp_path / "whole")
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-6")
    pretrain(load_recipe(path), run)
    one, other = (load_file(folder / "checkpoint-6" / "model.safetensors") for folder in (whole, run))
    assert any(stored in name for name in one)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_adapters_of_peft_are_left_to_trainer(tiny_llama, tmp_path):
    """A method of another package may build one."""
    model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "checkpoint-1")
    (adapter,) = [p for name, p in model.named_parameters() if "0.self_attn.q_proj.lora_B" in name]
    before = adapter.detach().clone()
    with torch.no_grad():
        adapter.zero_()
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    RunTrainer(model=model, args=args)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert torch.equal(adapter, before)


def test_a_checkpoint_with_missing_weights_is_refused(write_recipe, tmp_path):
    run = pretrain(load_recipe(write_recipe()), tmp_path / "run")
    shutil.rmtree(run / "checkpoint-6")
    weights = run / "checkpoint-3" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    write_checksums(weights.parent)
    with pytest.raises(UserError, match=r"checkpoint-3: cannot resume: .* do not contain model\.norm\.weight"):
        pretrain(load_recipe(write_recipe()), run)


def _last_step(run):
    return max((int(folder.name.rpartition("-")[2]) for folder in run.glob("checkpoint-*")), default=0)


def _wait_for_progress(run, process):
    """Waits until the run has made progress."""
    begun, until = _last_step(run), time.monotonic() + 120
    while _last_step(run) < begun + EVERY:
        if not process.is_alive():
            return
        assert time.monotonic() < until
        time.sleep(0.002)


def _eval_losses(run):
    state = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [(entry["step"], entry["eval_loss"]) for entry in state["log_history"] if "eval_loss" in entry]


def _assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        for left, right in zip(one, other, strict=True):
            _assert_equal(left, right)
    elif torch.is_tensor(one):
        assert torch.equal(one, other)
    else:
        assert one == other
