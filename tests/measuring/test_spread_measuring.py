"""Models over several devices of one process, as far as one device shows it: the hooks, the rows, the refusal."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model

from hf_lowrank.adapters import LowRankConfig, LowRankForCausalLM, SLTrainConfig
from hf_lowrank.errors import UserError
from hf_lowrank.geometry import TokenLoss, activation_similarity, random_curve
from hf_lowrank.measuring import measure
from hf_lowrank.runs.measurements import read_measurements
from hf_lowrank.runs.trajectory import Trajectory

SMALL = {"random": {"draws": 2, "steps": 1}, "pca": {"count": 2, "steps": 1}, "path": {"points": 1}, "sequences": 4}
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def hooked(model):
    """The model with accelerate's hooks on every part, as over several devices."""
    prefix = "lm." if hasattr(model, "lm") else ""
    return dispatch_model(model, dict.fromkeys((prefix + part for part in PARTS), "cpu"), force_hooks=True)


def adapted(run):
    torch.manual_seed(0)
    config = LowRankConfig(base_config=run.config, adapter_config=SLTrainConfig(r=4, sparsity=0.1))
    return LowRankForCausalLM(config).eval()


def test_rows_are_those_of_one_device(two_runs, tmp_path):
    for name, device in (("one", "cpu"), ("auto", "auto")):
        measure(two_runs, steps=10, settings=SMALL, device=device, output=tmp_path / name)
    for run in two_runs:
        rows = read_measurements(tmp_path / "auto" / run.name)
        assert len(rows) > 100
        assert [row.to_line() for row in rows] == [
            row.to_line() for row in read_measurements(tmp_path / "one" / run.name)
        ]


@pytest.mark.parametrize("kind", ["full_rank", "sltrain"])
def test_hooks_change_no_number_and_stay_in_their_place(two_runs, kind):
    run = Trajectory(two_runs[0])
    plain, base = (run.model(10) if kind == "full_rank" else adapted(run)), run.model(0)
    spread = hooked(run.model(10) if kind == "full_rank" else adapted(run))
    assert any("forward" in module.__dict__ for module in spread.modules())
    forwards = {name: module.__dict__.get("forward") for name, module in spread.named_modules()}
    sequences = run.evaluation_set()
    for chunk in (None, 20):
        loss = TokenLoss(sequences.input_ids, sequences.attention_mask, vocabulary_chunk=chunk)
        for memory in ("copy", "low"):
            curves = [
                random_curve(model, loss, offsets=[-0.1, 0, 0.1], draws=2, normalize="filter", memory=memory)
                for model in (plain, spread)
            ]
            assert torch.equal(curves[0].losses, curves[1].losses), (chunk, memory)
            assert {name: module.__dict__.get("forward") for name, module in spread.named_modules()} == forwards
    batches = [(sequences.input_ids, sequences.attention_mask)]
    assert activation_similarity(spread, base, batches) == activation_similarity(plain, base, batches)
    if kind == "sltrain":
        ids = sequences.input_ids[:1]
        for dense in (spread.to_dense(), spread.to_dense(in_place=True)):
            torch.testing.assert_close(dense(ids).logits, plain(ids).logits)


def test_what_does_not_fit_the_accelerators_is_refused(two_runs):
    run = Trajectory(two_runs[0])
    places = dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"}
    with pytest.raises(UserError, match=r"checkpoint-10: in float32 it does not fit .* --sharded"):
        run.model(10, device_map=places)
