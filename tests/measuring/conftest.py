"""Tiny run directories, made without training: initial weights and a few random steps away from them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank.runs.evaluation_set import EvaluationSet

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 80,
}


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).eval()


def write_run(folder, *, method="full_rank", seed=0, steps=(0, 10, 20), noise_seed=1, **changes):
    """A run directory whose checkpoints move away from one initial model by seeded noise."""
    model = tiny_llama(seed, **changes)
    generator = torch.Generator().manual_seed(noise_seed)
    folder.mkdir(parents=True)
    for step in steps:
        if step:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / f"checkpoint-{step}")
        if step:
            state = {"global_step": step, "log_history": [{"step": step, "loss": 4.0}]}
            (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"seed": seed, "method": {"name": method}}))
    ids = torch.randint(0, SHAPE["vocab_size"], (6, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    EvaluationSet(ids, mask).save(folder)
    return folder


@pytest.fixture(scope="session")
def make_run():
    """`write_run`, for tests that need runs of their own."""
    return write_run


@pytest.fixture(scope="session")
def _runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return (
        write_run(folder / "full_rank-0"),
        write_run(folder / "galore-0", method="galore", noise_seed=2),
    )


@pytest.fixture
def two_runs(_runs, tmp_path):
    """(full-rank run, GaLore run), fresh copies."""
    return tuple(shutil.copytree(run, tmp_path / run.name) for run in _runs)
