"""Bytes for reading."""

from __future__ import annotations


def size_text(size: float) -> str:
    """`size` bytes as `153 MiB`, with three digits."""
    power = next((power for power in range(3) if abs(size) < 1024 ** (power + 1)), 3)
    value = size / 1024**power
    digits = 0 if power == 0 or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
