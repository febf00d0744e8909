"""Metrics 5 and 6: the loss between consecutive checkpoints, and between a run and its baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_lowrank.geometry import Layout, interpolation_curve, loss_barrier, match_weights, path_grid, permute
from hf_lowrank.measuring.context import StepContext
from hf_lowrank.measuring.rows import Row, first_checkpoint_rows
from hf_lowrank.processes.placement import parameters_of


def step_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The barrier from the previous checkpoint, in the model's own parameters."""
    if at.previous_step is None:
        return first_checkpoint_rows(wanted)
    settings = {**at.run.settings_of("path"), "from_step": at.previous_step}
    positions = _positions(at)
    # The loaded model is the end of the path, so the path is walked backwards.
    ends = (at.center, at.previous_center)
    losses = _losses(at, at.model, at.previous_weights, 1 - positions, ends)
    return _barrier_rows("step", positions, losses, wanted, settings)


def method_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The barrier to the baseline's checkpoint of the same step, between dense weights."""
    base = at.baseline_for_comparison()
    settings = at.run.settings_of("path")
    return _method_rows(at, "method", parameters_of(at.baseline_model), wanted, settings, base.run.name)


def aligned_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """The barrier to the baseline after its hidden units are permuted to match (arXiv 2209.04836)."""
    base = at.baseline_for_comparison()
    at.check_dense()
    at.run.placement.require_whole_models("matching hidden units")
    start, end = parameters_of(at.dense_model), parameters_of(at.baseline_model)
    config = at.baseline_model.config.get_text_config()
    layout = Layout(config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads)
    end = permute(end, match_weights(start, end, layout), layout)
    return _method_rows(at, "aligned_method", end, wanted, at.run.settings_of("path"), base.run.name)


def _method_rows(
    at: StepContext, kind: str, end: Mapping[str, Tensor], wanted: set[str], settings: dict[str, Any], baseline: str
) -> list[Row]:
    positions = _positions(at)
    losses = _losses(at, at.dense_model, end, positions, (at.center, at.baseline_center))
    return _barrier_rows(kind, positions, losses, wanted, settings, baseline)


def _positions(at: StepContext) -> Tensor:
    chosen = at.settings.path
    return path_grid(chosen.points, chosen.low, chosen.high)


def _losses(
    at: StepContext, model: Any, end: Mapping[str, Tensor], positions: Tensor, ends: tuple[float, float]
) -> Tensor:
    return interpolation_curve(model, end, at.run.loss, positions=positions, ends=ends, **at.run.sweep)


def _barrier_rows(
    kind: str,
    positions: Tensor,
    losses: Tensor,
    wanted: set[str],
    settings: dict[str, Any],
    baseline: str | None = None,
) -> list[Row]:
    rows = [
        Row(metric=f"{kind}_path", value=loss, settings={**settings, "t": t}, baseline=baseline)
        for t, loss in zip(positions.tolist(), losses.tolist(), strict=True)
    ]
    for suffix, reference in (("", "mean"), ("_interpolated", "interpolated")):
        metric = f"{kind}_barrier{suffix}"
        if metric in wanted:
            value = loss_barrier(losses, positions, reference=reference)  # type: ignore[arg-type]
            finite = math.isfinite(value)
            reason = None if finite else "the loss on the path is not finite"
            value = value if finite else math.nan
            rows.append(Row(metric=metric, value=value, settings=settings, baseline=baseline, reason=reason))
    return rows
