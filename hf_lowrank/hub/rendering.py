"""Cards of runs whose weights are not published: a page for each, with its pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hf_lowrank.errors import UserError
from hf_lowrank.hub.cards import model_card
from hf_lowrank.hub.pictures import PICTURES, draw
from hf_lowrank.runs.layout import RECIPE
from hf_lowrank.runs.run_files import read_recipe, section
from hf_lowrank.storage.files import whole_file, write_text

NAME = re.compile(r"\w[\w-]*", re.ASCII)


def render_cards(
    runs: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str], *, license: str | None = None
) -> list[Path]:
    """Writes `folder/METHOD.md` for each run, and its pictures into `folder/METHOD/`; returns the pages in order.

    Where several runs share a method, pages are named after the runs' folders. Existing pages are rewritten; the text
    between the two marks is kept.

    Args:
        runs: run directories.
        folder: created if it does not exist.
        license: of the weights, a Hub identifier; None: that of the existing page, else "unknown".

    Raises:
        UserError: `runs` is empty, or one is not a run directory or is named twice; nothing is written.
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise UserError("runs must name at least one run directory, got none")
    names = _names(folders)
    pictures = {run: draw(run) for run in folders}
    pages = []
    for run, name in zip(folders, names, strict=True):
        page = Path(folder) / f"{name}.md"
        picture_folder = Path(folder) / name
        picture_folder.mkdir(parents=True, exist_ok=True)
        for outdated in PICTURES.keys() - pictures[run].keys():
            (picture_folder / f"{outdated}.png").unlink(missing_ok=True)
        for title, data in pictures[run].items():
            with whole_file(picture_folder / f"{title}.png") as temporary:
                temporary.write_bytes(data)
        previous = page.read_text(encoding="utf-8") if page.is_file() else None
        card = model_card(
            run, None, previous=previous, license=license, pictures=tuple(pictures[run]), picture_folder=name
        )
        write_text(page, card)
        pages.append(page)
    return pages


def _names(runs: Sequence[Path]) -> list[str]:
    """A file name for each run: its method, or its folder where the method is not unique."""
    methods = []
    for run in runs:
        recipe = read_recipe(run)
        if recipe is None:
            raise UserError(f"{run}: must be a run directory, there is no {RECIPE} in it")
        methods.append(str(section(recipe, "method").get("name") or run.resolve().name))
    names = [
        method if methods.count(method) == 1 and NAME.fullmatch(method) else run.resolve().name
        for run, method in zip(runs, methods, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"runs must be of different methods or folder names, got {name} twice; name each run once")
    return names
