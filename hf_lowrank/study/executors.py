"""Executors run units in processes, and leave none behind.

Importing what a unit needs takes seconds. A worker process therefore imports it once and forks a child for each unit,
which starts as a fresh process would and inherits nothing from the unit before. With an accelerator, whose driver does
not survive a fork, and on platforms without fork, every unit has a worker of its own.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from hf_lowrank.errors import UserError, one_line

if TYPE_CHECKING:
    from hf_lowrank.study.units import Unit

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Outcome:
    """How the unit of this key ended: why it failed, in one line, and what else a reader should know."""

    key: str
    reason: str | None = None
    note: str | None = None


class Executor(Protocol):
    """Runs units.

    `start` appends a unit's output to `log`; units that run in parallel have different slots, a unit of several
    processes one for each. `wait` returns the units that have ended since the last call, after at most `seconds` if
    there are none. `stop` ends all running units.
    """

    def start(self, unit: Unit, log: Path, *slots: int) -> None: ...

    def wait(self, seconds: float) -> list[Outcome]: ...

    def stop(self) -> None: ...


class ForkExecutor:
    """Forks a child of this process for each unit."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._children: dict[int, tuple[str, int]] = {}

    def start(self, unit: Unit, log: Path, *slots: int) -> None:
        reading, writing = os.pipe()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reading)
                die_with(parent)
                if self._threads is not None:
                    import torch

                    torch.set_num_threads(self._threads)
                redirect(log)
                os.write(writing, json.dumps(asdict(perform(unit))).encode())
                status = 0
            finally:
                os._exit(status)  # without the parent's cleanup handlers
        os.close(writing)
        os.set_blocking(reading, False)
        self._children[pid] = (unit.key, reading)

    def wait(self, seconds: float) -> list[Outcome]:
        deadline = time.monotonic() + seconds
        while True:
            ended = []
            for pid, (key, reading) in list(self._children.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del self._children[pid]
                    answer = b""
                    with suppress(BlockingIOError):
                        answer = os.read(reading, 65536)
                    os.close(reading)
                    reason = exit_reason(os.waitstatus_to_exitcode(status))
                    ended.append(Outcome(**json.loads(answer)) if answer else Outcome(key, reason))
            if ended or not self._children or time.monotonic() >= deadline:
                return ended
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        for pid, (_, reading) in self._children.items():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reading)
        self._children.clear()


class WorkerExecutor:
    """Sends units to worker processes: to one that forks a child for each, or each to a fresh one.

    Args:
        inherited: file descriptors that the workers keep open.
        devices: accelerators; a fresh worker sees those of its unit's slots.
        fork: whether one worker forks for all units.
    """

    def __init__(
        self, threads: int, inherited: tuple[int, ...] = (), devices: tuple[str, ...] = (), *, fork: bool = True
    ) -> None:
        self._threads, self._inherited, self._devices, self._fork = threads, inherited, devices, fork
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._workers: list[subprocess.Popen[bytes]] = []
        self._outcomes: queue.Queue[Outcome] = queue.Queue()

    def start(self, unit: Unit, log: Path, *slots: int) -> None:
        self.send(unit.key, unit.plain(), log, self._devices_of(unit, slots))

    def _devices_of(self, unit: Unit, slots: tuple[int, ...]) -> list[str]:
        """The accelerators of a unit's slots; one that has all slots gets as many as it has processes."""
        count = len(self._devices)
        numbers = dict.fromkeys([*(slot % count for slot in slots), *range(count)] if count else ())
        return [self._devices[number] for number in numbers][: unit.process_count]

    def send(self, key: str, plain: dict[str, Any], log: Path, devices: Sequence[str] = ()) -> None:
        """`start` for a unit as plain data, with the accelerators that it sees; none: those that this process sees."""
        for worker in [worker for worker in self._workers if worker.poll() is not None]:
            close_input(worker)
            self._workers.remove(worker)
        worker = self._workers[0] if self._workers and self._fork else self._spawn(devices)
        self._running[key] = worker
        stdin = cast(IO[bytes], worker.stdin)
        try:
            stdin.write((json.dumps({"unit": plain, "log": str(log)}) + "\n").encode())
            stdin.flush()
        except BrokenPipeError:  # it has ended since, perhaps before its reader could know of this unit
            self._lose(key, worker)

    def _spawn(self, devices: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self._threads))
        environ = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        if devices:
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        mode = str(self._threads) if self._fork else "once"
        worker = subprocess.Popen(
            [sys.executable, "-m", "hf_lowrank.study.worker", str(os.getpid()), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            pass_fds=self._inherited if os.name == "posix" else (),
        )
        self._workers.append(worker)
        threading.Thread(target=self._read, args=(worker,), daemon=True).start()
        return worker

    def _read(self, worker: subprocess.Popen[bytes]) -> None:
        """Collects a worker's outcomes; units that are running when it ends have failed."""
        with cast(IO[bytes], worker.stdout) as lines:
            for line in lines:
                outcome = Outcome(**json.loads(line))
                self._running.pop(outcome.key, None)
                self._outcomes.put(outcome)
        for key in [key for key, performer in list(self._running.items()) if performer is worker]:
            self._lose(key, worker)

    def _lose(self, key: str, worker: subprocess.Popen[bytes]) -> None:
        """Reports, once, that a unit's worker has ended."""
        status = worker.wait()
        if self._running.pop(key, None) is not None:
            self._outcomes.put(Outcome(key, exit_reason(status)))

    def wait(self, seconds: float) -> list[Outcome]:
        with suppress(queue.Empty):
            return [self._outcomes.get(timeout=seconds)]
        return []

    def stop(self) -> None:
        for worker in self._workers:
            close_input(worker)  # at its end a worker ends its children and itself
            try:
                worker.wait(5)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self._workers.clear()


def close_input(process: subprocess.Popen[bytes]) -> None:
    """Closes the standard input of a process that may have ended."""
    with suppress(BrokenPipeError):
        cast(IO[bytes], process.stdin).close()


def preload(kind: type[Unit]) -> None:
    """Imports what units of a kind need; a module that fails to import fails again in the unit, with its reason."""
    for module in kind.imports:
        with suppress(Exception):
            import_module(module)


def perform(unit: Unit) -> Outcome:
    """Performs a unit in this process."""
    try:
        return Outcome(unit.key, note=unit.perform())
    except UserError as error:
        print(f"failed: {error}", flush=True)  # noqa: T201
        return Outcome(unit.key, reason=str(error))
    except Exception as error:
        traceback.print_exc()
        message, kind = one_line(error), type(error).__name__
        return Outcome(unit.key, reason=kind if message == kind else f"{kind}: {message}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def redirect(log: Path) -> None:
    """Appends everything that this process prints to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file, open(os.devnull, "rb") as nothing:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    log_to_stderr()


def log_to_stderr() -> None:
    """Makes the log lines of this process those of a unit's log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name in (None, "hf_lowrank", "transformers"):
        logging.getLogger(name).handlers.clear()
    logging.getLogger().addHandler(handler)
    logging.getLogger("hf_lowrank").setLevel(logging.INFO)


def die_with(parent: int) -> None:
    """Ends this process when its parent ends, however that happens, on platforms that can."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.name == "posix" and os.getppid() != parent:
        os._exit(1)  # it has ended already


def exit_reason(status: int) -> str:
    """How a process ended, by its exit status or, negative, the signal."""
    if status >= 0:
        return f"its process exited with status {status}"
    known = {number.value: number.name for number in signal.Signals}
    name = known.get(-status, f"signal {-status}")
    return f"its process was ended by {name}" + ("; did it run out of memory?" if status == -signal.SIGKILL else "")
