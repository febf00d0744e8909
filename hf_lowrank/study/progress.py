"""What a study says while it runs: a progress line that is redrawn on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TextIO

from hf_lowrank.formats import duration

Say = Callable[[str], None]


class Progress:
    """Counts finished units, and predicts the time left from what units of each stage took or are estimated to take.

    Args:
        estimates: seconds of each planned unit, by key; None if unknown.
        jobs: units in parallel.
        say: receives whole lines.
        stream: a terminal for the line that is redrawn; None: plain lines only.

    Attributes:
        seconds: what each finished unit took, by key.
    """

    def __init__(
        self, estimates: Mapping[str, float | None], jobs: int, say: Say, stream: TextIO | None = None
    ) -> None:
        self._left, self._jobs, self._say, self._stream = dict(estimates), jobs, say, stream
        self._planned = set(estimates)
        self._done = 0
        self._started: dict[str, float] = {}
        self._ratios: dict[str, list[float]] = {}
        self._taken: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}

    def add(self, keys: Iterable[str]) -> None:
        """Adds units that were not planned; planned ones are known."""
        new = [key for key in keys if key not in self._planned]
        self._left |= dict.fromkeys(new)
        self._planned.update(new)

    def skip(self, key: str) -> None:
        """Removes a unit that need not run."""
        self._left.pop(key, None)

    def start(self, key: str) -> None:
        self._left.setdefault(key, None)
        self._started[key] = time.monotonic()
        self.show()

    def end(self, key: str, reason: str | None, note: str | None = None) -> None:
        estimate, stage = self._left.pop(key, None), key.split(" ", maxsplit=1)[0]
        seconds = time.monotonic() - self._started.pop(key)
        self._done += 1
        if reason is None:
            self.seconds[key] = round(seconds, 2)
            self._taken.setdefault(stage, []).append(seconds)
            if estimate:
                self._ratios.setdefault(stage, []).append(seconds / estimate)
        how = f"failed: {reason}" if reason else f"done in {duration(seconds)}" + (f" ({note})" if note else "")
        left = self.seconds_left()
        rest = "" if left is None or not self._left else f"; {duration(left)} left"
        self.clear()
        self._say(f"{self._count()} {key}: {how}{rest}")
        self.show()

    def _count(self) -> str:
        return f"[{self._done}/{self._done + len(self._left)}]"

    def seconds_left(self) -> float | None:
        """Until all units are done, `jobs` in parallel; None if nothing is known."""
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
            spent = time.monotonic() - self._started[key] if key in self._started else 0.0
            total += max(whole - spent, 0.0)
        return total / self._jobs if known else None

    def show(self) -> None:
        """Draws the progress line."""
        if self._stream is None or not self._started:
            return
        left = self.seconds_left()
        rest = "" if left is None else f", {duration(left)} left"
        line = f"{self._count()} {', '.join(self._started)}{rest}"
        self._stream.write(f"\r\x1b[K{line[:118]}")
        self._stream.flush()

    def clear(self) -> None:
        """Removes the progress line."""
        if self._stream is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
