"""A cache of folders by content: written completely or not at all, checked on reading, rebuilt when damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hf_lowrank.errors import UserError
from hf_lowrank.storage.parsing import parse_json

logger = logging.getLogger(__name__)

INDEX = "index.json"
VARIABLE = "HF_LOWRANK_CACHE"
STALE_SECONDS = 24 * 3600


def cache_folder() -> Path:
    """`$HF_LOWRANK_CACHE`, else `hf_lowrank` in the user's cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_lowrank"


def cached_folder(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of `kind` for the content `key`; `make(empty folder)` fills it unless an intact one exists.

    Raises:
        UserError: the cache folder cannot be written.
    """
    name = f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    folder = cache_folder() / name
    damage = _damage(folder)
    if damage is None:
        logger.info("%s from the cache: %s", kind, folder)
        return folder
    if folder.exists():
        logger.warning("%s: damaged (%s), rebuilding", folder, damage)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        fresh = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"{folder.parent}: the cache folder must be writable: {error.strerror}; set {VARIABLE}"
        ) from None
    try:
        make(fresh)
        _write_index(fresh)
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


def _write_index(folder: Path) -> None:
    files = {file.name: [file.stat().st_size, _digest(file)] for file in sorted(folder.iterdir())}
    (folder / INDEX).write_text(json.dumps(files, indent=1), encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """What is wrong with the folder's content; None if it is as it was written."""
    try:
        files = parse_json((folder / INDEX).read_text(encoding="utf-8"))
        for name, (size, digest) in files.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has the wrong length"
            if _digest(folder / name) != digest:
                return f"{name} has the wrong content"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sweep(root: Path) -> None:
    """Removes incomplete folders of killed processes."""
    for leftover in root.glob(".making-*"):
        try:
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
        except FileNotFoundError:
            continue
