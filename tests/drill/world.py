"""Where drills run: a corpus, a recipe for each method, and the results of calls without faults."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.drill.faults import METHODS
from tests.drill.oracle import snapshot
from tests.drill.processes import Child, Ended, commands
from tests.study.tiny import write_corpus, write_recipe

STEPS, SAVED = 6, 2
METRICS = "loss,perplexity,spectra"
SETTINGS = {"sequences": 4}
TASKS = "pylib_bits_per_byte"


@dataclass
class World:
    """A folder for drills.

    Attributes:
        folder: contains everything.
        references: results of runs without faults, by method, number of processes and whether they are scored.
        operations: the number of file operations of each.
    """

    folder: Path
    references: dict[tuple[str, int, bool], dict[str, Any]] = field(default_factory=dict)
    operations: dict[tuple[str, int, bool], int] = field(default_factory=dict)

    def recipe(self, method: str, processes: int = 1) -> Path:
        return self.folder / f"{method}-{processes}.yaml"

    def reference(self, method: str, processes: int = 1, evaluate: bool = False) -> dict[str, Any]:
        """The result of a run without faults; computed once."""
        from tests.drill.ranks import train_in_ranks

        key = (method, processes, evaluate)
        if key not in self.references:
            place = self.folder / "references" / f"{method}-{processes}-{evaluate}"
            place.mkdir(parents=True)
            if processes > 1:
                for ended in train_in_ranks(self.recipe(method, processes), place, self.folder / "cache"):
                    _check(ended)
            stages = ("train", "measure", "evaluate", "report") if evaluate else ("train", "measure")
            call = lines(self.recipe(method, processes), place, stages[1:] if processes > 1 else stages)
            child = Child(commands(call, lambda: settle(self.folder / "cache")), place)
            _check(child.wait())
            self.references[key] = snapshot(place / "run")
            self.operations[key] = child.operations
        return self.references[key]

    def kept(self, method: str, evaluate: bool) -> Path:
        """The folder of a reference."""
        self.reference(method, 1, evaluate)
        return self.folder / "references" / f"{method}-1-{evaluate}"

    def fresh(self, name: str, *, cached: bool) -> Path:
        """A folder for one drill, with its own cache, filled or empty."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if cached and (self.folder / "cache").is_dir():
            shutil.copytree(self.folder / "cache", place / "cache")
        return place


def make_world(folder: Path) -> World:
    """Writes corpus and recipes, and imports what the forks of this process need."""
    warm_up()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "references", ignore_errors=True)
    write_corpus(folder)
    (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    for method, settings in METHODS.items():
        for processes in (1, 2):
            changes: dict[str, Any] = {
                "method__name": method,
                **{f"method__{key}": value for key, value in settings.items()},
                "model__num_hidden_layers": 1,
                "model__attention_dropout": 0.1,
                "training__max_steps": STEPS,
                "training__save_steps": SAVED,
                "training__logging_steps": 1 + len(method) % 4,
                "training__weight_decay": 0.1,
                "training__per_device_train_batch_size": 4 // processes,
                "data__train_files": [str(folder / "train.txt")],
            }
            write_recipe(folder, folder, "full_rank", f"{method}-{processes}.yaml", **changes)
    return World(folder)


def warm_up() -> None:
    """Imports what calls need, once."""
    import torch

    from hf_lowrank.study.executors import preload
    from hf_lowrank.study.stages import UNIT_TYPES

    torch.set_num_threads(1)
    for kind in UNIT_TYPES.values():
        preload(kind)
    import transformers.models.llama.modeling_llama  # noqa: F401

    from hf_lowrank import cli  # noqa: F401
    from hf_lowrank.memory import recorder  # noqa: F401


def settle(cache: Path) -> None:
    """Gives a forked process its cache, and no memory estimates: they take as long as a run here."""
    from hf_lowrank.memory import recorder

    def unknown(*_: Any, **__: Any) -> None:
        raise NotImplementedError("not in drills")

    os.environ["HF_LOWRANK_CACHE"] = str(cache)
    recorder.estimate = unknown  # type: ignore[assignment]


def lines(recipe: Path, place: Path, stages: tuple[str, ...]) -> list[list[str]]:
    """The command lines of stages for the run of a drill."""
    run = str(place / "run")
    known = {
        "train": ["train", str(recipe), "--output", run],
        "measure": ["measure", run, "--metrics", METRICS, "--settings", str(recipe.parent / "settings.yaml")],
        "evaluate": ["evaluate", run, "--tasks", TASKS, "--limit", "4"],
        "report": ["report", run, "--output", str(place / "report")],
    }
    return [known[stage] for stage in stages]


def _check(ended: Ended | None) -> None:
    if ended is None or ended.status != 0:
        raise RuntimeError(f"a run without faults failed: {ended}")
