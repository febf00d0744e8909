"""Run folders as training and measuring leave them, with invented but plausible numbers and no weights."""

import json
import math
import random
from pathlib import Path

import pytest
import yaml

from hf_lowrank.metrics import METRICS, moves_weights, reference_of

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
    tasks=(),
    width=128,
    memory=None,
    rate=0.01,
    planned=None,
):
    """One run folder; `planned` is its last step when it is finished, `barriers` names the runs that `method_barrier`
    is measured against, `tasks` what was scored."""
    folder = Path(folder)
    draw = random.Random(f"{method} {seed}")
    last = steps[-1]
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text(json.dumps({"hidden_size": width, "num_hidden_layers": blocks}))
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
        "model": {"architecture": "llama", "hidden_size": width},
        "training": {"learning_rate": rate, "max_steps": planned or last},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    facts = {
        "parameters": 1_312_000 * width // 128,
        "unigram_loss": 6.45,
        "evaluation_fingerprint": fingerprint,
        "training_seconds": 61.0 + 10 * draw.random(),
        "wall_seconds": 70.0,
        "peak_memory_bytes": 700 * 2**20 + draw.randrange(2**26),
        "tokens_seen": last * 4096,
        "optimizer_state_bytes": 2_228_792 + draw.randrange(2**20),
        "torch": "2.13.0",
        "progress": {"50": {}},
        "device": "cpu",
        "cpu_seconds": 58.0 + 5 * draw.random(),
    }
    if memory:
        facts["memory"] = memory
    (folder / "facts.json").write_text(json.dumps(facts))
    if measured:
        rows = measured_rows(folder.name, method, seed, steps, blocks, draw, loss, activations, barriers)
        (folder / "measurements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if tasks:
        scores = scored_rows(folder.name, method, seed, steps, draw, loss, tasks)
        (folder / "downstream.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    return folder


def scored_rows(run, method, seed, steps, draw, loss, tasks):
    """Rows of `downstream.jsonl`; guessing is right half of the time in the first task, one time in four elsewhere."""
    for step in steps:
        age = step / steps[-1]
        for number, task in enumerate(tasks):
            chance = 0.5 if number == 0 else 0.25
            value = chance + (1 - chance) * age * (0.55 - 0.08 * number - 0.1 * (loss - 3)) + 0.02 * draw.gauss(0, 1)
            yield {
                "run": run, "method": method, "seed": seed, "step": step, "task": task, "metric": "acc",
                "value": value, "stderr": 0.02, "ci_low": value - 0.04, "ci_high": value + 0.04, "n": 200,
                "chance": chance, "higher_is_better": True, "group": None, "task_version": "1",
                "lm_eval_version": "0.4", "items": "abc", "cut": 0, "limit": None,
            }  # fmt: skip
        yield {
            "run": run, "method": method, "seed": seed, "step": step, "task": "bits", "metric": "bits_per_byte",
            "value": 3.0 - age, "stderr": None, "ci_low": None, "ci_high": None, "n": 50, "chance": None,
            "higher_is_better": False, "group": None, "task_version": "1", "lm_eval_version": "0.4", "items": "b",
            "cut": 0, "limit": None,
        }  # fmt: skip


def fake_study(folder, methods, *, word="plain"):
    """What a study writes next to its runs, with `word` wherever text from outside can appear."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)

    def detail(label, centre):
        return {"label": label, "effect": centre, "ci_low": centre - 0.05, "ci_high": centre + 0.06,
                "p_value": 0.0123, "n": 5, "unit": "nats", "part": ""}  # fmt: skip

    claims = [
        {"id": "random_sharpness", "statement": f"Full-rank is sharper along random directions ({word})",
         "verdict": verdict, "effect": centre, "ci_low": centre - 0.02, "ci_high": centre + 0.02, "unit": "nats",
         "p_value": p, "n": 5, "test": f"Paired by seed ({word}).", "reason": f"all comparisons agree ({word})",
         "sentence": f"It rises by so much ({word}).", "details": [detail(m, centre + 0.02 * i)
                                                                     for i, m in enumerate([*methods[1:], word])]}
        for verdict, centre, p in (
            ("reproduced", 0.12, 0.0004), ("contradicted", -0.2, 0.01), ("undecided", 0.01, 0.4),
        )
    ]  # fmt: skip
    claims.append({"id": "rank_structure", "statement": "Ranks differ", "verdict": "undecided", "effect": None,
                   "ci_low": None, "ci_high": None, "unit": "", "p_value": None, "n": 0, "details": [
                       detail("whole", 0.1) | {"part": word, "verdict": "reproduced", "reason": word}]})  # fmt: skip
    (folder / "claims.json").write_text(json.dumps({"claims": claims, "alpha": 0.05}))
    seen = [0.2 + 0.02 * i + 0.02 * draw.gauss(0, 1) for i in range(40)]
    answer = {
        "methods": 8, "runs": 8, "checkpoints": 40, "reason": None, "r2_perplexity": 0.61, "r2_both": 0.7,
        "spearman_perplexity": 0.8, "spearman_both": 0.84, "gain": 0.09, "gain_low": -0.02, "gain_high": 0.2,
        "p_value": 0.07, "coefficients": [{"name": word, "mean": 0.02, "spread": 0.01}],
        "ranking": [{"metric": word, "r2_alone": 0.4, "gain": 0.03, "spearman": None}],
        "observed": seen, "predicted_perplexity": [v + 0.05 * draw.gauss(0, 1) for v in seen],
        "predicted_both": [v + 0.03 * draw.gauss(0, 1) for v in seen],
        "rows": [[f"runs/{methods[i // 5 % len(methods)]}-seed0", 50 * (i % 5)] for i in range(40)],
    }  # fmt: skip
    refused = {"methods": 8, "runs": 0, "checkpoints": 0, "reason": f"too few runs of {word}", "gain": None}
    prediction = {"unseen_method": answer, "unseen_run": refused, "notes": [f"left out: {word}"]}
    (folder / "prediction.json").write_text(json.dumps(prediction))
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    sweep = [
        {"member": method, "learning_rate": rate, "loss": 3.4 + 0.2 * (i - place % 4) ** 2, "chosen": i == place % 4,
         "at_edge": place % 4 in (0, 3), "run": "x"}
        for place, method in enumerate([*methods, word]) for i, rate in enumerate(rates)
    ]  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(sweep))
    (folder / "failures.json").write_text(
        json.dumps([{"what": word, "stage": "train", "reason": f"no memory {word}"}])
    )
    return folder


def space_of(method, metric, settings):
    """CoLA's own parameters are moved, the dense weights of the others."""
    if not moves_weights(metric):
        return {}
    if method != "cola":
        return {"settings": {**settings, "space": "dense"}}
    reason = "not dense: moves the model's own parameters" if metric in METRICS else None
    return {"settings": {**settings, "space": "parameters"}, "reason": reason}


def measured_rows(run, method, seed, steps, blocks, draw, loss, activations, barriers):
    def row(
        step, metric, value, scope="model", low=None, high=None, n=None, baseline=None, settings=None, reason=None
    ):
        settings = {**(settings or {}), **reference_of(metric)}
        return {
            "run": run, "method": method, "seed": seed, "step": step, "metric": metric, "scope": scope,
            "value": value, "ci_low": low, "ci_high": high, "n": n, "baseline": baseline,
            "settings": settings, "reason": None,
        } | space_of(method, metric, settings)  # fmt: skip

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
                height = here + 4 * peak * a * (1 - a) + (0.1 + 0.05 * seed) * a
                yield row(step, "method_path", height, baseline=other, settings={"t": a})


@pytest.fixture
def make_run(tmp_path):
    """Makes a run folder under the test's own folder: `make_run(name, method, seed, …)`."""

    def make(name, method="galore", seed=0, **how):
        return fake_run(tmp_path / name, method, seed, **how)

    return make


@pytest.fixture
def make_study():
    return fake_study
