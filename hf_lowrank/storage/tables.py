"""Tables on disk: JSON lines, appended whole and read again after any accident, as dataclasses with checked types."""

from __future__ import annotations

import codecs
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hf_lowrank.errors import UserError
from hf_lowrank.storage.checksums import SEAL, unsealed
from hf_lowrank.storage.parsing import parse_json

BLOCK = 65536
RowType = TypeVar("RowType")


def read_rows(file: Path, parse: Callable[[Any], RowType], what: str, again: str) -> Iterator[RowType]:
    """What `parse` makes of the lines of `file`, each parsed as JSON; a torn last line, as a killed writer leaves it,
    is passed over.

    Args:
        file: a table of JSON lines.
        parse: raises ValueError, TypeError, KeyError or AttributeError for what is no row.
        what, again: what a row is and what makes it, for messages: "measurement", "measure".

    Raises:
        UserError: the file cannot be read, a whole line is no row, or what follows the last one is no beginning of
            one; names the line.
    """
    try:
        *lines, rest = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    for number, line in enumerate([*lines, rest], start=1):
        try:
            if number > len(lines) and not _is_row(line):
                _check_torn(line)
            elif line.strip():
                yield parse(parse_json(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            said = f"{said} is missing" if isinstance(error, KeyError) else said
            raise UserError(
                f"{file}: line {number} is no {what}: {said}; remove it and the lines after it, and {again} again"
            ) from None


def append_lines(file: Path, lines: Iterable[str]) -> None:
    """Appends lines, each with its newline, in one synced write; cuts off a torn last line first.

    Raises:
        OSError: the file cannot be written; it is as it was then.
        UserError: its end is damaged.
    """
    data = "".join(lines).encode()
    if not data:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+", buffering=0) as handle:
        end = _end_of_whole_lines(handle)
        handle.seek(end)
        rest = handle.readall()
        try:
            if _is_row(rest):  # whose newline an editor took
                data, end = b"\n" + data, end + len(rest)
            else:
                _check_torn(rest)
        except ValueError as error:
            raise UserError(f"{file}: its end is damaged: {error}; remove that and try again") from None
        handle.truncate(end)
        if handle.write(data) != len(data):
            handle.truncate(end)
            raise OSError("short write; is the disk full?")
        os.fsync(handle.fileno())


def _is_row(rest: bytes) -> bool:
    """Whether what follows the last newline is whole, as its checksum says."""
    try:
        entry = parse_json(rest) if rest else None
        return isinstance(entry, Mapping) and SEAL in entry and bool(unsealed(entry))
    except ValueError:
        return False


def _check_torn(rest: bytes) -> None:
    """What a killed writer leaves is the beginning of a row; anything else has taken the place of rows."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(rest)  # it may end within a character
    except UnicodeDecodeError:
        text = "\0"
    if text and (not text.startswith("{") or "\0" in text):
        raise ValueError("it is not the beginning of one either, but damage")


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


def row_of(cls: type[RowType], entry: object) -> RowType:
    """The row that a parsed line of JSON describes; keys that are no columns are passed over.

    Raises:
        ValueError: it is no JSON object, a column is missing or of another type, or its checksum is not that of its
            content; one line.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"a row must be a JSON object, got {type(entry).__name__}")
    unsealed(entry)
    found: dict[str, Any] = {}
    for name, (kinds, needed) in _columns(cls).items():  # type: ignore[arg-type]
        if name not in entry:
            if needed:
                raise ValueError(f"{name} is missing")
            continue
        value = entry[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            allowed = " or ".join(kind.__name__.replace("NoneType", "null") for kind in kinds)
            raise ValueError(f"{name} must be {allowed}, got {value!r:.80}")
        found[name] = value
    return cls(**found)


@cache
def _columns(cls: Any) -> dict[str, tuple[tuple[type, ...], bool]]:
    """For each field of the dataclass, the types it may have and whether it must be there."""
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
