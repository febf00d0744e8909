"""Checksums of folders, rows and texts, so that damage is found and named before anything is computed from it.

A folder whose files never change has a `checksums.json`. Whatever grows or changes carries its own checksum, its
*seal*: a row of a table, or a JSON object, as its last key; a YAML file as a comment on its last line. What has no
checksum, e.g. a file of another program, is not checked.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from hf_lowrank.errors import one_line
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json

FILE_NAME = "checksums.json"
SEAL = "checksum"
SAMPLES, SAMPLE_BYTES = 17, 65536
DIFFERS = "its checksum differs from the one that was written"
_SEAL_LINE = re.compile(rf"# {SEAL}: ([0-9a-f]+)\n?\Z")


def write_checksums(folder: Path) -> None:
    """Writes `checksums.json`: the SHA-256 and the size of every file in `folder` and its subfolders, and for weights
    the samples that `fingerprint` uses."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    files.pop(FILE_NAME, None)
    entries: dict[str, dict[str, Any]] = {}
    for name, file in sorted(files.items()):
        entries[name] = {"sha256": _digest(file), "bytes": file.stat().st_size}
        if name.endswith(".safetensors"):
            entries[name]["samples"] = _sampled(file)
    write_text(folder / FILE_NAME, json.dumps(sealed(entries), indent=1) + "\n")


def damage_by_checksums(folder: Path, names: Iterable[str] | None = None, *, only_listed: bool = False) -> str | None:
    """What differs from `checksums.json`; None where nothing does, or without that file.

    With `names`, only these files are checked, and with `only_listed` only those of them that it lists.
    """
    if not (folder / FILE_NAME).is_file():
        return None
    try:
        written = {
            str(name): (str(entry["sha256"]), int(entry["bytes"]))
            for name, entry in read_object(folder / FILE_NAME).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"{FILE_NAME} is unreadable: {one_line(error, 200)}"
    wanted = written if names is None else set(names)
    for name in sorted(written.keys() & wanted if only_listed else wanted):
        if name not in written or ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            return f"{name[:200]} is not in {FILE_NAME}"
        digest, size = written[name]
        try:
            exists = (folder / name).is_file()
        except OSError:  # no file can have such a name
            exists = False
        if not exists:
            return f"{name[:200]} is missing"
        status = (folder / name).stat()
        if status.st_size != size:
            return f"{name} has {status.st_size} bytes, {size} were written"
        if _digest_once(str(folder / name), status.st_size, status.st_mtime_ns) != digest:
            return f"{name}: {DIFFERS}"
    return None


def fingerprint(folder: Path, names: Iterable[str]) -> str | None:
    """Identifies the weight files `names` of `folder`, 16 hex digits; None where they cannot be read.

    It covers their sizes and a few samples, enough to distinguish any two training runs: reading a large model whole
    would take minutes. Samples recorded in `checksums.json` are preferred, so that weights damaged later keep their
    fingerprint.
    """
    try:
        known = read_object(folder / FILE_NAME) if (folder / FILE_NAME).is_file() else {}
        marks = [(name, known.get(name, {}).get("samples") or _sampled(folder / name)) for name in sorted(names)]
    except (OSError, ValueError, AttributeError):
        return None  # whoever reads the files reports the fault
    return _seal_of(json.dumps(marks))


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as opened:
        for number in range(SAMPLES):
            opened.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def sealed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`entry`, plain data, with its seal, the checksum of its content, as the last key."""
    content = {key: value for key, value in entry.items() if key != SEAL}
    return {**content, SEAL: _seal_of(json.dumps(content, sort_keys=True))}


def unsealed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`entry` without its seal.

    Raises:
        ValueError: the seal is wrong: the content is not what was written.
    """
    content = {key: value for key, value in entry.items() if key != SEAL}
    if SEAL in entry and entry[SEAL] != _seal_of(json.dumps(content, sort_keys=True)):
        raise ValueError(DIFFERS)
    return content


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file, without its seal.

    Raises:
        OSError, ValueError: it cannot be read, is not a JSON object, or is not as it was written.
    """
    content = parse_json(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"must be a JSON object, got {type(content).__name__}")
    return unsealed(content)


def sealed_text(text: str) -> str:
    """`text`, of whole lines, with its seal as a comment on an added last line."""
    content = _SEAL_LINE.sub("", text)
    return f"{content}# {SEAL}: {_seal_of(content)}\n"


def is_sealed(text: str) -> bool:
    """Whether a text ends in a seal, right or wrong."""
    return _SEAL_LINE.search(text) is not None


def seal_holds(text: str) -> bool:
    """Whether a text is as it was written; true for a text without a seal."""
    match = _SEAL_LINE.search(text)
    return match is None or match[1] == _seal_of(text[: match.start()])


def read_sealed_text(file: Path, *, required: bool = False) -> str:
    """A text file, seal included; a missing seal is a fault where it is `required`.

    Raises:
        OSError, ValueError: it cannot be read, or is not as it was written.
    """
    text = file.read_text(encoding="utf-8")
    if required and not is_sealed(text):
        raise ValueError("its last line, with its checksum, is missing or damaged")
    if not seal_holds(text):
        raise ValueError(DIFFERS)
    return text


def _seal_of(content: str) -> str:
    return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


@lru_cache(maxsize=4096)
def _digest_once(file: str, size: int, changed: int) -> str:
    """The digest of a file, cached until its size or time changes."""
    return _digest(Path(file))


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
