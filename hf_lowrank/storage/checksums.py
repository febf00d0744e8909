"""Checksums of folders, rows and texts, so that damage is named and never trained on, measured or shown.

A folder of files that stay as they are has a `checksums.json`. What grows or changes carries its own: a row of a
table, or a JSON object, as its last key; a YAML file as a comment on its last line. What has none, as files of other
programs, is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json

FILE_NAME = "checksums.json"
SEAL = "checksum"
SAMPLES, SAMPLE_BYTES = 17, 65536
_SEAL_LINE = re.compile(rf"# {SEAL}: ([0-9a-f]+)\n?\Z")


def write_checksums(folder: Path) -> None:
    """Writes `checksums.json`: the SHA-256 and the size of every file in `folder` and in folders in it, and of weights
    the samples by which they are known where that file is not."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    files.pop(FILE_NAME, None)
    entries: dict[str, dict[str, Any]] = {}
    for name, file in sorted(files.items()):
        entries[name] = {"sha256": _digest(file), "bytes": file.stat().st_size}
        if name.endswith(".safetensors"):
            entries[name]["samples"] = _sampled(file)
    write_text(folder / FILE_NAME, json.dumps(sealed(entries), indent=1) + "\n")


def lacks_checksums(folder: Path) -> bool:
    """Whether a checkpoint is half-written: of a run that keeps checksums every checkpoint ends with them."""
    begun = folder.name.startswith("checkpoint-") and _has_checksums(folder.parent)
    return begun and not (folder / FILE_NAME).is_file()


def _has_checksums(run: Path) -> bool:
    return any(run.glob(f"checkpoint-*/{FILE_NAME}"))


def checked_names(folder: Path) -> frozenset[str]:
    """The files that `checksums.json` names; none where it is not there.

    Raises:
        UserError: it is damaged.
    """
    try:
        return frozenset(_written(folder)) if (folder / FILE_NAME).is_file() else frozenset()
    except ValueError as error:
        raise UserError(f"{folder}: damaged: {error}") from None


def _written(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and size of each file in `folder` when it was written.

    Raises:
        ValueError: checksums.json is unreadable.
    """
    try:
        entries = _entries(folder)
        return {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{FILE_NAME} is unreadable: {' '.join(str(error).split())[:200]}") from None


def _entries(folder: Path) -> dict[str, Any]:
    return unsealed(parse_json((folder / FILE_NAME).read_text(encoding="utf-8")))


def damage_by_checksums(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What differs from `checksums.json`; None where nothing does, or where the run keeps no checksums.

    Args:
        folder: a checkpoint, or a run's tokenizer.
        names: only these files; None: all that were there.
    """
    if not (folder / FILE_NAME).is_file():
        return f"{FILE_NAME} is missing" if lacks_checksums(folder) else None
    try:
        written = _written(folder)
    except ValueError as error:
        return str(error)
    for name in sorted(written) if names is None else sorted(set(names)):
        if name not in written or ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            return f"{FILE_NAME} does not know {name[:200]}"
        digest, size = written[name]
        try:
            there = (folder / name).is_file()
        except OSError:  # no file can have such a name
            there = False
        if not there:
            return f"{name[:200]} is missing"
        status = (folder / name).stat()
        if status.st_size != size:
            return f"{name} has {status.st_size} bytes, {size} were written"
        if _digest_once(str(folder / name), status.st_size, status.st_mtime_ns) != digest:
            return f"{name} is not what was written: its checksum differs"
    return None


def fingerprint(folder: Path, names: Iterable[str]) -> str | None:
    """What tells weights in `folder` from others of their names, 16 hex digits; None where they cannot be read.

    They are told apart by their sizes and by as many samples as find any two trainings different: to read all of a
    large model for its name would take minutes. Where `checksums.json` has the samples of what was written, its word
    is taken: weights that were damaged since are still those.
    """
    try:
        known = _entries(folder) if (folder / FILE_NAME).is_file() else {}
        marks = [(name, known.get(name, {}).get("samples") or _sampled(folder / name)) for name in sorted(names)]
    except (OSError, ValueError, AttributeError):
        return None  # whoever reads the files says what is wrong with them
    return _seal_of(json.dumps(marks))


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as opened:
        for number in range(SAMPLES):
            opened.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """As `damage_by_checksums`.

    Raises:
        UserError: a file is not what was written.
    """
    damage = damage_by_checksums(folder, names)
    if damage is not None:
        raise UserError(f"{folder}: damaged: {damage}")


def sealed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`entry`, plain data, with the checksum of its content as its last key."""
    content = {key: value for key, value in entry.items() if key != SEAL}
    return {**content, SEAL: _seal_of(json.dumps(content, sort_keys=True))}


def unsealed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`entry` without its checksum.

    Raises:
        ValueError: it is not what was written.
    """
    content = {key: value for key, value in entry.items() if key != SEAL}
    if SEAL in entry and entry[SEAL] != _seal_of(json.dumps(content, sort_keys=True)):
        raise ValueError("it is not what was written: its checksum differs")
    return content


def sealed_text(text: str) -> str:
    """`text`, of whole lines, with its checksum as a comment on a last line."""
    content = _SEAL_LINE.sub("", text)
    return f"{content}# {SEAL}: {_seal_of(content)}\n"


def seal_holds(text: str) -> bool:
    """Whether a text is what was written, as far as it carries a checksum."""
    match = _SEAL_LINE.search(text)
    return match is None or match[1] == _seal_of(text[: match.start()])


def read_sealed_text(file: Path) -> str:
    """A run's text file.

    Raises:
        OSError, ValueError: it cannot be read, or is not what was written.
    """
    text = file.read_text(encoding="utf-8")
    match = _SEAL_LINE.search(text)
    if match is None and _has_checksums(file.parent):
        raise ValueError("its last line, with its checksum, is missing or damaged")
    if not seal_holds(text):
        raise ValueError("it is not what was written: its checksum differs")
    return text


def _seal_of(content: str) -> str:
    return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


@lru_cache(maxsize=4096)
def _digest_once(file: str, size: int, changed: int) -> str:
    """The digest of a file, read once for each content that it has had."""
    return _digest(Path(file))


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
