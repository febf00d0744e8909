"""The computations behind the metrics: the rows that each gives, the settings that define it, and its cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_lowrank.measuring import activations, curvature, interpolation, landscape, spectra
from hf_lowrank.measuring.context import RunContext, StepContext
from hf_lowrank.measuring.rows import Row
from hf_lowrank.runs.measure_settings import MeasureSettings


@dataclass(frozen=True, kw_only=True)
class Group:
    """Metrics that come from one computation.

    Attributes:
        compute: (checkpoint, wanted ids) -> rows; an error becomes the reason of null rows.
        request: (run, metric id) -> settings that a row must contain for the metric to count as measured.
        evaluations: how many times it evaluates the loss, for the progress bar.
        costly: whether it is measured at `MeasureSettings.steps` checkpoints only, unless steps are named.
    """

    compute: Callable[[StepContext, set[str]], list[Row]]
    request: Callable[[RunContext, str], dict[str, Any]]
    evaluations: Callable[[MeasureSettings], int] = lambda settings: 1
    costly: bool = False


def _settings_of(block: str) -> Callable[[RunContext, str], dict[str, Any]]:
    return lambda run, metric: run.settings_of(block)


def _on_path(compute: Callable[[StepContext, set[str]], list[Row]]) -> Group:
    return Group(
        compute=compute,
        request=_settings_of("path"),
        evaluations=lambda settings: settings.path.points + 1,
        costly=True,
    )


GROUPS: dict[str, Group] = {
    "loss": Group(compute=landscape.loss_rows, request=lambda run, metric: run.evaluated_on),
    "weight": Group(compute=spectra.weight_rows, request=lambda run, metric: {}),
    "update": Group(compute=spectra.update_rows, request=lambda run, metric: {}),
    "total": Group(compute=spectra.total_rows, request=lambda run, metric: {}),
    "overlap": Group(compute=spectra.overlap_rows, request=lambda run, metric: run.settings.overlap.request()),
    "activations": Group(
        compute=activations.activation_rows,
        request=lambda run, metric: run.evaluated_on,
        evaluations=lambda settings: 2,
    ),
    "random": Group(
        compute=landscape.random_rows,
        request=_settings_of("random"),
        evaluations=lambda settings: 2 * settings.random.steps * settings.random.draws,
        costly=True,
    ),
    "pca": Group(
        compute=landscape.pca_rows,
        request=landscape.pca_settings,
        evaluations=lambda settings: 2 * settings.pca.steps * settings.pca.count,
        costly=True,
    ),
    "step": _on_path(interpolation.step_rows),
    "method": _on_path(interpolation.method_rows),
    "aligned": _on_path(interpolation.aligned_rows),
    "plane": Group(
        compute=landscape.plane_rows,
        request=_settings_of("plane"),
        evaluations=lambda settings: (2 * settings.plane.steps + 1) ** 2,
        costly=True,
    ),
    "critical": Group(
        compute=curvature.critical_rows,
        request=lambda run, metric: run.evaluated_on,
        evaluations=lambda settings: 15,
        costly=True,
    ),
    "hessian": Group(
        compute=curvature.hessian_rows,
        request=_settings_of("hessian"),
        evaluations=lambda settings: 6 * (settings.hessian.iterations + settings.hessian.probes),
        costly=True,
    ),
}
