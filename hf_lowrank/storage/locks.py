"""Advisory locks on folders, released when the process that holds them ends."""

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

# Locks held by this process, so that a stage that calls another does not wait for itself.
_held: dict[tuple[int, Path], int] = {}


@contextmanager
def locked(folder: str | os.PathLike[str], purpose: str, *, wait: float = 0.0) -> Iterator[int | None]:
    """Locks `folder` for `purpose` ("train", "measure", …); yields the lock file's descriptor, None without a lock.

    The lock is on `.PURPOSE.lock` in the folder, which is created if needed; the file is removed afterwards. A child
    process that inherits the descriptor keeps the lock. Platforms and file systems without such locks have none.

    Different purposes do not exclude each other. Tries for `wait` seconds.

    Raises:
        UserError: another process holds the lock; names the folder and that process.
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
        # Still under the lock: another process that opened the file notices that it was removed (`_is_current`).
        try:
            key[1].unlink(missing_ok=True)
        except OSError as error:
            # A file that cannot be removed does no harm: the lock ends with its descriptor.
            logger.debug("cannot remove %s: %s", key[1], error)
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
            # The write that follows fails with a better message.
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
        if _is_current(file, handle):
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
            return handle
        os.close(handle)


def _is_current(file: Path, handle: int) -> bool:
    """Whether `handle` is the current lock file, not one that its last holder removed."""
    try:
        current, ours = os.stat(file), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (current.st_dev, current.st_ino) == (ours.st_dev, ours.st_ino)
