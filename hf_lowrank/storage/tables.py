"""Tables on disk: JSON lines, appended atomically and readable after a crash, as dataclasses with checked types."""

from __future__ import annotations

import codecs
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.storage.checksums import SEAL, sealed, unsealed
from hf_lowrank.storage.parsing import parse_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BLOCK = 65536
RowType = TypeVar("RowType")


def read_table(
    path: str | os.PathLike[str],
    name: str,
    parse: Callable[[Any], RowType],
    key: Callable[[RowType], Any],
    what: str,
    command: str,
) -> list[RowType]:
    """The rows of a table of JSON lines, the last one of each key, in file order; none without a file.

    A torn last line, as a killed writer leaves it, is skipped.

    Args:
        path: the table, or the folder with it.
        name: the table's name in a folder.
        parse: makes a row from a parsed line; raises ValueError, TypeError, KeyError or AttributeError.
        key: of a row.
        what, command: for messages: what a row is, and the command that writes it ("measurement", "measure").

    Raises:
        UserError: the file cannot be read, a complete line is not a row, or the rest after the last one is not the
            beginning of one; names the line.
    """
    file = Path(path)
    file = file / name if file.is_dir() else file
    if not file.exists():
        return []
    try:
        *lines, rest = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    rows: dict[Any, RowType] = {}
    for number, line in enumerate([*lines, rest], start=1):
        try:
            if number > len(lines) and not _is_row(line):
                _check_torn(line)
            elif line.strip():
                row = parse(parse_json(line))
                rows.pop(key(row), None)
                rows[key(row)] = row
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            fault = one_line(error) + (" is missing" if isinstance(error, KeyError) else "")
            raise UserError(
                f"{file}: line {number} is not a valid {what}: {fault}; remove it and the lines after it, and rerun "
                f"`hf-lowrank {command}`"
            ) from None
    return list(rows.values())


def append_rows(path: str | os.PathLike[str], rows: Iterable[DataclassInstance], what: str) -> None:
    """Appends rows in one synced write; removes a torn last line, left by a killed process, first.

    Raises:
        UserError: the file cannot be written (no space, no permission) and is unchanged, or its end is damaged.
    """
    file, data = Path(path), "".join(map(line_of, rows)).encode()
    if not data:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab+", buffering=0) as handle:
            end = _end_of_whole_lines(handle)
            handle.seek(end)
            rest = handle.readall()
            try:
                if _is_row(rest):  # only its newline is missing, e.g. removed by an editor
                    data, end = b"\n" + data, end + len(rest)
                else:
                    _check_torn(rest)
            except ValueError as error:
                raise UserError(
                    f"{file}: its end is damaged: {error}; remove the damaged part and try again"
                ) from None
            handle.truncate(end)
            if handle.write(data) != len(data):
                handle.truncate(end)
                raise OSError("short write; is the disk full?")
            os.fsync(handle.fileno())
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be written: {error.strerror or error}") from None


def _is_row(rest: bytes) -> bool:
    """Whether the rest after the last newline is a complete row, according to its checksum."""
    try:
        entry = parse_json(rest) if rest else None
        return isinstance(entry, Mapping) and SEAL in entry and bool(unsealed(entry))
    except ValueError:
        return False


def _check_torn(rest: bytes) -> None:
    """A killed writer leaves the beginning of a row; anything else is damage."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(rest)  # may end within a character
    except UnicodeDecodeError:
        text = "\0"
    if text and (not text.startswith("{") or "\0" in text):
        raise ValueError("not the beginning of one either: the file is damaged")


def _end_of_whole_lines(handle: Any) -> int:
    end = handle.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - BLOCK)
        handle.seek(start)
        found = handle.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def line_of(row: DataclassInstance) -> str:
    """A row, a dataclass, as a line of JSON with its checksum and a newline; non-finite numbers become null."""
    columns = asdict(row).items()
    plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in columns}
    return json.dumps(sealed(plain), ensure_ascii=False, allow_nan=False) + "\n"


def row_of(cls: type[RowType], entry: object) -> RowType:
    """The row in a parsed line of JSON. Null in a column of numbers is NaN; unknown keys are ignored.

    Raises:
        ValueError: it is not a JSON object, a column is missing or of another type, or its checksum is wrong.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"a row must be a JSON object, got {type(entry).__name__}")
    unsealed(entry)
    found: dict[str, Any] = {}
    for name, (kinds, required) in _columns(cls).items():  # type: ignore[arg-type]
        if name not in entry:
            if required:
                raise ValueError(f"{name} is missing")
            continue
        value = math.nan if entry[name] is None and kinds == (float, int) else entry[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            allowed = " or ".join(kind.__name__.replace("NoneType", "null") for kind in kinds)
            raise ValueError(f"{name} must be {allowed}, got {value!r:.80}")
        found[name] = value
    return cls(**found)


@cache
def _columns(cls: Any) -> dict[str, tuple[tuple[type, ...], bool]]:
    """For each field of the dataclass, its types and whether it is required."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: (_kinds(hints[field.name]), field.default is MISSING and field.default_factory is MISSING)
        for field in fields(cls)
    }


def _kinds(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part))
    if typing.get_origin(hint) is typing.Literal:
        return tuple(type(choice) for choice in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    return (float, int) if kind is float else (kind,)
