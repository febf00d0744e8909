"""Modules for the `evaluate` library, each in a folder with its card; `path` gives the folder."""

from pathlib import Path


def path(name: str = "lowrank_geometry") -> str:
    """The folder of a module, for `evaluate.load`.

    Raises:
        ValueError: there is no module of this name.
    """
    folder = Path(__file__).parent / name
    if not (folder / f"{name}.py").is_file():
        names = sorted(p.parent.name for p in Path(__file__).parent.glob("*/*.py") if p.stem == p.parent.name)
        raise ValueError(f"unknown evaluate module {name!r}; there are: {', '.join(names)}")
    return str(folder)
