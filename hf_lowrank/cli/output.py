"""Results as one JSON document on stdout, for `--json`."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hf_lowrank.formats import echo


def print_json(document: Any) -> None:
    """Prints dataclasses, mappings, sequences and arrays as JSON; NaN and Inf become null."""
    from hf_lowrank.storage.parsing import null_non_finite

    echo(json.dumps(null_non_finite(plain(document)), indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """The value in the types that JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return value.tolist()
    return str(value) if isinstance(value, Path) else value
