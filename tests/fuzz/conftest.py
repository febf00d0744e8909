"""What fuzzed code may not do: reach the network, write outside its folder, or take memory without end."""

import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

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
            for path in (part for part in arguments[:2] if isinstance(part, str | bytes | os.PathLike)):
                if not self._inside(os.fsdecode(path)):
                    self.breaches.append(f"{event} {os.fsdecode(path)}")

    def _inside(self, path):
        if "\0" in path or path == os.devnull or "__pycache__" in path:
            return True
        return os.path.realpath(path).startswith(self.folder + os.sep)


def _audit(event, arguments):
    for watch in _watched:
        watch.see(event, arguments)


sys.addaudithook(_audit)


@pytest.fixture(scope="session")
def watching():
    """`with watching(folder):` fails where the block touched the network or files outside `folder`."""

    @contextmanager
    def watch(folder):
        one = Watch(folder)
        _watched.append(one)
        try:
            yield
        finally:
            _watched.remove(one)
        assert not one.breaches, one.breaches

    return watch


@pytest.fixture(scope="session")
def scratch():
    """A folder for the whole session: hypothesis runs many examples within one test."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
