"""Recipes of a tiny model for every method, and real training steps to compare estimates with."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_lowrank.methods import METHODS
from hf_lowrank.training import load_recipe

NANO = Path(__file__).parents[2] / "recipes" / "nano"
TINY = (
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "data.sequence_length=32",
    "data.vocabulary_size=500",
    "training.per_device_train_batch_size=4",
    "training.per_device_eval_batch_size=2",
)


@pytest.fixture
def tiny():
    """The nano recipe of a method, with a smaller model and `key=value` changes."""

    def load(method, *changes):
        rank = {"apollo_mini": (), "muon": (), "normuon": (), "dion2": (), "full_rank": ()}
        key = "r" if "r" in METHODS[method].settings.model_fields else "rank"
        own = rank.get(method, (f"method.{key}=8",))
        return load_recipe(NANO / f"{method}.yaml", [*TINY, *own, *changes])

    return load


class Training:
    """A recipe's model and optimizer in memory, stepped by a plain loop without hf_lowrank.memory."""

    def __init__(self, recipe, dtype=torch.float32):
        self.args = recipe.arguments(NANO)
        self.vocabulary, self.length = recipe.data.vocabulary_size, recipe.data.sequence_length
        torch.manual_seed(0)
        self.model = recipe.method.build_model(
            recipe.config(vocab_size=self.vocabulary), recipe.settings, recipe.seed
        ).to(dtype)
        self.model.train()
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.optimizer = recipe.method.optimizer(self.model, recipe.settings, self.args)
        if self.optimizer is None:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind([p for p in self.model.parameters() if p.requires_grad], **options)

    def loss(self):
        ids = torch.randint(self.vocabulary, (self.args.per_device_train_batch_size, self.length))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            return self.model(input_ids=ids, labels=ids).loss

    def step(self):
        self.loss().backward()
        if self.args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        gradients = size_of(p.grad for p in self.model.parameters())
        self.optimizer.step()
        self.model.zero_grad()
        return gradients


def size_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@pytest.fixture
def training():
    return Training
