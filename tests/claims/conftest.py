"""Runs of a simulated study: tables and recipes without weights, with effects that were put there."""

import json

import numpy as np
import pytest
import yaml

METHODS = ("full_rank", "galore", "fira", "cola")
LAYERS = 5
STEPS = (0, 100, 200, 300)
EVALUATION = {"evaluation": "ab" * 8, "sequences": 16}
BARRIER = {**EVALUATION, "reference": "chord"}
LAST = STEPS[-1]


class Simulation:
    """What a simulated study contains; a test changes an attribute or replaces a rule."""

    def __init__(self, seeds=5, methods=METHODS):
        self.seeds, self.methods = range(seeds), methods
        self.random = {"full_rank": 0.30, "galore": 0.22, "fira": 0.20, "cola": 0.15}
        self.pca = {"full_rank": 0.10, "galore": 0.14, "fira": 0.15, "cola": 0.20}
        self.loss = {"full_rank": 3.30, "galore": 3.36, "fira": 3.33, "cola": 3.42}
        self.score = {"full_rank": 0.30, "galore": 0.42, "fira": 0.36, "cola": 0.26}
        self.barrier = 0.8
        self.far = {"galore": 0.3, "fira": 0.5, "cola": 0.7}
        self.depth, self.course = 0.4, 0.3
        self.weights = {"full_rank": 1.0, "galore": 0.9, "fira": 0.92, "cola": 0.5}
        self.updates = {"full_rank": 1.0, "galore": 0.5, "fira": 0.7, "cola": 0.6}
        self.noise = 0.02
        self.keep = lambda row: True
        self.not_dense = {}  # by method: why its sharpness is of its own parameters

    def rows(self, method, seed):
        draw = np.random.default_rng([METHODS.index(method), seed])
        shared = np.random.default_rng(seed).normal(0, 0.1)  # what a seed does to every method

        def jitter(scale=1.0):
            return float(draw.normal(0, self.noise * scale))

        def row(step, metric, value, scope="model", baseline=None, settings=EVALUATION, reason=None):
            return {
                "run": f"{method}-seed{seed}", "method": method, "seed": seed, "step": step, "metric": metric,
                "scope": scope, "value": value, "ci_low": None, "ci_high": None, "n": None, "baseline": baseline,
                "settings": settings, "reason": reason,
            }  # fmt: skip

        for step in STEPS:
            age = step / LAST
            decline = 4 * np.exp(-4 * age) + shared * 0.2
            yield row(step, "loss", self.loss[method] + decline + jitter(0.3))
            for metric, level in (("random_sharpness", self.random), ("pca1_sharpness", self.pca)):
                value = level[method] * float(np.exp(shared + jitter())) * (0.5 + age / 2)
                why = self.not_dense.get(method)
                space = {"space": "parameters" if why else "dense"}
                yield row(step, metric, value, settings=EVALUATION | space, reason=why)
            for part, level in (("weight", self.weights), ("update", self.updates)):
                known = {} if part == "weight" else {"from_step": step - 100 if step else None}
                if part == "update" and not step:
                    yield row(0, "update_effective_rank", None, settings=known, reason="undefined: the first one")
                    continue
                for kind, height in (("effective", 0.8), ("stable", 20.0)):
                    value = height * level[method] * float(np.exp(shared + jitter(0.2)))
                    yield row(step, f"{part}_{kind}_rank", value, settings=known)
            if method == "full_rank":
                yield row(step, "activation_l2", None, reason="undefined: the run is its own baseline")
                own = "undefined: the run is its own baseline"
                yield row(step, "method_barrier", None, reason=own, settings=BARRIER)
                continue
            base = f"full_rank-seed{seed}"
            layers = [
                self.far[method] * (1 + shared) + self.depth * i / (LAYERS - 1) + self.course * age + jitter()
                for i in range(LAYERS)
            ]
            for i, value in enumerate(layers):
                yield row(step, "activation_l2", value, scope=f"hidden_states.{i}", baseline=base)
            yield row(step, "activation_l2", float(np.mean(layers)), baseline=base)
            if method == "cola":
                why = "undefined: the layers are not linear and have no dense weights to interpolate"
                yield row(step, "method_barrier", None, reason=why, settings=BARRIER)
                continue
            for other in self.methods[: self.methods.index(method)]:
                value = self.barrier * age + shared * 0.2 + jitter()
                yield row(step, "method_barrier", value, baseline=f"{other}-seed{seed}", settings=BARRIER)
                yield row(step, "method_path", 9.0, baseline=base, settings={**EVALUATION, "t": 0.5})

    def scores(self, method, seed):
        draw = np.random.default_rng([7, METHODS.index(method), seed])
        for step in STEPS:
            for task, chance in (("pylib_cloze", 0.25), ("pylib_syntax", 0.5)):
                above = self.score[method] * step / LAST + float(draw.normal(0, self.noise / 4))
                for metric, value in (("acc", chance + above * (1 - chance)), ("greedy", 0.1)):
                    yield {
                        "run": f"{method}-seed{seed}", "method": method, "seed": seed, "step": step, "task": task,
                        "metric": metric, "value": value, "stderr": 0.02, "ci_low": 0.2, "ci_high": 0.5, "n": 600,
                        "chance": chance if metric == "acc" else None, "higher_is_better": True, "group": None,
                        "task_version": "1.0", "lm_eval_version": "0.4.13", "items": f"{task}-items", "cut": 0,
                        "limit": None,
                    }  # fmt: skip

    def write(self, folder):
        """The run folders."""
        runs = []
        for method in self.methods:
            for seed in self.seeds:
                run = folder / f"{method}-seed{seed}"
                run.mkdir(parents=True)
                (run / "recipe.yaml").write_text(yaml.safe_dump({"method": {"name": method}, "seed": seed}))
                (run / "facts.json").write_text(json.dumps({"evaluation_fingerprint": "ab" * 32}))
                kept = [row for row in self.rows(method, seed) if self.keep(row)]
                (run / "measurements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
                kept = [row for row in self.scores(method, seed) if self.keep(row)]
                (run / "downstream.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
                runs.append(run)
        return runs


@pytest.fixture
def simulation():
    return Simulation()


@pytest.fixture
def prediction(tmp_path):
    """Writes a `prediction.json`, as `hf-lowrank predict` does."""

    def write(unseen_run=None, **changes):
        answer = {
            "methods": 8, "runs": 20, "checkpoints": 60, "reason": None, "r2_perplexity": 0.4, "r2_both": 0.6,
            "gain": 0.2, "gain_low": 0.1, "gain_high": 0.3, "p_value": 0.005,
            "ranking": [{"metric": "update_norm", "gain": 0.15}],
        }  # fmt: skip
        content = {"unseen_method": {**answer, **changes}, "unseen_run": {**answer, **(unseen_run or {})}}
        path = tmp_path / "prediction.json"
        path.write_text(json.dumps(content))
        return path

    return write
