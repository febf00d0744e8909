"""Documents of files of any kind, compression and place that `datasets` reads: which files, and their texts."""

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby
from typing import Any

from hf_lowrank.errors import UserError, first_line
from hf_lowrank.storage.cache import scratch_folder
from hf_lowrank.storage.parsing import parse_json

TEXT, JSON, PARQUET = "text", "json", "parquet"
# The reader of `datasets` for each suffix, and its options.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # One document per file.
    ".txt": (TEXT, {"sample_by": "document"}),
    ".jsonl": (JSON, {"parse_agent_traces": False}),
    ".ndjson": (JSON, {"parse_agent_traces": False}),
    ".json": (JSON, {"parse_agent_traces": False}),
    # The text may be the word "null".
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": (PARQUET, {}),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
# Packages that fsspec needs for the others.
NEEDED = {".zst": "zstandard", ".lz4": "lz4"}
ALLOWED = f"{', '.join(READERS)} files, compressed or not"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
REMOTE_LINES = 100


def is_remote(name: str) -> bool:
    """Whether a name is an address, such as `hf://…` or `s3://…`."""
    return "://" in name


def suffix_of(name: str) -> str:
    """The suffix that says how a file is read, without that of its compression, in lower case."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def expanded(names: Sequence[str], key: str) -> list[str]:
    """The files that `names` stand for: files, globs, and folders with all that is readable in them.

    Raises:
        UserError: a name stands for no file, or for one of an unknown kind; names it and `key`.
    """
    files: dict[str, None] = {}
    for name in names:
        found = _matches(name)
        if not found:
            what = "matches no file" if glob.has_magic(name) else "names a file that does not exist"
            raise UserError(f"{name}: {key} {what}")
        for file in found:
            if suffix_of(file) not in READERS:
                kind = suffix_of(file) or "no suffix"
                raise UserError(f"{file}: {key} must name {ALLOWED}, got {kind!r}")
            package = NEEDED.get(os.path.splitext(file.lower())[1])
            if package is not None and find_spec(package) is None:
                raise UserError(f"{file}: reading it needs the package {package}; run `pip install {package}`")
            files[file] = None
    return list(files)


def _matches(name: str) -> list[str]:
    """The files of one name, sorted. A file whose name looks like a pattern is that file."""
    import fsspec

    if is_remote(name):
        try:
            system, path = fsspec.core.url_to_fs(name)
            found = [path] if system.exists(path) else sorted(system.glob(path))
            files = [
                file for match in found for file in (_readable(system.find(match)) if system.isdir(match) else [match])
            ]
            return [str(system.unstrip_protocol(file)) for file in files]
        except Exception as error:  # each file system has its own
            raise UserError(f"{name}: cannot be reached: {type(error).__name__}: {first_line(error)}") from None
    found = [name] if os.path.exists(name) or not glob.has_magic(name) else sorted(glob.glob(name, recursive=True))
    files = []
    for match in found:
        if os.path.isdir(match):
            inside = _readable(os.path.join(folder, file) for folder, _, some in os.walk(match) for file in some)
            if not inside and len(found) == 1:
                raise UserError(f"{match}: the folder contains no {ALLOWED}")
            files += inside
        elif os.path.isfile(match):
            files.append(match)
    return files


def _readable(files: Iterable[str]) -> list[str]:
    return sorted(file for file in files if suffix_of(file) in READERS and not os.path.basename(file).startswith("."))


def digest_of(file: str) -> bytes:
    """Of a local file's content, or of what a remote file system says about the file."""
    if is_remote(file):
        import fsspec

        system, path = fsspec.core.url_to_fs(file)
        return hashlib.sha256(f"{file} {system.ukey(path)}".encode()).digest()
    try:
        with open(file, "rb") as opened:
            marked = opened.read(3) == BYTE_ORDER_MARK
            opened.seek(0)
            digest = hashlib.file_digest(opened, "sha256").digest()
    except OSError as error:
        raise UserError(f"{file}: not readable: {error.strerror}") from None
    packed = file.lower().endswith(COMPRESSED)  # which may hold a mark
    return digest + (b"mark" if (marked or packed) and suffix_of(file) == ".txt" else b"")


def read_files(files: Sequence[str], text_column: str) -> Iterator[str]:
    """The non-empty documents of files, in order.

    Raises:
        UserError: a file cannot be read, contains no text, or has no column `text_column`; names the file and, where
            it has lines, the line.
    """
    for is_text, group in groupby(files, key=lambda file: READERS[suffix_of(file)][0] == TEXT):
        # Text files are many and small: one dataset for all of them, a row for each.
        for some in [list(group)] if is_text else [[file] for file in group]:
            yield from _documents(some, text_column if not is_text else "text", one_each=is_text)


def _documents(files: list[str], text_column: str, *, one_each: bool) -> Iterator[str]:
    rows, row, empty = None, 0, True
    try:
        rows = iter(_dataset(files, text_column))
        while True:
            try:
                value = next(rows)
            except StopIteration:
                break
            file = files[row if one_each else 0]
            row += 1
            if text_column not in value:
                columns = ", ".join(map(str, value)) or "none"
                raise UserError(f"{file}: row {row} has no data.text_column {text_column!r}; columns: {columns}")
            text = text_of(value[text_column], f"{file}: row {row}", text_column)
            if one_each:
                text = text.removeprefix("\ufeff")  # a byte-order mark is no text
            if text.strip():
                empty = False
                yield text
            elif one_each:
                raise _without_text(file)
    except UserError:
        raise
    except StopIteration:
        pass  # of the reader: an empty file
    except Exception as error:  # a reader raises whatever a broken file leads it to
        raise _explained(files[row if one_each else 0], error) from None
    if empty:
        raise _without_text(files[0])


def _without_text(file: str) -> UserError:
    return UserError(f"{file}: the file contains no text; remove it from data.train_files and data.held_out_files")


def _dataset(files: list[str], text_column: str) -> Any:
    import datasets

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    reader, options = READERS[suffix_of(files[0])]
    if reader == JSON:
        _check_no_nulls(files[0])
    # An existing file may be named like a pattern.
    names = [file if is_remote(file) else glob.escape(os.path.abspath(file)) for file in files]

    # Nothing is cached, but datasets would leave a lock behind for each set of files.
    with scratch_folder() as scratch:

        def load(**more: Any) -> Any:
            return datasets.load_dataset(
                reader, data_files={"train": names}, split="train", streaming=True, cache_dir=str(scratch), **more
            )

        dataset = load(**options)
        columns = dataset.column_names
        if columns is not None and text_column not in columns:
            known = ", ".join(columns) or "none"
            raise UserError(f"{files[0]}: no data.text_column {text_column!r}; columns: {known}")
        return load(**options, columns=[text_column]) if reader == PARQUET else dataset


def _explained(file: str, error: Exception) -> UserError:
    """Which line of a file its reader failed at, and how."""
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"{file}: not readable: {error.strerror}")
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}")
    reader, _ = READERS[suffix_of(file)]
    if reader == JSON:
        fault = _json_fault(file)
        if fault is not None:
            return UserError(f"{file}: {fault}")
    return UserError(f"{file}: not a readable {reader} file: {type(error).__name__}: {first_line(error)}")


def _check_no_nulls(file: str) -> None:
    """Refuses a JSON file with a line that is null, of which Arrow's reader can crash instead of raising.

    Of a remote file, whose lines would have to be fetched twice, only the first ones are looked at.
    """
    import fsspec

    with fsspec.open(file, "rb", compression="infer") as lines:
        for number, line in enumerate(lines, start=1):
            if line.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"null"):
                raise UserError(f"{file}: line {number} must be a JSON object, got null")
            if is_remote(file) and number == REMOTE_LINES:
                break


def _json_fault(file: str) -> str | None:
    import fsspec

    try:
        with fsspec.open(file, "rt", encoding="utf-8-sig", compression="infer") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                except json.JSONDecodeError as error:
                    return f"line {number} is not JSON: {error.msg}"
                if not isinstance(row, dict):
                    return f"line {number} must be a JSON object, got {type(row).__name__}"
    except UnicodeDecodeError as error:
        return f"not UTF-8 text: {error.reason} at byte {error.start}"
    except (OSError, ValueError, ImportError) as error:
        return f"not readable: {first_line(error)}"
    return None


def text_of(value: object, where: str, text_column: str) -> str:
    """`value` if it is text, "" if it is None; a `UserError` for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: data.text_column {text_column!r} must hold text, got {type(value).__name__}")
    return value
