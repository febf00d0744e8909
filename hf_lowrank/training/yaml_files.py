"""Recipe files as plain data: YAML, `extends`, and `--set` overrides, with the origin of every key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_lowrank.errors import UserError
from hf_lowrank.storage.parsing import parse_yaml


@dataclass
class Layers:
    """Merged recipe data, and which file (or `--set`) said each key.

    Attributes:
        path: the recipe file that was asked for.
        data: the merged mapping, without `extends`.
        origins: dotted key of each leaf to the file or the override that set it last.
    """

    path: Path
    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """Who said `key` or something below or above it, else the recipe file."""
        for known, source in self.origins.items():
            if known == key or known.startswith(key + ".") or key.startswith(known + "."):
                return source
        return str(self.path)

    def lay(self, data: dict[str, Any], source: str) -> None:
        """Merges `data` over what is there."""
        _merge(self.data, data)
        for key in _leaves(data):
            # A value may take the place of a mapping, or the other way round.
            for known in [known for known in self.origins if known.startswith(key + ".")]:
                del self.origins[known]
            self.origins[key] = source


def read_layers(path: str | Path, overrides: Iterable[str] = (), *, folder: Path = Path()) -> Layers:
    """Reads a recipe file, the files it extends below it, and `key=value` overrides above it.

    Paths to files inside `data:` count from the folder of the recipe file that names them; in overrides, from
    `folder`, the current one unless told. They come out absolute.

    Raises:
        UserError: a file is missing, unreadable, no YAML mapping, or extends itself; an override is no `key=value`.
    """
    layers = Layers(Path(path))
    for file, data in reversed(_chain(Path(path))):
        _absolute_paths(data, file.parent)
        layers.lay(data, str(file))
    for override in overrides:
        layers.lay(_parse_override(override, folder), f"--set {override}")
    return layers


def _chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    chain: list[tuple[Path, dict[str, Any]]] = []
    visited: list[Path] = []
    following: Path | None = path
    while following is not None:
        resolved = following.resolve()
        if resolved in visited:
            raise UserError(f"{following}: extends must not lead back to itself: " + _circle(visited, resolved))
        visited.append(resolved)
        data = _read_mapping(following, named_by=chain[-1][0] if chain else None)
        parent = data.pop("extends", None)
        chain.append((following, data))
        if parent is None:
            return chain
        if not isinstance(parent, str):
            raise UserError(f"{following}: extends must be one file name, got {parent!r}")
        following = following.parent / parent
    return chain


def _circle(visited: list[Path], again: Path) -> str:
    return " -> ".join(file.name for file in [*visited[visited.index(again) :], again])


def _read_mapping(path: Path, named_by: Path | None) -> dict[str, Any]:
    where = f"{named_by}: extends: " if named_by else ""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{where}{path}: there is no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}{path}: not readable: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}{path}: a recipe must be a mapping of keys to values, got {type(data).__name__}")
    return data


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or str(error).splitlines()[0]}{place}"


def _parse_override(override: str, folder: Path) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set must be key=value, as method.rank=32, got {override!r}")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {_one_line(error)}") from None
    data: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        data = {part: data}
    _absolute_paths(data, folder)
    return data


def _absolute_paths(data: dict[str, Any], folder: Path) -> None:
    section = data.get("data")
    if not isinstance(section, dict):
        return
    for key in ("train_files", "held_out_files"):
        names = section.get(key)
        if isinstance(names, str):
            names = [names]
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            section[key] = [str((folder / Path(name).expanduser()).absolute()) for name in names]
    tokenizer = section.get("tokenizer")
    # A Hub id and a relative path look alike; what is on disk decides.
    if isinstance(tokenizer, str) and (folder / Path(tokenizer).expanduser()).is_dir():
        section["tokenizer"] = str((folder / Path(tokenizer).expanduser()).absolute())


def _merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value


def _leaves(data: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in data.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return keys
