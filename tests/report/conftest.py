"""Run folders as training and measuring leave them, with invented but plausible numbers and no weights."""

import json
import math
import random
from pathlib import Path

import pytest
import yaml

KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SPECTRAL = {
    "weight_effective_rank": 0.86,
    "weight_stable_rank": 21.0,
    "weight_spectral_gap": 0.08,
    "weight_sv_fraction": 0.93,
    "update_norm": 0.09,
    "update_effective_rank": 0.35,
    "update_stable_rank": 3.1,
}
ACTIVATIONS = {"activation_l2": 0.45, "activation_cosine": 0.83, "activation_cka": 0.9}


def fake_run(
    folder,
    method="galore",
    seed=0,
    *,
    loss=3.4,
    steps=(0, 50, 100, 150, 200),
    blocks=4,
    fingerprint="ab" * 32,
    measured=True,
    activations=False,
    barriers=(),
):
    """One run folder; `barriers` names the runs that `method_barrier` is measured against."""
    folder = Path(folder)
    draw = random.Random(f"{method} {seed}")
    last = steps[-1]
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")
    log = []
    for step in range(5, last + 1, 5):
        down = loss + 4.2 * math.exp(-5 * step / last)
        log.append({"loss": down + draw.gauss(0, 0.03), "learning_rate": 1e-3, "step": step})
        if step % (last // 10) == 0:
            log.append({"eval_loss": loss if step == last else down, "eval_runtime": 0.2, "step": step})
    (folder / f"checkpoint-{last}" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    recipe = {
        "method": {"name": method, "rank": 32},
        "seed": seed,
        "model": {"architecture": "llama", "hidden_size": 128},
        "training": {"learning_rate": 0.01, "max_steps": last},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    facts = {
        "parameters": 1_312_000,
        "unigram_loss": 6.45,
        "evaluation_fingerprint": fingerprint,
        "training_seconds": 61.0 + 10 * draw.random(),
        "wall_seconds": 70.0,
        "peak_memory_bytes": 700 * 2**20 + draw.randrange(2**26),
        "tokens_seen": last * 4096,
        "optimizer_state_bytes": 2_228_792 + draw.randrange(2**20),
        "torch": "2.13.0",
        "progress": {"50": {}},
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    if measured:
        rows = measured_rows(folder.name, method, seed, steps, blocks, draw, loss, activations, barriers)
        (folder / "measurements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def measured_rows(run, method, seed, steps, blocks, draw, loss, activations, barriers):
    def row(
        step, metric, value, scope="model", low=None, high=None, n=None, baseline=None, settings=None, reason=None
    ):
        return {
            "run": run, "method": method, "seed": seed, "step": step, "metric": metric, "scope": scope,
            "value": value, "ci_low": low, "ci_high": high, "n": n, "baseline": baseline,
            "settings": settings or {}, "reason": None,
        }  # fmt: skip

    character = 0.7 + 0.6 * random.Random(method).random()
    layers = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in KINDS]
    for step in steps:
        age = step / steps[-1]
        radius = {"radius": 0.3, "relative": True, "steps": 6, "draws": 8, "seed": 0}
        sharp = (0.08 + 0.12 * age) * character
        yield row(step, "random_sharpness", sharp, low=sharp * 0.93, high=sharp * 1.07, n=8, settings=radius)
        yield row(step, "random_variance", sharp**2 / 50, low=sharp**2 / 60, high=sharp**2 / 40, n=8, settings=radius)
        unit = 0.078 + 0.004 * draw.random()
        here = loss + 4.2 * math.exp(-5 * age)
        for place in range(-6, 7):
            x = place / 6 * 0.3
            rise = here + 22 * sharp * x * x + 2 * sharp * x**3
            width = 0.02 + 0.5 * abs(x) * sharp
            yield row(
                step,
                "random_curve",
                rise,
                low=rise - width,
                high=rise + width,
                n=8,
                settings={**radius, "t": x * unit},
            )
        if activations and step == steps[-1]:
            for i in range(-5, 6):
                for j in range(-5, 6):
                    height = here + sharp * (i * i + 2 * j * j + i * j) / 25
                    yield row(step, "random_plane", height, settings={"x": i / 5, "y": j / 5})
        for metric, level in SPECTRAL.items():
            if metric.startswith("update") and step == steps[0]:
                continue
            values = []
            for index, scope in enumerate(layers):
                depth = index // len(KINDS) / blocks
                drift = 1 - 0.25 * age * character + 0.1 * depth * age
                value = level * drift * (1 + 0.02 * draw.gauss(0, 1)) * (1 - 0.06 * (index % len(KINDS)))
                values.append(value)
                yield row(step, metric, value, scope=scope)
            yield row(step, metric, sum(values) / len(values))
        if activations and method != "full_rank":
            for metric, level in ACTIVATIONS.items():
                values = []
                for block in range(blocks + 1):
                    share = 1 - (1 - level) * age * character * (0.3 + block / blocks)
                    values.append(share if metric != "activation_l2" else 1.1 - share)
                    yield row(step, metric, values[-1], scope=f"hidden_states.{block}", baseline="full_rank")
                yield row(step, metric, sum(values) / len(values), baseline="full_rank")
        for other in barriers:
            peak = age * (0.4 + 0.8 * draw.random())
            yield row(step, "method_barrier", peak, baseline=other)
            for place in range(11):
                a = place / 10
                yield row(step, "method_path", here + 4 * peak * a * (1 - a), baseline=other, settings={"t": a})


@pytest.fixture
def make_run(tmp_path):
    """Makes a run folder under the test's own folder: `make_run(name, method, seed, …)`."""

    def make(name, method="galore", seed=0, **how):
        return fake_run(tmp_path / name, method, seed, **how)

    return make
