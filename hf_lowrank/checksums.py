"""Checksums of a checkpoint's files, so that damage is named and never trained on or measured."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from hf_lowrank.errors import UserError
from hf_lowrank.files import write_text

FILE_NAME = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Writes `checksums.json`: the SHA-256 and the size of every file in `folder`."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != FILE_NAME)
    entries = {file.name: {"sha256": _digest(file), "bytes": file.stat().st_size} for file in files}
    write_text(folder / FILE_NAME, json.dumps(entries, indent=1) + "\n")


def damage_by_checksums(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What differs from `checksums.json`; None where nothing does, or where there is no such file.

    Args:
        folder: a checkpoint.
        names: only these files; None: all that were there.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        written = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{FILE_NAME} is unreadable: {' '.join(str(error).split())[:200]}"
    for name in sorted(written) if names is None else sorted(set(names)):
        if name not in written or os.path.basename(name) != name:
            return f"{FILE_NAME} does not know {name}"
        digest, size = written[name]
        if not os.path.isfile(folder / name):
            return f"{name} is missing"
        status = (folder / name).stat()
        if status.st_size != size:
            return f"{name} has {status.st_size} bytes, {size} were written"
        if _digest_once(str(folder / name), status.st_size, status.st_mtime_ns) != digest:
            return f"{name} is not what was written: its checksum differs"
    return None


def check_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """As `damage_by_checksums`.

    Raises:
        UserError: a file is not what was written.
    """
    damage = damage_by_checksums(folder, names)
    if damage is not None:
        raise UserError(f"{folder}: damaged: {damage}")


@lru_cache(maxsize=4096)
def _digest_once(file: str, size: int, changed: int) -> str:
    """The digest of a file, read once for each content that it has had."""
    return _digest(Path(file))


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
