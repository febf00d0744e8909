"""How numbers are spelled, and what a command writes to the terminal, once for all processes of a launch."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from hf_lowrank.errors import LowRankWarning

if TYPE_CHECKING:
    from rich.console import Console

MINUS = "−"


def _signed(text: str) -> str:
    return text.replace("-", MINUS)


def significant(value: float, digits: int = 3) -> str:
    """Rounded to significant digits: 0.0123, 24.1, 1 234; scientific below 0.0001 and from a million; NaN is —."""
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
    """`write(value)`, with a plus sign for positive values."""
    return ("+" if value > 0 else "") + write(value)


def finite_number(value: object) -> float | None:
    """`value` as a float if it is a finite number, else None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def p_text(p_value: float | None) -> str:
    """`p = 0.012`, `p < 0.001`."""
    if p_value is None or not math.isfinite(p_value):
        return "no p-value"
    return "p < 0.001" if p_value < 0.001 else f"p = {significant(p_value, 2)}"


def big_count(value: float) -> str:
    """Counts: 950, 12.3 k, 4.50 M, 1.20 B."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{significant(value / limit)} {letter}"
    return f"{value:.0f}"


def byte_size(value: float) -> str:
    """A number of bytes in binary units: 12 B, 1.50 KiB, 3.20 GiB."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= limit:
            return f"{significant(value / limit)} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 30 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def pluralize(count: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def join_words(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


FALLBACK_WIDTH = 80


def is_first_process() -> bool:
    """Whether this process takes locks and reports to the user: the first of its launch, or the only one."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return not (rank.isdecimal() and int(rank) > 0 and world.isdecimal() and int(world) > 1)


def console() -> Console:
    """The console that tables are printed to; also where a terminal reports a width of 0."""
    from rich.console import Console

    quiet = not is_first_process()
    made = Console(quiet=quiet)
    return made if made.width > 0 else Console(quiet=quiet, width=FALLBACK_WIDTH)


def echo(line: str) -> None:
    """Prints a line of a command's result."""
    if is_first_process():
        print(line, flush=True)  # noqa: T201


def replace_unencodable() -> None:
    """Prints a question mark for a character that the encoding of stdout or stderr lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a caller may have replaced them
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def hide_hub_progress_bars() -> None:
    """Shows the Hub client's progress bars only on a terminal, and from one process only."""
    if "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ or (sys.stderr.isatty() and is_first_process()):
        return
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    else:  # the client reads this when it is imported
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def print_own_warnings_as_lines() -> None:
    """Prints this package's warnings like its other messages: one line, without the source line."""
    default_format = warnings.formatwarning

    def as_line(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> str:
        if not issubclass(category, LowRankWarning):
            return default_format(message, category, filename, *rest)  # type: ignore[arg-type]
        return f"hf-lowrank: {message}\n" if is_first_process() else ""

    warnings.formatwarning = as_line  # type: ignore[assignment]
