"""The data in the page, as `payload` writes it and the page's scripts read it.

`python -m hf_lowrank.report.schema` writes the same types as JSDoc into `assets/types.js`.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, NotRequired, TypedDict

Numbers = list[float | None]
DIGITS = 5


def short(value: float | None, digits: int = DIGITS) -> float | None:
    """`value` rounded to `digits` significant digits; None for what JSON cannot hold."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def shorts(values: Iterable[float | None], digits: int = DIGITS) -> Numbers:
    return [short(value, digits) for value in values]


class Line(TypedDict):
    """Points of a line, and the ends of their 95 % intervals where they have any."""

    x: Numbers
    y: Numbers
    lo: NotRequired[Numbers]
    hi: NotRequired[Numbers]


class Losses(TypedDict):
    """Logged losses over steps, held out and on training batches."""

    eval: Line
    train: Line


class Layers(TypedDict):
    """Values of layers: one row per step, one column per scope (a position in `Payload.scopes`)."""

    steps: list[int]
    scopes: list[int]
    values: list[Numbers]
    lo: NotRequired[list[Numbers]]
    hi: NotRequired[list[Numbers]]
    runs: NotRequired[list[int]]


class Trend(Line):
    """A metric over steps; `why` it has no value, the run `base` that it compares with, and its layers."""

    why: str | None
    base: str | None
    layers: NotRequired[Layers]


class Curve(TypedDict):
    """Loss along a line at one checkpoint; the rise is above `center`, and of a mean over runs it has its own band."""

    step: int
    t: Numbers
    y: Numbers
    center: float | None
    lo: NotRequired[Numbers]
    hi: NotRequired[Numbers]
    rise_lo: NotRequired[Numbers]
    rise_hi: NotRequired[Numbers]
    relative: NotRequired[int]
    base: NotRequired[str]


class Plane(TypedDict):
    """Loss at (x[j], y[i])."""

    step: int
    x: Numbers
    y: Numbers
    loss: list[Numbers]


class Scores(TypedDict):
    """Loss and mean above-chance score at the steps that have both."""

    x: Numbers
    y: Numbers
    step: list[int]


class Mean(TypedDict):
    """A mean over `n` runs with its 95 % interval."""

    mean: float | None
    lo: float | None
    hi: float | None
    n: int


class Run(TypedDict):
    """One run; `final` by quantity, `tasks` by task as [value, low, high, step]."""

    name: str
    method: int
    seed: int | None
    group: int
    final: dict[str, float | None]
    unigram: float | None
    loss: Losses
    metrics: dict[str, Trend]
    curves: dict[str, list[Curve]]
    plane: Plane | None
    above: Scores
    tasks: dict[str, Numbers]


class MethodMeans(TypedDict):
    """Means over the runs of one method in one group; only for methods with several runs there."""

    method: int
    group: int
    final: dict[str, Mean]
    loss: Losses
    metrics: dict[str, Trend]
    curves: dict[str, list[Curve]]
    tasks: dict[str, Mean]


class Barrier(TypedDict):
    """Mean barrier between two methods: positions in `Payload.methods`, or the name of a run that is not shown."""

    group: int
    row: int | str
    column: int | str
    value: float | None


class MethodLook(TypedDict):
    """How a method is named and drawn."""

    name: str
    title: str
    dash: list[float]
    marker: str


class Task(TypedDict):
    """A downstream task and one of its metrics."""

    id: str
    task: str
    metric: str
    chance: float | None
    higher: bool


class Trial(TypedDict):
    """One run of the learning-rate sweep."""

    method: int
    rate: float | None
    loss: float | None
    chosen: bool
    edge: bool


class Prediction(TypedDict):
    """Actual and predicted downstream scores, with [run, step] of each."""

    seen: Numbers
    predicted_perplexity: Numbers
    predicted_both: Numbers
    rows: list[list[Any]]


class Quantity(TypedDict):
    """What methods can be compared by; `dimension` is the title of its section."""

    title: str
    unit: str
    help: str
    dimension: str


class MetricText(TypedDict):
    """How a metric is described."""

    title: str
    short: str
    unit: str
    dimension: str
    meaning: str


class Payload(TypedDict):
    """Everything that the pictures draw. A method is referred to by its position in `methods`."""

    methods: list[MethodLook]
    runs: list[Run]
    means: list[MethodMeans]
    barriers: list[Barrier]
    scopes: list[str]
    tasks: list[Task]
    sweep: list[Trial]
    prediction: Prediction | None
    claims: list[list[Any]]
    quantities: dict[str, Quantity]
    dimensions: dict[str, str]
    metrics: dict[str, MetricText]


_PLAIN = {int: "number", float: "number", str: "string", bool: "boolean", type(None): "null", Any: "*"}


def _javascript(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return "|".join(dict.fromkeys(_javascript(arg) for arg in args))
    if origin is list:
        return f"Array<{_javascript(args[0])}>"
    if origin is dict:
        return f"Object<string, {_javascript(args[1])}>"
    return _PLAIN[hint] if hint in _PLAIN else str(hint.__name__)


def _property(name: str, hint: Any) -> str:
    optional = typing.get_origin(hint) is NotRequired
    kind = _javascript(typing.get_args(hint)[0] if optional else hint)
    return f" * @property {{{kind}}} {f'[{name}]' if optional else name}"


def jsdoc() -> str:
    """The types as JSDoc."""
    blocks = [
        "/* Written by `python -m hf_lowrank.report.schema`: what DATA holds. Comments only; not in the page. */\n"
    ]
    for one in [entry for entry in globals().values() if typing.is_typeddict(entry)]:
        text = " ".join((inspect.getdoc(one) or "").split())
        fields = [_property(name, hint) for name, hint in typing.get_type_hints(one, include_extras=True).items()]
        lines = ["/**", f" * {text}", f" * @typedef {{object}} {one.__name__}", *fields, " */", ""]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


if __name__ == "__main__":
    Path(str(resources.files("hf_lowrank.report") / "assets" / "types.js")).write_text(jsdoc(), encoding="utf-8")
