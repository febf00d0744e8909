"""Metrics 5 and 6: the loss between consecutive checkpoints, and between a run and its baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_lowrank.geometry import Layout, interpolation_curve, loss_barrier, match_weights, path_grid, permute
from hf_lowrank.measuring.context import Row, StepContext
from hf_lowrank.measuring.spectra import first_checkpoint
from hf_lowrank.processes.faults import UndefinedError
from hf_lowrank.processes.placement import parameters_of


def step_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The barrier from the checkpoint before, in the model's own parameters."""
    if at.previous_step is None:
        return first_checkpoint(wanted)
    settings = {**at.settings.path.request(), **at.run.evaluated_on, "from_step": at.previous_step}
    ends = (at.previous_center, at.center)
    # The model at hand is the end of the path, so it is walked backwards.
    positions = path_grid(at.settings.path.points, at.settings.path.low, at.settings.path.high)
    losses = interpolation_curve(
        at.model,
        at.previous_weights,
        at.run.loss,
        positions=1 - positions,
        ends=(ends[1], ends[0]),
        memory=at.settings.memory,
        progress=at.run.tick,
        replicas=at.run.placement.replicas,
    )
    return _barrier_rows("step", positions, losses, wanted, settings, None)


def method_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The barrier to the baseline's checkpoint of the same step, through dense weights."""
    base = at.baseline_for_comparison()
    settings = {**at.settings.path.request(), **at.run.evaluated_on}
    end = parameters_of(at.baseline_model)
    return _method_rows(at, end, base.run.name, wanted, settings)


def aligned_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The barrier to the baseline after its hidden units are permuted to match (arXiv 2209.04836)."""
    base = at.baseline_for_comparison()
    _check_dense(at)
    at.run.placement.check_whole("matching hidden units")
    model = at.dense_model
    end = parameters_of(at.baseline_model)
    config = at.baseline_model.config.get_text_config()
    layout = Layout(config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads)
    end = permute(end, match_weights(parameters_of(model), end, layout), layout)
    settings = {**at.settings.path.request(), **at.run.evaluated_on}
    return _method_rows(at, end, base.run.name, wanted, settings)


def _method_rows(
    at: StepContext, end: Mapping[str, Tensor], baseline: str, wanted: set[str], settings: dict[str, Any]
) -> list[Row]:
    kind = "aligned_method" if any(metric.startswith("aligned") for metric in wanted) else "method"
    _check_dense(at)
    positions = path_grid(at.settings.path.points, at.settings.path.low, at.settings.path.high)
    losses = interpolation_curve(
        at.dense_model,
        end,
        at.run.loss,
        positions=positions,
        ends=(at.center, at.baseline_center),
        memory=at.settings.memory,
        progress=at.run.tick,
        replicas=at.run.placement.replicas,
    )
    return _barrier_rows(kind, positions, losses, wanted, settings, baseline)


def _check_dense(at: StepContext) -> None:
    if at.trajectory.dense_weight_kind != "exact":
        raise UndefinedError("the layers are not linear and have no dense weights to interpolate")


def _barrier_rows(
    kind: str, positions: Tensor, losses: Tensor, wanted: set[str], settings: dict[str, Any], baseline: str | None
) -> list[Row]:
    rows = [
        Row(metric=f"{kind}_path", value=loss, settings={**settings, "t": t}, baseline=baseline)
        for t, loss in zip(positions.tolist(), losses.tolist(), strict=True)
    ]
    references = {f"{kind}_barrier": "mean", f"{kind}_barrier_interpolated": "interpolated"}
    for metric in sorted(wanted & set(references)):
        value = loss_barrier(losses, positions, reference=references[metric])  # type: ignore[arg-type]
        finite = math.isfinite(value)
        reason = None if finite else "the loss on the path is not finite"
        rows.append(
            Row(
                metric=metric, value=value if finite else math.nan, settings=settings, baseline=baseline, reason=reason
            )
        )
    return rows
