"""YAML files in layers: `extends` below, `--set` overrides above, and which of them set each key."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import yaml

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.storage.parsing import parse_yaml

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)


@dataclass
class Layers:
    """A merged mapping, and the source (a file or an override) of each key.

    Attributes:
        path: the file that was asked for.
        data: the merged mapping, without `extends`.
        origins: dotted key of each leaf to the file or override that set it last.
    """

    path: Path
    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """The source of `key`, or of a key below or above it; the file itself if none is known."""
        for known, source in self.origins.items():
            if known == key or known.startswith(key + ".") or key.startswith(known + "."):
                return source
        return str(self.path)

    def lay(self, data: dict[str, Any], source: str) -> None:
        """Merges `data`, which comes from `source`, over the present mapping."""
        _merge(self.data, data)
        for key in _leaves(data):
            # A value may replace a mapping, or a mapping a value.
            for known in [known for known in self.origins if known.startswith(key + ".")]:
                del self.origins[known]
            self.origins[key] = source


def read_layers(
    path: str | Path,
    overrides: Iterable[str] = (),
    *,
    what: str,
    resolve_paths: Callable[[dict[str, Any], Path], None],
    folder: Path = Path(),
) -> Layers:
    """Reads a YAML file, the files it extends (below it) and `key=value` overrides (above it).

    Args:
        path, what: the file, and what it is, for messages: "recipe", "study".
        overrides: `key=value`, with a dotted key and a YAML value.
        resolve_paths: makes the relative paths in a layer's mapping absolute, in place, given the folder they are
            relative to: that of the layer's file, or `folder` for overrides.

    Raises:
        UserError: a file is missing, unreadable, not a YAML mapping, or extends itself, or an override is malformed.
    """
    layers = Layers(Path(path))
    for file, data in reversed(_chain(Path(path), what)):
        resolve_paths(data, file.parent)
        layers.lay(data, str(file))
    for override in overrides:
        data = _parse_override(override)
        resolve_paths(data, folder)
        layers.lay(data, f"--set {override}")
    return layers


def validated(
    model: type[Model], data: dict[str, Any], layers: Layers, section: str = "", *, also_allowed: Iterable[str] = ()
) -> Model:
    """`data`, the value of the dotted key `section` in `layers` or all of it, as a pydantic model.

    `also_allowed` are further keys to suggest when an unknown one is found.

    Raises:
        UserError: one line for the first error, naming the source, the key and what is allowed.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    path: list[str] = []
    block: type[BaseModel] = model
    value: Any = data
    # pydantic's location continues with union branches and list indices.
    for part in first["loc"]:
        if not isinstance(value, dict) or part not in value:
            break
        path.append(str(part))
        if first["type"] != "extra_forbidden" or len(path) < len(first["loc"]):
            block = _block(_types(block).get(path[-1])) or block
        value = value[part]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        path.append(str(first["loc"][-1]))
        raise UserError(f"{layers.path}: {'.'.join([section, *path]).strip('.')} is missing")
    if not path:  # an error about several keys starts with the one to change
        raise UserError(f"{layers.origin(message.split()[0])}: {message}")
    key = ".".join([section, *path]).strip(".")
    where = layers.origin(key)
    if first["type"] == "extra_forbidden":
        raise UserError(f"{where}: unknown key {key!r}; {nearest(path[-1], {*_types(block), *also_allowed})}")
    if first["type"] != "value_error":
        message = message[:1].lower() + message[1:]
    if "got " not in message and not isinstance(first["input"], dict):
        message += f", got {first['input']!r}"
    raise UserError(f"{where}: {key}{' ' if message.startswith('must') else ': '}{message}")


def _types(block: type[BaseModel]) -> dict[str, Any]:
    """The annotation of each key of a block, by the name that is written."""
    return {known.alias or name: known.annotation for name, known in block.model_fields.items()}


def _block(annotation: Any) -> type[BaseModel] | None:
    """The block that a field holds, alone or as a value of a mapping."""
    if hasattr(annotation, "model_fields"):
        return cast("type[BaseModel]", annotation)
    return next((block for inner in get_args(annotation) if (block := _block(inner)) is not None), None)


def _chain(path: Path, what: str) -> list[tuple[Path, dict[str, Any]]]:
    """The file and those it extends, from the top layer down."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    visited: list[Path] = []
    following: Path | None = path
    while following is not None:
        resolved = following.resolve()
        if resolved in visited:
            names = " -> ".join(file.name for file in [*visited[visited.index(resolved) :], resolved])
            raise UserError(f"{following}: extends must not lead back to itself: {names}")
        visited.append(resolved)
        data = read_mapping(following, what, named_by=chain[-1][0] if chain else None)
        parent = data.pop("extends", None)
        chain.append((following, data))
        if parent is not None and not isinstance(parent, str):
            raise UserError(f"{following}: extends must be one file name, got {parent!r}")
        following = None if parent is None else following.parent / parent
    return chain


def read_mapping(path: Path, what: str, named_by: Path | None = None) -> dict[str, Any]:
    """A YAML file that holds a mapping, else a `UserError`; `named_by` is the file that extends it."""
    where = f"{named_by}: extends: {path}" if named_by else f"{path}"
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{where}: no such {what} file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not readable: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: a {what} file must be a mapping of keys to values, got {type(data).__name__}")
    return data


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    position = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or str(error).splitlines()[0]}{position}"


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set must be key=value, e.g. method.rank=32, got {override!r}")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {_one_line(error)}") from None
    data: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        data = {part: data}
    return data


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
