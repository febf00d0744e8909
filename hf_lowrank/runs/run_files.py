"""The small files of a run as plain data: `recipe.yaml`, `facts.json`, `trainer_state.json` of a checkpoint, and the
results that a study writes next to its runs, such as `prediction.json`.

Every reader raises a `UserError` that names the file where it is damaged.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.formats import finite_number
from hf_lowrank.methods import registered
from hf_lowrank.runs.layout import FACTS, PREDICTION, RECIPE, TRAINER_STATE, has_checksums
from hf_lowrank.storage.checksums import (
    damage_by_checksums,
    read_object,
    read_sealed_text,
    sealed,
    sealed_text,
    unsealed,
)
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import dump_yaml, parse_json, parse_yaml


def read_recipe(run: Path) -> dict[str, Any] | None:
    """The recipe in a run directory, None without one."""
    file = run / RECIPE
    return parse_recipe(file) if file.is_file() else None


def parse_recipe(file: Path) -> dict[str, Any]:
    """The recipe in a file, which may come from the Hub."""
    try:
        recipe = parse_yaml(read_sealed_text(file, required=has_checksums(file.parent)))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{file}: not a readable recipe: {one_line(error)}; remove it, and train again with the run's recipe to "
            "restore it"
        ) from None
    if not isinstance(recipe, dict):
        raise UserError(f"{file}: a recipe must be a mapping of keys to values, got {type(recipe).__name__}")
    return recipe


def write_recipe(run: Path, recipe: dict[str, Any]) -> None:
    """Writes the recipe into a run directory, with its checksum."""
    write_text(run / RECIPE, sealed_text(dump_yaml(recipe)))


def section(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One block of a recipe; empty where it is missing or not a mapping."""
    found = recipe.get(name)
    return found if isinstance(found, dict) else {}


# What a recipe that names no method has in its place, and tables for runs without a recipe.
UNKNOWN = "unknown"
# The folder of a run that is one seed of several.
SEEDED = re.compile(r"(.+)-seed-?\d+$")


def method_by_name(run: str) -> str:
    """What stands for the method of a run whose recipe does not say it: the name of its folder without the seed at its
    end. Nothing else says that such runs repeat one another, and a registered method it is not."""
    seeded = SEEDED.match(run)
    name = seeded[1] if seeded else run
    return f"{name} ({UNKNOWN} method)" if registered(name) else name


def method_of(recipe: Mapping[str, Any]) -> str:
    """The method's name; "unknown" where the recipe does not say."""
    method = recipe.get("method")
    name = method.get("name") if isinstance(method, dict) else method
    return UNKNOWN if name is None else str(name)


def seed_of(recipe: Mapping[str, Any]) -> int | None:
    """The seed; None where the recipe does not say."""
    seed = recipe.get("seed")
    return seed if isinstance(seed, int) else None


def read_facts(run: Path) -> dict[str, Any]:
    """`facts.json`, what training records about the run and its cost; empty where nothing was recorded."""
    try:
        return read_object(run / FACTS) if (run / FACTS).is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{run / FACTS}: damaged: {one_line(error)}; remove it, and the run continues without its record of costs"
        ) from None


def write_facts(run: Path, facts: dict[str, Any]) -> None:
    """Writes the facts of a run, replacing the file in one piece."""
    write_text(run / FACTS, json.dumps(sealed(facts), indent=2) + "\n")


@dataclass(frozen=True)
class TrainerState:
    """What Trainer wrote with a checkpoint: optimizer steps taken, the step at which training ends (None where the
    file does not say), and the log history, one mapping per entry."""

    step: int | None = None
    max_steps: int | None = None
    log: tuple[Mapping[str, Any], ...] = ()

    @property
    def finished(self) -> bool:
        """Whether this is the last step of the training."""
        return self.step is not None and self.max_steps is not None and self.step >= self.max_steps

    def logged(self, key: str) -> dict[int, float]:
        """The finite values of one key by step, in step order; of several entries of a step the last counts."""
        found: dict[int, float] = {}
        for entry in self.log:
            step, value = finite_number(entry.get("step")), finite_number(entry.get(key))
            if step is not None and value is not None:
                found[int(step)] = value
        return dict(sorted(found.items()))

    def loss_at(self, step: int) -> float | None:
        """The evaluation loss at a step, else the training loss last logged up to it, in nats per token."""
        training = [loss for at, loss in self.logged("loss").items() if at <= step]
        return self.logged("eval_loss").get(step, training[-1] if training else None)


def read_trainer_state(checkpoint: Path) -> TrainerState | None:
    """The state in a checkpoint's folder; None where Trainer left none."""
    file = checkpoint / TRAINER_STATE
    damage = damage_by_checksums(checkpoint, [file.name], only_listed=not file.is_file())
    if damage is not None:
        raise UserError(f"{checkpoint}: damaged: {damage}")
    return parse_trainer_state(file) if file.is_file() else None


def parse_trainer_state(file: Path) -> TrainerState:
    """The state in a file of that name."""
    try:
        content = read_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable trainer state: {one_line(error)}") from None
    numbers = (finite_number(content.get(key)) for key in ("global_step", "max_steps"))
    step, max_steps = (None if number is None else int(number) for number in numbers)
    log = content.get("log_history")
    entries = [entry for entry in log if isinstance(entry, Mapping)] if isinstance(log, list) else []
    return TrainerState(step, max_steps, tuple(entries))


def read_result(path: Path, kind: type = dict) -> Any:
    """The content of a file that a stage of a study wrote, a JSON object or list; None where there is no file."""
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        for entry in content if isinstance(content, list) else [content]:
            unsealed(entry if isinstance(entry, dict) else {})
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {one_line(error)}; rerun that stage of the study") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: must hold a JSON {'object' if kind is dict else 'list'}; rerun that stage")
    return content


def read_prediction(path: Path) -> dict[str, Any] | None:
    """A `prediction.json`, or that of a folder, as `hf-lowrank predict` writes it; None without one."""
    return read_result(path / PREDICTION if path.is_dir() else path)
