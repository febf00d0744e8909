"""The data in the page, as `payload` writes it and the page's scripts read it.

`make format` writes the same types as JSDoc into `assets/types.js`.
"""

import math
from collections.abc import Iterable
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
    """A metric over steps; `why` it has no value, the run `base` it compares with, its layers; `own`: not dense."""

    why: str | None
    base: str | None
    own: NotRequired[int]
    layers: NotRequired[Layers]


class Curve(TypedDict):
    """Loss along a line; the rise is above `center + slope · t`, with a band in means over runs; `own`: not dense."""

    step: int
    t: Numbers
    y: Numbers
    center: float | None
    slope: NotRequired[float | None]
    lo: NotRequired[Numbers]
    hi: NotRequired[Numbers]
    rise_lo: NotRequired[Numbers]
    rise_hi: NotRequired[Numbers]
    relative: NotRequired[int]
    own: NotRequired[int]
    base: NotRequired[str]


class Plane(TypedDict):
    """Loss at (x[j], y[i]); `own`: not of dense weights."""

    step: int
    own: NotRequired[int]
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
    """One run of the sweep; `varied`: other keys than the learning rate were swept too."""

    method: int
    rate: float | None
    loss: float | None
    chosen: bool
    edge: bool
    varied: bool


class Prediction(TypedDict):
    """Observed and predicted downstream scores, with [run, step] of each, for one question."""

    question: str
    observed: Numbers
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
    predictions: list[Prediction]
    claims: list[list[Any]]
    # Both ends of the scale of a metric's heat maps, by group and metric; values beyond them are outliers.
    heats: dict[str, Numbers]
    quantities: dict[str, Quantity]
    dimensions: dict[str, str]
    metrics: dict[str, MetricText]
