"""Faults in a forked process, which strike at its n-th file operation below a folder.

An audit hook sees every file operation that Python code starts, and an exception raised in it becomes the operation's
own. Files that C++ and Rust write by themselves (torch.save, safetensors) run into a limit on file sizes instead.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.drill.faults import Strike

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Moments:
    """Counts file operations below `folder`, strikes once at number `at`, and can refuse all later changes."""

    def __init__(self, folder: Path, at: int | None = None, strike: Callable[[], None] | None = None) -> None:
        self.count = 0
        self.refusal: int | None = None
        self._at, self._strike, self._inside = at, strike, False
        self._folders = (f"{folder}{os.sep}", str(folder))
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._inside or (event != "open" and event not in CHANGES) or not arguments:
            return
        path = arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str) or not path.startswith(self._folders):
            return
        self._inside = True
        try:
            self.count += 1
            if self.count == self._at and self._strike is not None:
                self._strike()
            changes = event != "open" or (arguments[2] or 0) & WRITING
            # A full disk allows removing files, a read-only one does not.
            grows = event in ("open", "os.mkdir", "os.link", "os.symlink")
            if self.refusal is not None and changes and (grows or self.refusal == errno.EROFS):
                raise OSError(self.refusal, os.strerror(self.refusal), path)
        finally:
            self._inside = False


def arm(strike: Strike | None, folder: Path, operations: int, tell: Callable[[], None]) -> Moments:
    """Prepares this process for its fault; `tell` notifies the parent when it strikes."""
    if strike is None:
        return Moments(folder)
    at = 1 + int(strike.at * operations)
    generator = random.Random(f"{strike.at} {strike.size}")
    if strike.kind == "clock":
        tell()
        _jumping_clock(generator)
        return Moments(folder)
    if strike.kind == "not a number":
        _not_a_number(1 + int(strike.at * 6), weights=strike.size < 0.3, tell=tell)
        return Moments(folder)
    if strike.kind == "memory" and strike.size < 0.5:
        _no_memory_for_a_forward_pass(1 + int(strike.at * 20), tell)
        return Moments(folder)

    def now() -> None:
        tell()
        if strike.kind == "killed" and not strike.delay:
            os.kill(os.getpid(), signal.SIGKILL)
        elif strike.kind == "terminated" and not strike.delay:
            os.kill(os.getpid(), signal.SIGTERM)
        elif strike.kind == "two at once":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif strike.kind in ("disk full", "read-only"):
            moments.refusal = errno.ENOSPC if strike.kind == "disk full" else errno.EROFS
            left = int(strike.size * 20000) if strike.kind == "disk full" else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))
        elif strike.kind == "memory":
            limit = _virtual_bytes() + int((strike.size - 0.5) * 2 * (1 << 25))
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    if strike.kind in ("disk full", "read-only"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    moments = Moments(folder, at, now)
    return moments


def _virtual_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _jumping_clock(generator: random.Random) -> None:
    true, shift = time.time, generator.uniform(-1e5, 1e5)

    def jumping() -> float:
        nonlocal shift
        if generator.random() < 0.2:
            shift = generator.uniform(-1e5, 1e5)
        return true() + shift

    time.time = jumping


def _not_a_number(step: int, *, weights: bool, tell: Callable[[], None]) -> None:
    """The loss of one step, or one weight after it, becomes NaN."""
    from transformers import Trainer

    compute, calls = Trainer.compute_loss, 0

    def poisoned(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        loss = compute(self, model, *arguments, **options)
        if not model.training:
            return loss
        calls += 1
        if calls != step:
            return loss
        tell()
        if weights:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.register_hook(lambda grad: grad * float("nan"))
            return loss
        return (
            tuple(x * float("nan") if i == 0 else x for i, x in enumerate(loss))
            if isinstance(loss, tuple)
            else (loss * float("nan"))
        )

    Trainer.compute_loss = poisoned


def _no_memory_for_a_forward_pass(number: int, tell: Callable[[], None]) -> None:
    from transformers import LlamaForCausalLM

    forward, calls = LlamaForCausalLM.forward, 0

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= number:
            tell()
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return forward(self, *arguments, **options)

    LlamaForCausalLM.forward = failing
