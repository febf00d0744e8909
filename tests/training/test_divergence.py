"""A run whose numbers become non-finite stops, reports it, and saves nothing as a good checkpoint."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from hf_lowrank.errors import DivergedError, UserError
from hf_lowrank.training import load_recipe, pretrain

GALORE = {"method__name": "galore", "method__rank": 4, "method__update_proj_gap": 2}


@pytest.mark.parametrize(("where", "method"), [("loss", {}), ("weights", {}), ("weights", GALORE)])
@pytest.mark.parametrize("step", [1, 5, 6])
def test_it_stops_before_it_saves(write_recipe, tmp_path, monkeypatch, where, method, step):
    path = write_recipe(training__logging_steps=6, **method)
    whole = pretrain(load_recipe(path), tmp_path / "whole")
    compute, calls = Trainer.compute_loss, 0

    def poisoned(self, model, *arguments, **options):
        nonlocal calls
        calls += model.training
        found = compute(self, model, *arguments, **options)
        if not model.training or calls != step:
            return found
        if where == "weights":
            next(model.parameters()).register_hook(lambda grad: grad * torch.nan)
            return found
        return found * torch.nan

    monkeypatch.setattr(Trainer, "compute_loss", poisoned)
    # The package's own optimizers skip the step.
    reasons = (
        r"run: (loss is nan|the weights contain NaN or Inf|the optimizer skipped a non-finite gradient \(.*\)) "
        r"at step \d, which is not saved"
    )
    with pytest.raises(DivergedError, match=reasons):
        pretrain(load_recipe(path), tmp_path / "run")
    saved = {folder.name for folder in (tmp_path / "run").glob("checkpoint-*")}
    assert saved == {"checkpoint-0"} | ({"checkpoint-3"} if step > 3 else set())
    # A temporary fault leaves nothing behind.
    run = pretrain(load_recipe(path), tmp_path / "run")
    one, other = (load_file(folder / "checkpoint-6" / "model.safetensors") for folder in (whole, run))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_non_finite_losses_cannot_be_hidden(write_recipe):
    with pytest.raises(UserError, match=r"training\.logging_nan_inf_filter must be left out; a non-finite loss"):
        load_recipe(write_recipe(training__logging_nan_inf_filter=True))
