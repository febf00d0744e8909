"""Calls of the command line in forked processes, which have everything imported already, with their faults."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.drill.faults import Strike
from tests.drill.injection import arm

LONGEST_SECONDS = 600.0
Job = Callable[[], int]


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status, the negative signal number, or None if it was killed after LONGEST_SECONDS.
        output: all that it printed.
        struck: whether its fault struck.
    """

    status: int | None
    output: str
    struck: bool = False

    @property
    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    @property
    def refused(self) -> bool:
        """Whether it ended with one line and no traceback: a user error, or the name of what has no score after
        everything else was done."""
        start = {2: "hf-lowrank: ", 1: "hf-lowrank: without a score: "}.get(self.status or 0)
        return start is not None and self.last_line.startswith(start) and "Traceback" not in self.output

    @property
    def reason(self) -> str:
        """The part of the output that says what is wrong."""
        return self.last_line if self.status == 2 else self.output


class Child:
    """A forked process that runs a job."""

    def __init__(self, job: Job, folder: Path, strike: Strike | None = None, operations: int = 0) -> None:
        self._strike = strike
        self._reading, writing = os.pipe()
        self._moment, telling = os.pipe()
        self.struck, self._output = False, b""
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._reading)
                os.close(self._moment)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                _redirect(writing)
                moments = arm(strike, folder, operations, lambda: _tell(telling))
                status = job()
                _tell(telling, f"{moments.count}\n".encode())
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(writing)
        os.close(telling)
        self.operations = 0

    def wait(self, *, stopped: bool = False, within: float = LONGEST_SECONDS) -> Ended | None:
        """Waits until it ends; with `stopped`, returns None as soon as it has stopped itself."""
        deadline = time.monotonic() + within
        handles = {self._reading, self._moment}
        while True:
            for handle in select.select(list(handles), [], [], 0.01)[0]:
                data = os.read(handle, 65536)
                if not data:
                    handles.discard(handle)
                elif handle == self._reading:
                    self._output += data
                elif data.startswith(b"!"):
                    self.struck = True
                    self._signal()
                    data = data[1:]
                if handle == self._moment and data.strip(b"!\n").isdigit():
                    self.operations = int(data.strip(b"!\n"))
            ended, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if ended and os.WIFSTOPPED(status):
                if stopped:
                    return None
                os.kill(self.pid, signal.SIGCONT)
            elif ended:
                return self._ended(os.waitstatus_to_exitcode(status), handles)
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return self._ended(None, handles)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _signal(self) -> None:
        strike = self._strike
        if strike is not None and strike.delay and strike.kind in ("killed", "terminated", "rank dies"):
            time.sleep(strike.delay)
            os.kill(self.pid, signal.SIGTERM if strike.kind == "terminated" else signal.SIGKILL)

    def _ended(self, status: int | None, handles: set[int]) -> Ended:
        while self._reading in handles and select.select([self._reading], [], [], 0)[0]:
            data = os.read(self._reading, 65536)
            if not data:
                break
            self._output += data
        while self._moment in handles and select.select([self._moment], [], [], 0)[0]:
            data = os.read(self._moment, 64)
            if not data:
                break
            self.struck = self.struck or data.startswith(b"!")
            if data.strip(b"!\n").isdigit():
                self.operations = int(data.strip(b"!\n"))
        os.close(self._reading)
        os.close(self._moment)
        return Ended(status, self._output.decode(errors="replace"), self.struck)


def commands(lines: Sequence[Sequence[str]], before: Callable[[], None] | None = None) -> Job:
    """Runs `hf-lowrank` commands in one process, one after another, until one fails."""

    def job() -> int:
        from hf_lowrank.cli import main

        if before is not None:
            before()
        for line in lines:
            try:
                main(list(line))
            except SystemExit as end:
                if end.code:
                    return int(end.code)
        return 0

    return job


def _tell(handle: int, what: bytes = b"!") -> None:
    os.write(handle, what)


def _redirect(handle: int) -> None:
    """Sends all output to `handle`, and removes log handlers that hold other streams."""
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    for name in (None, "hf_lowrank", "transformers"):
        logging.getLogger(name).handlers.clear()
