"""Rows of the tables on disk, read back with their types checked: a line of JSON as a dataclass of ours."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeVar

from hf_lowrank.checksums import unsealed

RowType = TypeVar("RowType")


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
