"""Fuzzing a format: many inputs, and what may not happen while they are read.

Read code may not raise anything but a `UserError` of one line, reach the network, write outside its folder, take
longer than `SLOWEST_SECONDS`, or leave the process with `MOST_BYTES` more than before.
"""

import logging
import os
import resource
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from hf_lowrank.errors import UserError
from tests.fuzz import mutations
from tests.fuzz.formats import FORMATS

SLOWEST_SECONDS = 20.0
MOST_BYTES = 1 << 30
_watched: list["Watch"] = []


class Watch:
    """Collects what happened outside `folder` while it was on."""

    def __init__(self, folder):
        self.folder = str(Path(folder).resolve())
        self.breaches = []

    def see(self, event, arguments):
        if event == "open" and isinstance(arguments[0], str | bytes):
            path, mode, flags = os.fsdecode(arguments[0]), arguments[1], arguments[2]
            writing = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writing and not self._inside(path):
                self.breaches.append(f"{path} was opened for writing")
        elif event in ("socket.connect", "os.system", "subprocess.Popen", "pickle.find_class"):
            self.breaches.append(f"{event} {arguments!r:.120}")
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            # A name within an open folder: rmtree's, whose own event names the tree.
            within = isinstance(arguments[-1], int) and arguments[-1] >= 0 and event != "os.mkdir"
            for path in (part for part in arguments[:2] if isinstance(part, str | bytes | os.PathLike) and not within):
                if not self._inside(os.fsdecode(path)):
                    self.breaches.append(f"{event} {os.fsdecode(path)}")

    def _inside(self, path):
        if "\0" in path or path == os.devnull or "__pycache__" in path:
            return True
        real = os.path.realpath(path)
        return real == self.folder or real.startswith(self.folder + os.sep)


def _audit(event, arguments):
    for watch in _watched:
        watch.see(event, arguments)


sys.addaudithook(_audit)


@contextmanager
def watching(folder):
    """Fails where the block touched the network or files outside `folder`."""
    one = Watch(folder)
    _watched.append(one)
    try:
        yield
    finally:
        _watched.remove(one)
    assert not one.breaches, one.breaches


def contents_of(name):
    """The valid inputs of a format, as bytes."""
    documents, write, _ = FORMATS[name]
    return documents() if callable(documents) else [write(document) for document in documents]


def fresh(folder):
    """The folder, empty; the cache is in it too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ["HF_LOWRANK_CACHE"] = str(folder / "cache")
    return folder


def said_in_one_line(read, folder, content):
    """Whether `content` was read; what is wrong with it must be a `UserError`, and a line."""
    try:
        read(folder, content)
    except UserError as error:
        message = str(error)
    else:
        return True
    assert not set(message) & set("\n\r"), message
    assert 0 < len(message) < 2000, message
    return False


def fuzz(name, count, folder, number=0):
    """Reads `count` inputs drawn from seed `number`; returns how many were readable. The first fault is raised."""
    documents, write, read = FORMATS[name]
    strategy = mutations.torn(contents_of(name))
    if write is not None:
        strategy = mutations.mutated(documents).map(write) | strategy
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = 0

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(content=strategy)
    def one(content):
        nonlocal accepted
        fresh(folder)
        began = time.perf_counter()
        with watching(folder):
            accepted += said_in_one_line(read, folder, content)
        assert time.perf_counter() - began < SLOWEST_SECONDS

    logging.disable(logging.WARNING)
    cache = os.environ.get("HF_LOWRANK_CACHE")
    try:
        one()
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("HF_LOWRANK_CACHE")
        if cache is not None:
            os.environ["HF_LOWRANK_CACHE"] = cache
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_BYTES, f"{grown >> 20} MiB more than before"
    return accepted
