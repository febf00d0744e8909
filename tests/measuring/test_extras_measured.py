"""Extras through measure, against independent computation in float64; draws, old rows, and what cannot be measured."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_lowrank import geometry as g
from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure, unmeasured
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.measurements import losses_of_directions, read_measurements
from hf_lowrank.runs.trajectory import Trajectory

RANDOM = {"random": {"draws": 4, "steps": 3}, "pca": {"count": 3, "steps": 2}}
CURVE = {"sequences": 4, "curve": {"steps": 6, "batch": 2, "points": 3}, "path": {"points": 3}}


def rows_of(rows, metric, scope="model"):
    return [row for row in rows if row.metric == metric and row.scope == scope]


def test_random_sharpness_from_the_losses_of_its_draws(two_runs):
    rows = measure(two_runs[0], metrics="random,pca", steps="last", settings=RANDOM)
    (row,) = rows_of(rows, "random_sharpness")
    draws = rows_of(rows, "random_draw")
    offsets, losses = losses_of_directions(draws)
    y = np.array(losses)
    assert y.shape == (4, 7)
    center = rows_of(rows, "random_curve")[3].value
    assert (y[:, 3] == center).all()
    per_draw = (y[:, 4:] + y[:, 2::-1]).mean(1) / 2 - center
    assert row.value == pytest.approx(per_draw.mean(), rel=1e-12)
    assert [draw.value for draw in draws] == pytest.approx(per_draw.tolist(), rel=1e-12)
    (variance,) = rows_of(rows, "random_variance")
    assert variance.value == pytest.approx(y.var(0, ddof=1).mean(), rel=1e-12)
    assert offsets == pytest.approx([r.settings["t"] for r in rows_of(rows, "random_curve")], rel=1e-12)
    curve = g.Curve(*(torch.tensor(one, dtype=torch.float64) for one in (offsets, losses)))
    assert g.random_sharpness(curve).value == pytest.approx(row.value, rel=1e-12)
    directions = rows_of(rows, "pca_direction")
    y = np.array(losses_of_directions(directions)[1])
    per_direction = (y.sum(1) - 5 * y[:, 2]) / 4
    assert rows_of(rows, "pcak_sharpness")[0].value == pytest.approx(per_direction.mean(), rel=1e-9)
    assert rows_of(rows, "pca1_sharpness")[0].value == pytest.approx(per_direction[0], rel=1e-9)
    with pytest.raises(UserError, match="got 2 sweeps"):
        losses_of_directions(draws + directions)
    with pytest.raises(UserError, match="got 0 sweeps"):
        losses_of_directions(rows_of(rows, "random_curve"))


def test_draws_read_back_with_pandas(two_runs):
    import pandas as pd

    measure(two_runs[0], metrics="random", steps="last", settings=RANDOM)
    table = pd.DataFrame(read_measurements(two_runs[0]))
    draws = table[table.metric == "random_draw"]
    (sharpness,) = table[table.metric == "random_sharpness"].value
    assert draws.value.mean() == pytest.approx(sharpness, rel=1e-12)
    losses = np.array(draws.settings.map(lambda settings: settings["losses"]).tolist())
    assert losses.shape == (4, 7)


def test_a_draw_of_other_rounding_replaces_the_earlier_one(two_runs):
    wanted = {"metrics": "random_sharpness", "steps": "last", "settings": RANDOM}
    rows = measure(two_runs[0], **wanted)
    file = two_runs[0] / "measurements.jsonl"
    size = file.stat().st_size
    assert measure(two_runs[0], **wanted) == rows
    assert file.stat().st_size == size
    # As another machine would have measured, and stopped before the last row.
    draws = [
        replace(
            row,
            settings={
                **row.settings,
                "losses": [loss * (1 + 1e-9) for loss in row.settings["losses"]],
                "reach": row.settings["reach"] * (1 + 1e-9),
            },
        )
        for row in rows_of(rows, "random_draw")
    ]
    file.write_text("".join(row.to_line() for row in (*rows_of(rows, "random_curve"), *draws)))
    again = measure(two_runs[0], **wanted)
    assert {row.key: row for row in again} == {row.key: row for row in rows}
    assert losses_of_directions(rows_of(again, "random_draw")) == losses_of_directions(rows_of(rows, "random_draw"))


@pytest.fixture(scope="module")
def curved(tmp_path_factory, make_run):
    folder = tmp_path_factory.mktemp("curved")
    runs = [make_run(folder / "full_rank-0"), make_run(folder / "galore-0", method="galore", noise_seed=2)]
    return *runs, measure(runs, metrics="curved,loss,step_barrier", steps=20, settings=CURVE)


def test_a_curve_is_trained_between_the_models(curved):
    _, _, rows = curved
    ours = [row for row in rows if row.run == "galore-0"]
    (row,) = rows_of(ours, "curved_method_barrier")
    (straight,) = rows_of(ours, "method_barrier")
    assert row.baseline == straight.baseline == "full_rank-0"
    path = {r.settings["t"]: r.value for r in rows_of(ours, "curved_method_path")}
    t = np.array(sorted(path))
    y = np.array([path[position] for position in t])
    ends = [next(r.value for r in rows_of(rows, "loss") if r.run == run) for run in ("galore-0", "full_rank-0")]
    assert [y[0], y[-1]] == pytest.approx(ends, abs=1e-6)
    assert row.value == pytest.approx((y - ((1 - t) * y[0] + t * y[-1])).max(), abs=1e-12)
    (own,) = [r for r in rows_of(rows, "curved_method_barrier") if r.run == "full_rank-0"]
    assert own.reason == "undefined: the run is its own baseline"


def test_a_curve_against_weights_by_hand(curved, tmp_path):
    """The middle point by torch.optim on copies of the weights, the path in float64."""
    full, galore, rows = curved
    run, base = Trajectory(galore), Trajectory(full)
    chosen = run.evaluation_set()
    start, end = ({n: p.detach().clone() for n, p in one.model(20).named_parameters()} for one in (run, base))
    middle = {name: ((start[name] + end[name]) / 2).requires_grad_(True) for name in start}
    model = run.model(20)
    optimizer = torch.optim.Adam(middle.values(), lr=3e-3, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)

    def nll(parameters, ids, mask, dtype=torch.float32):
        cast = {name: value.to(dtype) for name, value in parameters.items()}
        inputs = {"input_ids": ids, "attention_mask": mask}
        logits = torch.func.functional_call(model.to(dtype), cast, (), inputs).logits
        losses = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        counted = (mask[:, 1:] == 1) & (mask[:, :-1] == 1)
        return losses[counted].mean()

    def at(t, parameters):
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t * t
        return {n: a * start[n].to(parameters[n]) + b * parameters[n] + c * end[n].to(parameters[n]) for n in start}

    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 + math.cos(math.pi * step / 6)) / 2
        t = float(torch.rand((), generator=generator, dtype=torch.float64))
        index = [4 + (step * 2 + i) % 2 for i in range(2)]  # four of the six sequences are measured
        optimizer.zero_grad()
        nll(at(t, middle), chosen.input_ids[index], chosen.attention_mask[index]).backward()
        optimizer.step()
    path = {r.settings["t"]: r.value for r in rows_of(rows, "curved_method_path") if r.run == "galore-0"}
    with torch.no_grad():
        exact = {name: value.double() for name, value in middle.items()}
        few = chosen.first(4)
        expected = [float(nll(at(t, exact), few.input_ids, few.attention_mask, torch.float64)) for t in path]
    assert list(path.values()) == pytest.approx(expected, abs=1e-5)


def test_a_curve_needs_sequences_that_are_not_measured(two_runs):
    settings = {"curve": {"batch": 4, "steps": 1}, "sequences": 4}
    rows = measure(two_runs[1], baseline=two_runs[0], metrics="curved", steps=20, settings=settings)
    (row,) = rows_of(rows, "curved_method_barrier")
    assert "batches of 4 sequences that are not measured, there are 2" in row.reason


def test_the_noise_scale_by_numpy(two_runs):
    settings = {"noise": {"batches": 3}}
    given = Trajectory(two_runs[0]).evaluation_set()
    EvaluationSet(given.input_ids % 3, given.attention_mask).save(two_runs[0])  # few tokens: a common gradient
    (row,) = rows_of(measure(two_runs[0], metrics="noise", steps=20, settings=settings), "gradient_noise_scale")
    run = Trajectory(two_runs[0])
    chosen, model = run.evaluation_set(), run.model(20).double().requires_grad_(True)
    gradients = []
    for start in (0, 2, 4):
        ids, mask = chosen.input_ids[start : start + 2], chosen.attention_mask[start : start + 2]
        logits = model(input_ids=ids, attention_mask=mask).logits
        losses = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        loss = losses[(mask[:, 1:] == 1) & (mask[:, :-1] == 1)].mean()
        gradients.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))]).numpy())
    x = np.stack(gradients)
    trace = x.var(0, ddof=1).sum() * 2
    signal = (x.mean(0) ** 2).sum() - x.var(0, ddof=1).sum() / 3
    assert row.value == pytest.approx(trace / signal, rel=1e-4)
    assert (row.n, row.settings["batches"]) == (3, 3)
    assert row.ci_low < row.value < row.ci_high


def test_a_noise_scale_without_signal_says_so(two_runs):
    (row,) = rows_of(measure(two_runs[0], metrics="noise", steps=20, settings={"noise": {"batches": 3}}),
                     "gradient_noise_scale")  # fmt: skip
    assert not row.has_interval
    assert "without one of them the gradient is not told from its noise" in row.reason


def test_a_noise_scale_needs_as_many_sequences_as_batches(two_runs):
    (row,) = rows_of(measure(two_runs[0], metrics="noise", steps=20), "gradient_noise_scale")
    assert row.reason == "noise.batches must be at most the number of sequences, 6, got 8"


def test_the_dimension_of_embeddings_on_a_surface(make_run, tmp_path):
    """Every token once: the embedding output is 2 000 points near a surface of three dimensions."""
    run = make_run(tmp_path / "run", steps=(10,), vocab_size=2000)
    model = Trajectory(run).model(10)
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2000, 3, generator=generator) @ torch.randn(3, 32, generator=generator)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tanh(points))
    model.save_pretrained(run / "checkpoint-10")
    ids = torch.randperm(2000, generator=generator).view(50, 40)
    EvaluationSet(ids, torch.ones_like(ids)).save(run)
    rows = measure(run, metrics="dimension", settings={"sequences": None})
    (embedding,) = rows_of(rows, "intrinsic_dimension", "hidden_states.0")
    assert embedding.value == pytest.approx(3, rel=0.1)
    assert embedding.ci_low < embedding.value < embedding.ci_high
    assert embedding.n == 1800
    layers = [row for row in rows if row.scope != "model"]
    assert [row.scope for row in layers] == [f"hidden_states.{i}" for i in range(3)]
    (mean,) = rows_of(rows, "intrinsic_dimension")
    assert mean.value == pytest.approx(np.mean([row.value for row in layers]))
    assert mean.settings["points"] == 2000
    fewer = measure(run, metrics="dimension", settings={"sequences": None, "dimension": {"points": 500}})
    (embedding,) = [r for r in rows_of(fewer, "intrinsic_dimension", "hidden_states.0") if r.settings["points"] == 500]
    assert embedding.value == pytest.approx(3, rel=0.2)
    assert embedding.n == 450


def test_few_distinct_positions_have_no_dimension(two_runs):
    run = Trajectory(two_runs[0])
    chosen = run.evaluation_set()
    EvaluationSet(torch.zeros_like(chosen.input_ids), chosen.attention_mask).save(two_runs[0])
    rows = measure(two_runs[0], metrics="dimension", steps=20)
    (embedding,) = rows_of(rows, "intrinsic_dimension", "hidden_states.0")
    assert embedding.reason == "undefined: the layer has fewer than 20 distinct positions"


REFERENCES = {name: metric.reference for name, metric in METRICS.items() if metric.reference}


def test_rows_of_earlier_definitions_are_measured_again(two_runs):
    assert set(REFERENCES) >= {"step_barrier", "method_barrier", "update_norm", "total_update_norm"}
    wanted = {"metrics": "step_barrier,method_barrier,update_norm,total_update_norm", "steps": 20, "settings": CURVE}
    rows = measure(two_runs[1], baseline=two_runs[0], **wanted)
    table = two_runs[1] / "measurements.jsonl"
    bare = [{k: v for k, v in row.settings.items() if k != "reference"} for row in rows]
    old = [replace(row, settings=settings, value=7.0) for row, settings in zip(rows, bare, strict=True)]
    table.write_text("".join(row.to_line() for row in old))
    assert {row.metric for row in read_measurements(table)} & set(REFERENCES) == set()
    wanted_names = set(wanted["metrics"].split(","))
    assert set(unmeasured(two_runs[1], baseline=two_runs[0], **wanted)) == {(20, name) for name in wanted_names}
    again = measure(two_runs[1], baseline=two_runs[0], **wanted)
    for name in wanted_names:
        (row,) = rows_of(again, name)
        assert row.value == pytest.approx(rows_of(rows, name)[0].value, rel=1e-6)
        assert row.settings["reference"] == REFERENCES[name]
    assert unmeasured(two_runs[1], baseline=two_runs[0], **wanted) == []


def test_an_evaluation_set_without_a_mask(two_runs, tmp_path):
    chosen = Trajectory(two_runs[0]).evaluation_set()
    bare, masked = tmp_path / "bare.safetensors", tmp_path / "masked.safetensors"
    ids = chosen.input_ids.contiguous()
    save_file({"input_ids": ids}, bare)
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, masked)
    found = [
        measure(two_runs[0], metrics="loss", steps=20, evaluation_set=file, output=tmp_path / file.stem)
        for file in (bare, masked)
    ]
    assert found[0] == found[1]
    assert EvaluationSet.load(bare).fingerprint == EvaluationSet.load(masked).fingerprint
    save_file({"tokens": ids}, bare)
    with pytest.raises(UserError, match=r"bare\.safetensors: not a readable evaluation set"):
        measure(two_runs[0], metrics="loss", evaluation_set=bare)


def test_the_hessian_has_no_interval_but_a_residual(two_runs):
    settings = {"hessian": {"iterations": 3, "probes": 2}}
    (row,) = rows_of(measure(two_runs[0], metrics="hessian_top", steps=20, settings=settings), "hessian_top")
    assert not row.has_interval
    assert row.reason.startswith("residual of Lanczos: ")


def test_a_draw_is_one_short_line(two_runs):
    measure(two_runs[0], metrics="random", steps=20, settings={"random": {"draws": 8, "steps": 12}})
    lines = [line for line in (two_runs[0] / "measurements.jsonl").read_text().splitlines() if "random_draw" in line]
    assert len(lines) == 8
    assert max(map(len, lines)) < 1500
