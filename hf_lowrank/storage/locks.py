"""One writer at a time: advisory locks on folders, which end with the process that holds them."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hf_lowrank.errors import UserError
from hf_lowrank.formats import is_first_process

try:
    import fcntl
except ImportError:  # not on this platform
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Folders that this process holds, so that a stage called by a stage does not wait for itself.
_held: dict[tuple[int, Path], int] = {}


@contextmanager
def locked(folder: str | os.PathLike[str], purpose: str, *, wait: float = 0.0) -> Iterator[int | None]:
    """Holds `folder` for `purpose` ("train", "measure", …); yields the lock file's descriptor, None without a lock.

    The lock is on `.PURPOSE.lock` in the folder, which is made if need be; the file is gone afterwards. A process
    that inherits the descriptor holds the lock on. Where the platform or the file system has no such locks, there is
    none.

    Args:
        folder: what is written into.
        purpose: names the file; different purposes do not exclude each other.
        wait: seconds to go on trying.

    Raises:
        UserError: another process holds it; names the folder and that process.
    """
    key = (os.getpid(), Path(folder).resolve() / f".{purpose}.lock")
    if key in _held or fcntl is None or not is_first_process():
        yield _held.get(key)
        return
    handle = _acquire(Path(folder), key[1], wait)
    if handle is None:
        yield None
        return
    _held[key] = handle
    try:
        yield handle
    finally:
        del _held[key]
        # Under the lock: nobody can have got hold of a file that is then gone without noticing (`_is_still`).
        try:
            key[1].unlink(missing_ok=True)
        except OSError as error:
            # A file that can no longer be removed locks nobody out: the lock ends with its descriptor.
            logger.debug("%s stays: %s", key[1], error)
        os.close(handle)


@contextmanager
def all_locked(folders: Iterable[str | os.PathLike[str]], purpose: str) -> Iterator[None]:
    """`locked` for several folders."""
    with ExitStack() as stack:
        for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
            stack.enter_context(locked(folder, purpose))
        yield


def _acquire(folder: Path, file: Path, wait: float) -> int | None:
    deadline = time.monotonic() + wait
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            # Whoever cannot write there finds out when writing, with a better message.
            logger.debug("%s: no lock: %s", folder, error)
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 32).strip()
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                logger.debug("%s: no lock: %s", folder, error)
                return None
            if time.monotonic() >= deadline:
                who = f" (pid {int(holder)})" if re.fullmatch(rb"[0-9]+", holder) else ""
                raise UserError(
                    f"{folder}: is in use by another hf-lowrank process{who}; wait until it has ended, or end it"
                ) from None
            time.sleep(0.05)
            continue
        if _is_still(file, handle):
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
            return handle
        os.close(handle)


def _is_still(file: Path, handle: int) -> bool:
    """Whether `handle` is the file that stands there now, not one that its last holder removed."""
    try:
        there, ours = os.stat(file), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
