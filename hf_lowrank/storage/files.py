"""Atomic writes: a file is written under a temporary name in the same folder, then renamed."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_lowrank.errors import one_line

# Errors of a full, read-only or failing disk.
DISK_ERRORS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EFBIG,
        errno.EIO,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
    }
)
# The same from writers outside Python, whose messages name neither the file nor the reason.
FOREIGN_MESSAGES = (
    "PytorchStreamWriter failed",
    "Error while serializing: I/O error",
    "unexpected pos",
    "iostream error",
)


def refusal_of(error: BaseException) -> str | None:
    """A line for an error of the disk, None for any other error."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}" if error.errno in DISK_ERRORS else None
    message = one_line(error, 200)
    known = any(part in str(error) for part in FOREIGN_MESSAGES)
    return f"a file cannot be written ({message}); is the disk full, or read-only?" if known else None


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; on success it is synced and renamed to `path`, else removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` as UTF-8, atomically."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
