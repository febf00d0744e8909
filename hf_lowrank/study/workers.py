"""Processes for units of work: each its own, at little cost, and none left behind.

Importing what a unit needs takes seconds. So one process imports it once and forks a child for each unit, which
begins as a fresh process would and takes nothing from the unit before. With an accelerator, whose driver does not
outlive a fork, and where there is no fork, every unit is a process from the start.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from hf_lowrank.errors import UserError

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.02
# What a unit of each kind imports, before the fork.
MODULES = {
    "train": ("hf_lowrank.training.pretrain", "transformers.trainer"),
    "measure": ("hf_lowrank.measuring.runner",),
    "pairs": ("hf_lowrank.measuring.runner",),
    "evaluate": ("hf_lowrank.downstream.runner", "hf_lowrank.downstream.lm_eval_model", "lm_eval.evaluator"),
    "report": ("hf_lowrank.report", "matplotlib.figure"),
}


@dataclass(frozen=True)
class Outcome:
    """How a unit ended.

    Attributes:
        key: the unit's.
        reason: why it failed, one line; None where it did not.
        note: what it said beside.
    """

    key: str
    reason: str | None = None
    note: str | None = None


class Workers(Protocol):
    """Runs units in processes."""

    def start(self, key: str, work: dict[str, Any], log: Path, slot: int) -> None:
        """Begins a unit; its output is appended to `log`."""
        ...

    def wait(self, seconds: float) -> list[Outcome]:
        """Units that have ended, after at most so many seconds."""
        ...

    def stop(self) -> None:
        """Ends what is running."""
        ...


class Forks:
    """A child of this very process for each unit."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._children: dict[int, tuple[str, int]] = {}

    def start(self, key: str, work: dict[str, Any], log: Path, slot: int = 0) -> None:
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
                _send(writing, carry_out(work, log))
                status = 0
            finally:
                # What the parent has to clean up stays the parent's.
                os._exit(status)
        os.close(writing)
        os.set_blocking(reading, False)
        self._children[pid] = (key, reading)

    def wait(self, seconds: float) -> list[Outcome]:
        deadline = time.monotonic() + seconds
        while True:
            ended = []
            for pid, (key, reading) in list(self._children.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del self._children[pid]
                    ended.append(_outcome(key, _received(reading), os.waitstatus_to_exitcode(status)))
                    os.close(reading)
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


class Server:
    """A process that imports once and forks for each unit."""

    def __init__(self, threads: int | None = None, keep: tuple[int, ...] = ()) -> None:
        self._environment = environment(threads)
        self._threads, self._keep = threads, keep
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._running: set[str] = set()

    def start(self, key: str, work: dict[str, Any], log: Path, slot: int = 0) -> None:
        if self._process is None:
            command = [sys.executable, "-m", "hf_lowrank.study.worker", str(os.getpid()), str(self._threads or 0)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment, pass_fds=self._keep
            )
        line = json.dumps({"key": key, "work": work, "log": str(log)}) + "\n"
        self._running.add(key)
        with suppress(BrokenPipeError):  # its end is noticed in `wait`
            self._process.stdin.write(line.encode())  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def wait(self, seconds: float) -> list[Outcome]:
        if self._process is None or not self._running:
            return []
        output: Any = self._process.stdout
        if not select.select([output], [], [], seconds)[0]:
            return []
        data = os.read(output.fileno(), 65536)
        if not data:
            status = self._process.wait()
            ended = [_outcome(key, b"", status) for key in sorted(self._running)]
            self._process, self._rest = None, b""
            self._running.clear()
            return ended
        *lines, self._rest = (self._rest + data).split(b"\n")
        outcomes = [Outcome(**json.loads(line)) for line in lines]
        self._running -= {outcome.key for outcome in outcomes}
        return outcomes

    def stop(self) -> None:
        if self._process is not None:
            # At the end of its input it ends its children.
            self._process.stdin.close()  # type: ignore[union-attr]
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()  # type: ignore[union-attr]
            self._process = None


class Processes:
    """A fresh process for each unit, each with one of the accelerators."""

    def __init__(
        self, threads: int | None = None, keep: tuple[int, ...] = (), devices: tuple[str, ...] | None = None
    ) -> None:
        self._threads, self._keep, self._devices = threads, keep, devices
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, key: str, work: dict[str, Any], log: Path, slot: int = 0) -> None:
        environ = environment(self._threads)
        if self._devices:
            environ["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_lowrank.study.worker", str(os.getpid()), "once"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            pass_fds=self._keep if os.name == "posix" else (),
        )
        line = json.dumps({"key": key, "work": work, "log": str(log)}) + "\n"
        with suppress(BrokenPipeError):
            process.stdin.write(line.encode())  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        self._processes[key] = process

    def wait(self, seconds: float) -> list[Outcome]:
        deadline = time.monotonic() + seconds
        while True:
            ended = []
            for key, process in list(self._processes.items()):
                if process.poll() is not None:
                    del self._processes[key]
                    said = process.stdout.read() if process.stdout else b""
                    ended.append(_outcome(key, said.strip(), process.returncode))
                    process.stdin.close()  # type: ignore[union-attr]
                    process.stdout.close()  # type: ignore[union-attr]
            if ended or not self._processes or time.monotonic() >= deadline:
                return ended
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._processes.clear()


def environment(threads: int | None) -> dict[str, str]:
    """The environment of a unit's process."""
    environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if threads is not None:
        environ |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return environ


def prepare(kind: str) -> None:
    """Imports what units of a kind need; what cannot be imported fails in the unit, with its reason."""
    for module in MODULES.get(kind, ()):
        with suppress(Exception):
            import_module(module)


def carry_out(work: dict[str, Any], log: Path) -> dict[str, str | None]:
    """Performs a unit with its output in `log`; what went wrong is the reason."""
    redirect(log)
    from hf_lowrank.study.units import perform

    try:
        return {"note": perform(work)}
    except UserError as error:
        print(f"failed: {error}", flush=True)  # noqa: T201
        return {"reason": " ".join(str(error).split())}
    except Exception as error:
        traceback.print_exc()
        said = " ".join(str(error).split())[:300]
        return {"reason": f"{type(error).__name__}: {said}" if said else type(error).__name__}
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def redirect(log: Path) -> None:
    """Everything that this process prints goes to `log`."""
    import logging

    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file, open(os.devnull, "rb") as nothing:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name in (None, "hf_lowrank", "transformers"):
        logging.getLogger(name).handlers.clear()
    logging.getLogger().addHandler(handler)
    logging.getLogger("hf_lowrank").setLevel(logging.INFO)


def die_with(parent: int) -> None:
    """Ends this process when its parent ends, however that ends, where the platform can."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.name == "posix" and os.getppid() != parent:
        os._exit(1)  # it has ended already


def _send(handle: int, result: dict[str, Any]) -> None:
    os.write(handle, json.dumps(result).encode())


def _received(handle: int) -> bytes:
    try:
        return os.read(handle, 65536)
    except BlockingIOError:
        return b""


def _outcome(key: str, said: bytes, status: int) -> Outcome:
    try:
        result = json.loads(said)
    except ValueError:
        return Outcome(key, _ended_by(status))
    return Outcome(key, result.get("reason"), result.get("note"))


def _ended_by(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status}"
    name: Callable[[int], Any] = signal.Signals
    try:
        text = name(-status).name
    except ValueError:
        text = f"signal {-status}"
    return f"its process was ended by {text}" + ("; was memory short?" if status == -signal.SIGKILL else "")
