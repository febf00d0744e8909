"""The held-out text of a run, as its recipe splits it off."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError

PACKAGES = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Source:
    """One held-out document: a file of the standard library by its relative path, or a numbered local document."""

    name: str
    text: str


def held_out_sources(recipe: dict[str, Any] | None, run: str) -> list[Source]:
    """The held-out documents of a run, in a fixed order.

    Args:
        recipe: the run's resolved recipe, of which only the `data` block is read.
        run: the run's name, for messages.

    Raises:
        UserError: there is no recipe, the corpus is on the Hub (its text is not on this machine), or the text cannot
            be read.
    """
    # Training's own rule for splitting the corpus keeps training text out of the items.
    from hf_lowrank.training.recipe import DataSettings
    from hf_lowrank.training.sources import local_files

    if not recipe or not isinstance(recipe.get("data"), dict):
        raise UserError(f"{run}: has no recipe.yaml with a data block, so its held-out text is unknown")
    data = DataSettings.model_validate(recipe["data"])
    if data.source == "python-library":
        return list(_library(data.held_out_share))
    if data.source == "files":
        documents = local_files(data.train_files or [], data.held_out_files, data.held_out_share, data.text_column)
        return [Source(f"document {number}", text) for number, text in enumerate(documents.held_out())]
    raise UserError(
        f"{run}: tasks made from held-out text need data.source python-library or files, the run has {data.source}"
    )


def _library(share: float) -> Iterator[Source]:
    """The held-out files of the standard library, by the rule of `training.sources.python_library`."""
    from hf_lowrank.training.sources import is_held_out

    root = Path(sysconfig.get_path("stdlib"))
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in PACKAGES]
        names.extend((Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py"))
    for name in sorted(names):
        if is_held_out(name, share):
            try:
                text = (root / name).read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # training skips these files too
            if text:
                yield Source(name, text)
