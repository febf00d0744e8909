"""How numbers are written, and what goes to the terminal, once for all processes of a launch."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from hf_lowrank.errors import LowRankWarning
from hf_lowrank.storage.locks import is_first_process

if TYPE_CHECKING:
    from rich.console import Console

MINUS = "−"


def _signed(text: str) -> str:
    return text.replace("-", MINUS)


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits: 0.0123, 24.1, 1 234; powers of ten below 0.0001 and from a million on; NaN is —."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "—" if math.isnan(value) else _signed(f"{value:+}".strip("+").replace("inf", "∞"))
    size = abs(value)
    if size < 1e-4 or size >= 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return _signed(f"{mantissa}e{int(exponent)}")
    places = max(digits - 1 - math.floor(math.log10(size)), 0)
    return _signed(f"{value:,.{places}f}".replace(",", " "))


def loss_text(value: float) -> str:
    return _signed(f"{value:.3f}")


def signed(value: float, write: Callable[[float], str]) -> str:
    """`value` by `write`, with a plus where it is positive."""
    return ("+" if value > 0 else "") + write(value)


def big_count(value: float) -> str:
    """Counts: 950, 12.3 k, 4.50 M, 1.20 B."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{significant(value / limit)} {letter}"
    return f"{value:.0f}"


def memory(value: float) -> str:
    """Bytes in binary units."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= limit:
            return f"{significant(value / limit)} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def plain(count: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def words_list(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


# Where a terminal says that it has no width at all.
WIDTH = 80


def console() -> Console:
    """Where tables go."""
    from rich.console import Console

    quiet = not is_first_process()
    made = Console(quiet=quiet)
    return made if made.width > 0 else Console(quiet=quiet, width=WIDTH)


def echo(line: str) -> None:
    """Prints a line of a command's outcome."""
    if is_first_process():
        print(line, flush=True)  # noqa: T201


def lose_no_line() -> None:
    """Lets characters that the output's encoding does not have be question marks in place of errors."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # streams that a caller put there
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def no_bars_in_logs() -> None:
    """Keeps the Hub client's bars out of what is no terminal, and to one process."""
    from huggingface_hub.utils import disable_progress_bars

    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ and not (sys.stderr.isatty() and is_first_process()):
        disable_progress_bars()


def warn_in_lines() -> None:
    """Lets this package's own warnings read as everything else that a command says, without the source's line."""
    usual = warnings.formatwarning

    def as_line(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> str:
        if not issubclass(category, LowRankWarning):
            return usual(message, category, filename, *rest)  # type: ignore[arg-type]
        return f"hf-lowrank: {message}\n" if is_first_process() else ""

    warnings.formatwarning = as_line  # type: ignore[assignment]
