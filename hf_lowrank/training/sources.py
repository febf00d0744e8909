"""Sources of text: the standard library and local files. Each has training and held-out documents."""

import glob
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_lowrank.errors import UserError
from hf_lowrank.storage.parsing import parse_json

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Documents:
    """The documents of a corpus, in the same order each time they are read.

    Attributes:
        train: returns a new iterator over the training documents.
        held_out: returns a new iterator over the held-out documents.
        fingerprint: of the content of both, hex.
        title: for messages.
    """

    train: Callable[[], Iterator[str]]
    held_out: Callable[[], Iterator[str]]
    fingerprint: str
    title: str


def is_held_out(key: str, share: float) -> bool:
    """Whether the document `key` is held out: a fixed property of `key`, true of about `share` of all keys."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def python_library(held_out_share: float, folder: str | os.PathLike[str] | None = None) -> Documents:
    """The `.py` files of the installed standard library (or below `folder`), split by a hash of the relative path.

    Installed packages are excluded, and files that are not UTF-8 text are skipped.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts)
    )
    digest = hashlib.sha256()
    readable: list[str] = []
    for name in progress(names, "reading the standard library"):
        text = _source_text(root, name)
        if text:
            readable.append(name)
            digest.update(name.encode() + b"\0" + hashlib.sha256(text.encode()).digest())
    if not readable:
        raise UserError(f"{root}: contains no readable .py files; choose another data.source")

    def documents(held_out: bool) -> Iterator[str]:
        for name in readable:
            if is_held_out(name, held_out_share) == held_out:
                yield _source_text(root, name) or ""

    return Documents(
        train=lambda: documents(False),
        held_out=lambda: documents(True),
        fingerprint=f"{digest.hexdigest()}-{held_out_share}",
        title=str(root),
    )


def _source_text(root: Path, name: str) -> str | None:
    try:
        return (root / name).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        logger.debug("skipped %s: %s", name, error)
        return None


def local_files(
    train_files: list[str], held_out_files: list[str] | None, held_out_share: float, text_column: str
) -> Documents:
    """Local `.txt` (one document per file), `.jsonl` and `.parquet` (one per row) files; names may be globs.

    Without `held_out_files`, a share of the documents is held out, chosen by a hash of each document's text.

    Raises:
        UserError: a file is missing, unreadable, empty, of an unknown kind, or has no such text column.
    """
    train = _expanded(train_files, "data.train_files")
    held_out = _expanded(held_out_files, "data.held_out_files") if held_out_files else None
    both = sorted({*train, *(held_out or ())})
    shared = sorted(set(train) & set(held_out or ()))
    if shared:
        raise UserError(f"{shared[0]}: data.held_out_files must not be among data.train_files")
    digest = hashlib.sha256(f"{text_column} {held_out_share} {held_out is None}".encode())
    for file in progress(both, "reading the corpus"):
        digest.update(f"{file in train}".encode() + _file_digest(file))

    def documents(files: Iterable[Path], keep: Callable[[str], bool]) -> Iterator[str]:
        for file in files:
            for text in read_documents(file, text_column):
                if keep(text):
                    yield text

    def by_hash(held: bool) -> Iterator[str]:
        return documents(train, lambda text: is_held_out(text, held_out_share) == held)

    return Documents(
        train=lambda: by_hash(False) if held_out is None else documents(train, bool),
        held_out=lambda: by_hash(True) if held_out is None else documents(held_out, bool),
        fingerprint=digest.hexdigest(),
        title=", ".join(train_files),
    )


def _expanded(names: list[str], key: str) -> list[Path]:
    files: list[Path] = []
    for name in names:
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        if not found:
            raise UserError(f"{name}: {key} matches no file")
        for match in found:
            file = Path(match)
            if file.suffix not in SUFFIXES:
                raise UserError(
                    f"{match}: {key} must name {', '.join(SUFFIXES)} files, got {file.suffix or 'no suffix'!r}"
                )
            if file.is_dir():
                raise UserError(f"{match}: {key} must name files, this is a folder; add /*{file.suffix}")
            if not file.is_file():
                raise UserError(f"{match}: {key} names a file that does not exist")
            files.append(file)
    return list(dict.fromkeys(files))


def _file_digest(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError as error:
        raise UserError(f"{file}: not readable: {error.strerror}") from None


def read_documents(file: Path, text_column: str) -> Iterator[str]:
    """The non-empty documents of one local file.

    Raises:
        UserError: the file cannot be read, contains no text, or has no column `text_column`.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    empty = True
    try:
        for text in readers[file.suffix](file, text_column):
            if text.strip():
                empty = False
                yield text
    except OSError as error:
        raise UserError(f"{file}: not readable: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    if empty:
        raise UserError(f"{file}: the file contains no text; remove it from data.train_files and data.held_out_files")


def _read_txt(file: Path, text_column: str) -> Iterator[str]:
    yield file.read_text(encoding="utf-8")


def _read_jsonl(file: Path, text_column: str) -> Iterator[str]:
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}: line {number} is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}: line {number} must be a JSON object, got {type(row).__name__}")
            if text_column not in row:
                columns = ", ".join(map(str, row)) or "none"
                raise UserError(f"{file}: line {number} has no data.text_column {text_column!r}; columns: {columns}")
            yield text_of(row[text_column], f"{file}: line {number}", text_column)


def _read_parquet(file: Path, text_column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            if text_column not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names) or "none"
                raise UserError(f"{file}: no data.text_column {text_column!r}; columns: {columns}")
            for batch in table.iter_batches(columns=[text_column]):
                for value in batch.column(0).to_pylist():
                    yield text_of(value, str(file), text_column)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def text_of(value: object, where: str, text_column: str) -> str:
    """`value` if it is text, "" if it is None; a `UserError` for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: data.text_column {text_column!r} must hold text, got {type(value).__name__}")
    return value


def progress(items: Iterable[Any], title: str, total: int | None = None) -> Iterable[Any]:
    """`items` with a bar that appears in a terminal after two seconds, and disappears at the end."""
    return tqdm(items, desc=title, total=total, delay=2, disable=None, leave=False)
