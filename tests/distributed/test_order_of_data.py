"""The sequences of each step of a stream: the same with any number of workers and processes, straight and resumed."""

import hashlib
import json
import shutil
from functools import partial

import pytest
import torch
import yaml
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from hf_lowrank.training.pretrain import pretrain
from hf_lowrank.training.recipe import load_recipe
from hf_lowrank.training.sequences import train_tokenizer
from tests.distributed.every_method import BATCH, SHAPE, launch
from tests.distributed.sharded_training import launched

STEPS, SAVED = 8, 2
LENGTH = 12


class Seen(TrainerCallback):
    """The sequences that a model trains on in this process."""

    batches: list[torch.Tensor]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        type(self).batches = []

        def note(module, inputs, named):
            if module.training:
                Seen.batches.append(named["input_ids"].clone())

        model.register_forward_pre_hook(note, with_kwargs=True)


def seen(path, run, rank=0, world=1):
    """Trains in this process, one of `world`, to the end; its share of each step, (steps, sequences, tokens)."""
    if world > 1:
        launched(rank, world, on_accelerators=False)
    DEFAULT_CALLBACKS.append(Seen)
    try:
        pretrain(load_recipe(path), run)
    finally:
        DEFAULT_CALLBACKS.remove(Seen)
    return torch.stack(Seen.batches)


@pytest.fixture
def recipe_of(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path / "cache"))
    texts = [f"{number} of {number * 31} documents " * (number % 5) for number in range(120)]
    (tmp_path / "set").mkdir()
    for number in range(3):
        rows = [json.dumps({"text": text}) + "\n" for text in texts[number * 40 : number * 40 + 40]]
        (tmp_path / "set" / f"train-{number}.jsonl").write_text("".join(rows))
    train_tokenizer(texts, 300).save_pretrained(tmp_path / "tokenizer")

    def write(workers, world):
        recipe = {
            "method": {"name": "galore", "rank": 4},
            "model": {"architecture": "llama", **SHAPE},
            "data": {
                "source": "hub", "dataset": str(tmp_path / "set"), "streaming": True, "shuffle_buffer": 20,
                "shape": "packed", "sequence_length": LENGTH, "tokenizer": str(tmp_path / "tokenizer"),
                "evaluation_sequences": 4,
            },
            "training": {
                "max_steps": STEPS, "save_steps": SAVED, "per_device_train_batch_size": BATCH // world,
                "dataloader_num_workers": workers, "use_cpu": True,
            },
        }  # fmt: skip
        path = tmp_path / f"recipe-{workers}-{world}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


def steps_of(path, run, world, folder):
    """A fingerprint of the sequences of each step, in their order over all processes."""
    shares = [seen(path, run)] if world == 1 else launch(partial(seen, path, run), world, folder)
    return [hashlib.sha256(step.numpy().tobytes()).hexdigest() for step in torch.cat(shares, dim=1)]


@pytest.mark.timeout(600)
def test_neither_workers_nor_processes_nor_a_resume_change_it(recipe_of, tmp_path):
    meet = tmp_path / "meet"
    straight = steps_of(recipe_of(0, 1), tmp_path / "straight", 1, meet)
    assert len(set(straight)) == len(straight) == STEPS
    for workers, world in ((1, 1), (4, 1), (0, 2), (1, 2), (4, 2)):
        run = tmp_path / f"run-{workers}-{world}"
        assert steps_of(recipe_of(workers, world), run, world, meet) == straight, (workers, world)
    for step, workers, world in ((2, 4, 1), (4, 0, 2), (6, 1, 2)):
        run = tmp_path / f"run-{workers}-{world}"
        for later in range(step + SAVED, STEPS + 1, SAVED):
            shutil.rmtree(run / f"checkpoint-{later}")
        assert steps_of(recipe_of(workers, world), run, world, meet) == straight[step:], (step, workers, world)
