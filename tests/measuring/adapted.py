"""Runs of adapted models, made without training: random steps away from one start."""

from __future__ import annotations

import copy

import torch
import yaml
from peft import LoraConfig

from hf_lowrank.adapters import (
    CoLAConfig,
    LowRankConfig,
    LowRankForCausalLM,
    SLTrainConfig,
    SSTConfig,
    StructuredConfig,
)
from hf_lowrank.runs.trajectory import Trajectory

ADAPTERS = {
    "cola": CoLAConfig(r=4),
    "low_rank": CoLAConfig(r=4, bottleneck_act="linear"),
    "sltrain": SLTrainConfig(r=4, sparsity=0.1),
    "structured": StructuredConfig(r=4, blocks=2, structure="block_shuffle"),
    "sst": SSTConfig(r=4),
    "relora": LoraConfig(r=4),
}


def write_adapted(folder, full, method):
    """Checkpoints 0, 10 and 20 of an adapted model of the full-rank run's shape, moved by seeded noise."""
    torch.manual_seed(0)
    base = copy.deepcopy(Trajectory(full).config)
    model = LowRankForCausalLM(LowRankConfig(base_config=base, adapter_config=ADAPTERS[method])).eval()
    generator = torch.Generator().manual_seed(3)
    for step in (0, 10, 20):
        if step:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / f"checkpoint-{step}")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"seed": 0, "method": {"name": method}}))
    Trajectory(full).evaluation_set().save(folder)
    return folder
