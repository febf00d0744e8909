"""Which computation yields which metrics, what defines it, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_lowrank.measuring import landscape, spectra
from hf_lowrank.measuring.context import Row, RunContext, StepContext
from hf_lowrank.measuring.settings import MeasureSettings


@dataclass(frozen=True, kw_only=True)
class Group:
    """Metrics that come from one computation.

    Attributes:
        compute: (checkpoint, wanted ids) -> rows; a `UserError` or `ValueError` becomes the reason of null rows.
        request: what a finished row's settings must contain for the work to count as done.
        evaluations: losses of the whole set that it evaluates, for the progress display.
        costly: measured at `MeasureSettings.steps` checkpoints only, unless steps are named.
    """

    compute: Callable[[StepContext, set[str]], list[Row]]
    request: Callable[[RunContext], dict[str, Any]]
    evaluations: Callable[[MeasureSettings], int] = lambda settings: 1
    costly: bool = False


GROUPS: dict[str, Group] = {
    "loss": Group(compute=landscape.loss_rows, request=lambda run: run.evaluated_on),
    "weight": Group(compute=spectra.weight_rows, request=lambda run: {}),
    "update": Group(compute=spectra.update_rows, request=lambda run: {}),
    "random": Group(
        compute=landscape.random_rows,
        request=lambda run: {**run.settings.random.request(), **run.evaluated_on},
        evaluations=lambda settings: 2 * settings.random.steps * settings.random.draws,
        costly=True,
    ),
}
