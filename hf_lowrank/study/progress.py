"""What a study says while it runs: one line that changes on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

Say = Callable[[str], None]


class Progress:
    """Units done of all, and the time left, from what units of each stage took so far or were estimated to take.

    Args:
        estimates: seconds of each unit to come, by key; None where nothing is known.
        jobs: units side by side.
        say: gets whole lines.
        stream: a terminal for the line that changes; None: plain lines only.
    """

    def __init__(
        self, estimates: Mapping[str, float | None], jobs: int, say: Say, stream: TextIO | None = None
    ) -> None:
        self._left, self._jobs, self._say, self._stream = dict(estimates), jobs, say, stream
        self.known = set(estimates)
        self._total, self._done = len(estimates), 0
        self._began: dict[str, float] = {}
        self._ratios: dict[str, list[float]] = {}
        self._taken: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}

    def more(self, estimates: Mapping[str, float | None]) -> None:
        """Units that were not known of before."""
        self._left |= estimates
        self.known |= set(estimates)
        self._total = self._done + len(self._left)

    def skip(self, key: str) -> None:
        """A unit that need not run."""
        self._left.pop(key, None)
        self._total = self._done + len(self._left)

    def start(self, key: str) -> None:
        self._left.setdefault(key, None)
        self._total = self._done + len(self._left)
        self._began[key] = time.monotonic()
        self.show()

    def end(self, key: str, reason: str | None, note: str | None = None) -> None:
        estimate, stage = self._left.pop(key, None), key.split(" ", maxsplit=1)[0]
        seconds = time.monotonic() - self._began.pop(key)
        self._done += 1
        if reason is None:
            self.seconds[key] = round(seconds, 2)
            self._taken.setdefault(stage, []).append(seconds)
            if estimate:
                self._ratios.setdefault(stage, []).append(seconds / estimate)
        how = f"failed: {reason}" if reason else f"done in {duration(seconds)}" + (f" ({note})" if note else "")
        left = self.left()
        behind = "" if left is None or not self._left else f"; {duration(left)} left"
        self.clear()
        self._say(f"[{self._done}/{self._total}] {key}: {how}{behind}")
        self.show()

    def left(self) -> float | None:
        """Seconds that all units still take, side by side; None where nothing is known."""
        total, known = 0.0, False
        for key, estimate in self._left.items():
            stage = key.split(" ")[0]
            ratios, taken = self._ratios.get(stage), self._taken.get(stage)
            if estimate is not None and ratios:
                whole = estimate * sum(ratios) / len(ratios)
            elif taken:
                whole = sum(taken) / len(taken)
            elif estimate is not None:
                whole = estimate
            else:
                continue
            known = True
            spent = time.monotonic() - self._began[key] if key in self._began else 0.0
            total += max(whole - spent, 0.0)
        return total / self._jobs if known else None

    def show(self) -> None:
        """Draws the line that changes."""
        if self._stream is None or not self._began:
            return
        left = self.left()
        behind = "" if left is None else f", {duration(left)} left"
        running = ", ".join(self._began)
        self._stream.write(f"\r\x1b[K{f'[{self._done}/{self._total}] {running}{behind}'[:118]}")
        self._stream.flush()

    def clear(self) -> None:
        """Takes the line that changes away."""
        if self._stream is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds as people say them: "8 s", "3 min", "2 h 05 min", "3 d 4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def terminal() -> TextIO | None:
    """Standard error where it is a terminal."""
    return sys.stderr if sys.stderr.isatty() else None
