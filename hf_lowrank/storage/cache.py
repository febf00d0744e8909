"""A cache of folders by content: written completely or not at all, checked on reading, rebuilt when damaged."""

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from hf_lowrank.errors import UserError
from hf_lowrank.storage.checksums import FILE_NAME, damage_by_checksums, write_checksums

logger = logging.getLogger(__name__)

VARIABLE = "HF_LOWRANK_CACHE"
STALE_SECONDS = 24 * 3600


def cache_folder() -> Path:
    """`$HF_LOWRANK_CACHE`, else `hf_lowrank` in the user's cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_lowrank"


def _fresh_folder() -> Path:
    """A new folder in the cache, which a later call removes if it is left behind."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        return Path(tempfile.mkdtemp(prefix=".making-", dir=folder))
    except OSError as error:
        raise UserError(f"{folder}: the cache folder must be writable: {error.strerror}; set {VARIABLE}") from None


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in the cache, removed at the end.

    Raises:
        UserError: the cache folder cannot be written.
    """
    folder = _fresh_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cached_folder(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of `kind` for the content `key`; `make(empty folder)` fills it unless an intact one exists.

    Raises:
        UserError: the cache folder cannot be written.
    """
    name = f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    folder = cache_folder() / name
    damage = _damage(folder)
    if damage is None:
        _report(kind, folder)
        return folder
    if folder.exists():
        logger.warning("%s: damaged (%s), rebuilding", folder, damage)
    fresh = _fresh_folder()
    try:
        make(fresh)
        write_checksums(fresh)
        # Only if still damaged: another process may have rebuilt it in the meantime, and be reading it.
        if folder.exists() and _damage(folder) is not None:
            os.replace(folder, fresh.with_name(fresh.name + "-damaged"))
            shutil.rmtree(fresh.with_name(fresh.name + "-damaged"), ignore_errors=True)
        try:
            os.replace(fresh, folder)
        except OSError:
            # Another process was faster; its content has the same key.
            if _damage(folder) is not None:
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


@cache
def _report(kind: str, folder: Path) -> None:
    """Logs once in a process that a folder is taken from the cache; every task and run may ask for it."""
    logger.info("%s from the cache: %s", kind, folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with the folder's content; None if it is as it was written."""
    return damage_by_checksums(folder) if (folder / FILE_NAME).is_file() else f"{FILE_NAME} is missing"


def _sweep(root: Path) -> None:
    """Removes incomplete folders of killed processes."""
    for leftover in root.glob(".making-*"):
        try:
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
        except FileNotFoundError:
            continue
