"""`recipe.yaml` of a run directory, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs.checkpoints import has_checksums
from hf_lowrank.runs.layout import RECIPE
from hf_lowrank.storage.checksums import read_sealed_text, sealed_text
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import dump_yaml, parse_yaml


def read_recipe(run: Path) -> dict[str, Any] | None:
    """The recipe in a run directory, None without one.

    Raises:
        UserError: it is damaged, or is not a mapping.
    """
    file = run / RECIPE
    return parse_recipe(file) if file.is_file() else None


def parse_recipe(file: Path) -> dict[str, Any]:
    """The recipe in a file, wherever it came from.

    Raises:
        UserError: it is damaged, or is not a mapping.
    """
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


def method_of(recipe: Mapping[str, Any]) -> str:
    """The method's name; "unknown" where the recipe does not say."""
    method = recipe.get("method")
    name = method.get("name") if isinstance(method, dict) else method
    return "unknown" if name is None else str(name)


def seed_of(recipe: Mapping[str, Any]) -> int | None:
    """The seed; None where the recipe does not say."""
    seed = recipe.get("seed")
    return seed if isinstance(seed, int) else None
