"""One look per method, everywhere: a colour, a line style and a marker, told apart without colour vision.

The line style says the family (solid: the dense weights are trained; dashed: the layers are replaced; dash-dotted:
restarts), the marker and the colour say the method. Colours come in two tones, for light and for dark ground, each
with a contrast of at least 3 : 1 against it (WCAG 2.2, 1.4.11).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

LIGHT_GROUND = "#fdfcf9"
DARK_GROUND = "#15171a"

Marker = Literal["circle", "square", "diamond", "up", "down", "cross", "plus", "hexagon", "pentagon", "star"]


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Attributes:
        title: how it is spelled in tables and pictures.
        light, dark: the colour on light and on dark ground, `#rrggbb`.
        dash: SVG dash lengths in line widths; empty for a solid line.
        marker: the shape of its points.
    """

    title: str
    light: str
    dark: str
    dash: tuple[float, ...]
    marker: Marker


SOLID: tuple[float, ...] = ()
DASHED = (5.0, 2.5)
DOTTED = (1.5, 2.0)
DASH_DOTTED = (6.0, 2.0, 1.5, 2.0)

# Ordered: tables of the same standing and legends list the methods like this.
_KNOWN: dict[str, Look] = {
    "full_rank": Look("Full-rank", "#1f1d1a", "#f3f0e8", SOLID, "circle"),
    "low_rank": Look("Low-rank", "#7b766d", "#a39e94", DOTTED, "plus"),
    "galore": Look("GaLore", "#0a6fb5", "#5fb0ee", SOLID, "square"),
    "fira": Look("Fira", "#cf4a0c", "#ff9159", SOLID, "up"),
    "apollo": Look("APOLLO", "#11803f", "#35c79b", SOLID, "diamond"),
    "apollo_mini": Look("APOLLO-Mini", "#4d9a2a", "#9bd85e", SOLID, "down"),
    "frugal": Look("FRUGAL", "#6d4bb8", "#b79cf2", SOLID, "hexagon"),
    "muon": Look("Muon", "#8a5a2b", "#d3a273", SOLID, "pentagon"),
    "cola": Look("CoLA", "#b5307f", "#f08bc6", DASHED, "up"),
    "cola_m": Look("CoLA-M", "#c9658f", "#d96aa5", DASHED, "down"),
    "sltrain": Look("SLTrain", "#1b8fa3", "#62d0e3", DASHED, "square"),
    "relora": Look("ReLoRA", "#a37800", "#ecc033", DASH_DOTTED, "diamond"),
}

# For methods of other packages: handed out in the order of their names.
_SPARE: tuple[Look, ...] = (
    Look("", "#8c2f39", "#e0717c", DOTTED, "star"),
    Look("", "#3d5a80", "#8fb0da", DOTTED, "cross"),
    Look("", "#5b6b1f", "#b5c663", DOTTED, "circle"),
    Look("", "#80427a", "#cf93c9", DOTTED, "square"),
    Look("", "#a0522d", "#e39b76", DOTTED, "diamond"),
    Look("", "#2f6f6a", "#7cc4bd", DOTTED, "up"),
)


def _title(name: str) -> str:
    try:
        from hf_lowrank.methods import METHODS

        return METHODS[name].title if name in METHODS else name
    except ImportError:  # a broken plug-in must not keep a report from being written
        return name


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """Each of `methods`' look, in the order that legends and tables follow.

    Methods of this package have their fixed look; names from elsewhere take spare ones by alphabetical order, and
    repeat them beyond six.
    """
    names = set(methods)
    chosen = {name: look for name, look in _KNOWN.items() if name in names}
    for position, name in enumerate(sorted(names - set(_KNOWN))):
        spare = _SPARE[position % len(_SPARE)]
        chosen[name] = Look(_title(name), spare.light, spare.dark, spare.dash, spare.marker)
    return chosen


def method_order(name: str) -> tuple[int, str]:
    """A sort key that follows the order of legends."""
    known = list(_KNOWN)
    return (known.index(name), name) if name in _KNOWN else (len(known), name)
