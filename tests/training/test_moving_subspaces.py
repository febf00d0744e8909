"""LDAdam and COSMOS by a recipe: they learn, are measured and are exported."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lowrank.measuring import measure
from hf_lowrank.runs.export import export
from hf_lowrank.training import load_recipe, pretrain

STEPS = 60
METHODS = {
    "ldadam": {"name": "ldadam", "rank": 8},
    "ldadam_no_feedback": {"name": "ldadam", "rank": 8, "error_feedback": False},
    "cosmos": {"name": "cosmos", "rank": 8, "lr_ratio": 0.3},
}


@pytest.mark.parametrize("method", METHODS)
def test_sixty_steps_learn_more_than_word_frequencies(write_recipe, tmp_path, method):
    path = write_recipe(
        method=METHODS[method],
        training__max_steps=STEPS,
        training__save_steps=STEPS,
        training__learning_rate=0.01,
        training__per_device_train_batch_size=16,
    )
    run = pretrain(load_recipe(path), tmp_path / "run")
    facts = json.loads((run / "facts.json").read_text())
    state = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert all(map(math.isfinite, losses))
    (final,) = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry][-1:]
    assert final < facts["unigram_loss"]

    rows = measure(run, metrics="spectra,random", steps=STEPS, settings={"random": {"draws": 2, "steps": 1}})
    values = {row.metric: row.value for row in rows if row.scope == "model"}
    assert 1 <= values["weight_stable_rank"] <= 32
    assert math.isfinite(values["random_sharpness"])

    weights = load_file(run / f"checkpoint-{STEPS}" / "model.safetensors")
    dense = AutoModelForCausalLM.from_pretrained(export(f"{run}@{STEPS}", tmp_path / "dense"))
    assert type(dense).__module__.startswith("transformers.")
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, weights.get(name, tensor)), name
