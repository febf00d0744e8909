"""The pictures of a card, as PNG bytes that are the same for the same data."""

from __future__ import annotations

from pathlib import Path


def draw(run: Path) -> dict[str, bytes]:
    """Pictures by name; none where there is nothing to draw."""
    return {}
