"""Modules for the `evaluate` library, each a folder with its card; `path` says where they lie."""

from __future__ import annotations

from pathlib import Path


def path(name: str = "lowrank_geometry") -> str:
    """The folder of a module, for `evaluate.load`.

    Raises:
        ValueError: there is no module of this name.
    """
    folder = Path(__file__).parent / name
    if not (folder / f"{name}.py").is_file():
        there = sorted(p.parent.name for p in Path(__file__).parent.glob("*/*.py") if p.stem == p.parent.name)
        raise ValueError(f"unknown evaluate module {name!r}; there are: {', '.join(there)}")
    return str(folder)
