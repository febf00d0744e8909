"""Ten steps of each method with each of Trainer's options that change how a model is computed, next to the plain run.

    python benchmarks/trainer_options.py [--methods NAMES] [--options NAMES] [--out DIR]

Outcomes: `equal`, the losses are those of the reference within the option's tolerance; `different`; `refused` before
the first step, with the line that names what is wrong; `failed` for anything else. The reference is the run without
the option, for `packed_documents` one in which each document has a sequence of its own. `accumulation` splits each
step in two, which changes nothing but the rounding: how much of a difference that alone makes to a method. Pairs that
the result file holds already are skipped, and each new one is written at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
import yaml
from _common import RESULTS, machine, versions
from safetensors import safe_open

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.methods import METHODS
from hf_lowrank.storage.files import write_text
from hf_lowrank.training import load_recipe, pretrain
from hf_lowrank.training.sequences import collate

STEPS, LENGTH = 10, 32
NAME = "trainer_options"
# Small settings, by the names that methods have for them.
SETTINGS = {
    "rank": 4,
    "r": 4,
    "update_proj_gap": 4,
    "restart_every": 4,
    "restart_warmup_steps": 1,
    "redraw_every": 4,
    "redraw_warmup_steps": 1,
    "blocks": 2,
}
MODEL = {
    "architecture": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
TRAINING = {
    "learning_rate": 0.003,
    "max_steps": STEPS,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "save_steps": STEPS,
    "logging_steps": 1,
}


@dataclass(frozen=True)
class Option:
    """An option, as overrides of a recipe.

    Attributes:
        tolerance: relative, of the first loss, which the option alone determines.
        later: of all losses, which ten steps of a method have moved.
        alone: whether the reference computes each document alone.
    """

    overrides: tuple[str, ...]
    tolerance: float
    later: float
    alone: bool = False


OPTIONS = {
    "accumulation": Option(
        ("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"), 1e-6, 1e-3
    ),
    "eager": Option(("model.attn_implementation=eager",), 1e-6, 1e-3),
    "sdpa": Option(("model.attn_implementation=sdpa",), 0.0, 0.0),
    "flex_attention": Option(("model.attn_implementation=flex_attention",), 1e-5, 1e-3),
    "packed_documents": Option(("data.shape=packed_documents",), 1e-5, 1e-3, alone=True),
    "liger": Option(("training.use_liger_kernel=true",), 1e-5, 1e-3),
    "compile": Option(("training.torch_compile=true",), 1e-5, 1e-3),
}


def write_corpus(folder: Path) -> dict[str, Any]:
    """Documents of one to forty words, of which a sequence holds several; the recipe's `data:` block."""
    generator = random.Random(0)
    words = ["".join(generator.choice("abcdefgh") for _ in range(3)) for _ in range(40)]
    for name, count in (("train", 300), ("held_out", 40)):
        texts = (" ".join(generator.choices(words, k=generator.randint(1, 40))) for _ in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = {"train_files": [str(folder / "train.jsonl")], "held_out_files": [str(folder / "held_out.jsonl")]}
    return {"source": "files", **files, "sequence_length": LENGTH, "vocabulary_size": 300, "evaluation_sequences": 12}


def write_recipe(folder: Path, method: str, data: dict[str, Any]) -> Path:
    fields = METHODS[method].settings.model_fields
    settings = {key: value for key, value in SETTINGS.items() if key in fields}
    if method == "apollo_mini":
        del settings["rank"]  # one
    recipe = {"method": {"name": method, **settings}, "model": MODEL, "data": data, "training": TRAINING}
    file = folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def collate_alone(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """`collate`, with each document of a packed sequence in a sequence of its own, padded."""
    alone = []
    for row in rows:
        length = len(row["ids"])
        starts = np.flatnonzero(row["positions"] == 0).tolist() if "positions" in row else [0]
        for start, stop in pairwise([*starts, length]):
            ids = np.zeros(length, dtype=np.int64)
            ids[: stop - start] = row["ids"][start:stop]
            alone.append({"ids": ids, "length": stop - start if "positions" in row else row["length"]})
    return collate(alone)


@contextmanager
def documents_alone() -> Iterator[None]:
    """Lets runs compute each document of a packed sequence alone."""
    module = sys.modules["hf_lowrank.training.pretrain"]
    known = module.collate
    module.collate = collate_alone
    try:
        yield
    finally:
        module.collate = known


@dataclass(frozen=True)
class Trained:
    """A run.

    Attributes:
        losses: of the ten steps, then of the evaluation.
        names: of the tensors of its checkpoint.
    """

    losses: list[float]
    names: set[str]

    @classmethod
    def by(cls, file: Path, run: Path, *overrides: str) -> Trained:
        pretrain(load_recipe(file, overrides), run)
        checkpoint = run / f"checkpoint-{STEPS}"
        history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        losses = [entry[key] for key in ("loss", "eval_loss") for entry in history if key in entry]
        with safe_open(checkpoint / "model.safetensors", framework="pt") as tensors:
            return cls(losses, set(tensors.keys()))


class Matrix:
    """Methods with options; a method's reference runs are kept.

    Args:
        folder: for corpora, recipes and runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = write_corpus(folder)
        self._references: dict[tuple[str, bool], Trained] = {}

    def reference(self, method: str, *, alone: bool) -> Trained:
        if (method, alone) not in self._references:
            file = write_recipe(self._folder, method, self._data)
            run = Path(tempfile.mkdtemp(dir=self._folder)) / "run"
            if alone:
                with documents_alone():
                    found = Trained.by(file, run, *OPTIONS["packed_documents"].overrides)
            else:
                found = Trained.by(file, run)
            self._references[method, alone] = found
        return self._references[method, alone]

    def attempt(self, method: str, option: Option) -> dict[str, Any]:
        """The outcome of a pair, with the relative differences of the first and of all losses."""
        file = write_recipe(self._folder, method, self._data)
        run = Path(tempfile.mkdtemp(dir=self._folder)) / "run"
        try:
            found = Trained.by(file, run, *option.overrides)
        except UserError as error:
            return {"outcome": "failed" if run.exists() else "refused", "reason": str(error)}
        expected = self.reference(method, alone=option.alone)
        if len(found.losses) != STEPS + 1:
            return {"outcome": "failed", "reason": f"{len(found.losses)} losses instead of {STEPS + 1}"}
        if found.names != expected.names:
            other = min(found.names ^ expected.names)
            return {"outcome": "failed", "reason": f"only one of both checkpoints has the tensor {other}"}
        differences = [abs(one - other) / other for one, other in zip(found.losses, expected.losses, strict=True)]
        equal = differences[0] <= option.tolerance and max(differences) <= option.later
        return {"outcome": "equal" if equal else "different", "first": differences[0], "all": max(differences)}


def table_of(results: dict[str, dict[str, Any]], options: list[str]) -> str:
    """A Markdown table of the largest relative differences."""
    lines = [f"| method | {' | '.join(options)} |", f"|---|{'---|' * len(options)}"]
    for method, found in results.items():
        cells = [_cell(found[option]) if option in found else "" for option in options]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any]) -> str:
    return f"{found['outcome']} {found['all']:.0e}" if "all" in found else found["outcome"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--options", default=",".join(OPTIONS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    file = args.out / f"{NAME}.json"
    content: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(device),
        "options": {name: asdict(option) for name, option in OPTIONS.items()},
        "results": {},
    }
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if all(before[key] == json.loads(json.dumps(content[key])) for key in ("versions", "options")):
            content["results"] = before["results"]
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_LOWRANK_CACHE"] = f"{temporary}/cache"
        matrix = Matrix(Path(temporary))
        for method in args.methods.split(","):
            results = content["results"].setdefault(method, {})
            for name in args.options.split(","):
                if results.get(name, {}).get("outcome") not in (None, "failed"):
                    continue
                try:
                    found = matrix.attempt(method, OPTIONS[name])
                except Exception as error:
                    found = {"outcome": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}
                results[name] = {
                    key: value.replace(temporary, "") if isinstance(value, str) else value
                    for key, value in found.items()
                }
                print(f"{method} {name}: {results[name]}"[:300], flush=True)
                write_text(file, json.dumps(content, indent=1) + "\n")
                write_text(file.with_suffix(".md"), table_of(content["results"], list(OPTIONS)))
    print(table_of(content["results"], list(OPTIONS)))
    print(dict(Counter(pair["outcome"] for of in content["results"].values() for pair in of.values())))


if __name__ == "__main__":
    main()
