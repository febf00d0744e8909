"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
