"""Metrics 7–16: spectra of weights and updates, and hidden states compared with the baseline's."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from hf_lowrank.geometry import (
    Estimate,
    activation_similarity,
    effective_rank,
    intrinsic_dimension,
    product_singular_values,
    random_positions,
    relative_norm,
    sampled_hidden_states,
    singular_value_fraction,
    singular_values,
    spectral_gap,
    stable_rank,
    subspace_overlap,
    tail_exponent,
)
from hf_lowrank.geometry.spectra import difference_factors, singular_vectors
from hf_lowrank.measuring.context import Row, RunContext, StepContext, first_checkpoint_rows, scope_rows
from hf_lowrank.runs.measurements import UNDEFINED

WEIGHT: dict[str, Callable[[Tensor], float]] = {
    "weight_effective_rank": lambda sigma: effective_rank(sigma) / sigma.numel(),
    "weight_stable_rank": stable_rank,
    "weight_spectral_gap": spectral_gap,
    "weight_sv_fraction": singular_value_fraction,
    "weight_tail_exponent": tail_exponent,
}
# From the singular values of the update, and the weight of the earlier checkpoint or its singular values.
UPDATE: dict[str, Callable[[Tensor, Tensor], float]] = {
    "update_norm": relative_norm,
    "update_effective_rank": lambda delta, _: effective_rank(delta) / delta.numel(),
    "update_stable_rank": lambda delta, _: stable_rank(delta),
}
ACTIVATION = {
    "activation_l2": "l2",
    "activation_cosine": "cosine",
    "activation_cka": "cka",
    "activation_cka_debiased": "cka_debiased",
}
# All hidden states of both models are held for one batch: at 60M parameters less than 200 MiB for so many tokens.
BATCH_TOKENS = 512


def weight_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 7–10."""
    return _target_rows(at, {m: {name: WEIGHT[m](sigma) for name, sigma in at.target_values.items()} for m in wanted})


def update_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 11–13, of the change since the previous checkpoint."""
    return _update_rows(at, at.previous_step, wanted)


def total_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 11–13 of the change since the run's first checkpoint."""
    first = at.trajectory.steps[0]
    return _update_rows(at, None if first == at.step else first, wanted)


def _update_rows(at: StepContext, start: int | None, wanted: set[str]) -> list[Row]:
    if start is None:
        return first_checkpoint_rows(wanted)
    run = at.trajectory

    def measure(module: str) -> dict[str, float]:
        new, old = run.low_rank_factors(at.step, module), run.low_rank_factors(start, module)
        if new is not None and old is not None:
            delta, earlier = product_singular_values(*difference_factors(new, old)), product_singular_values(*old)
        else:
            earlier = run.dense_weight(start, module)
            delta = singular_values(run.dense_weight(at.step, module) - earlier)
        return {metric: UPDATE[metric.removeprefix("total_")](delta, earlier) for metric in wanted}

    found = at.map_targets(measure)
    values = {metric: {name: row[metric] for name, row in found.items()} for metric in wanted}
    return _target_rows(at, values, settings={"from_step": start})


def overlap_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Overlap of the top-k singular subspaces of W and of ΔW with the baseline's, mean of left and right."""
    base = at.baseline_for_comparison()
    count = at.settings.overlap.count
    rest: dict[str, Any] = {"settings": at.settings.overlap.request(), "baseline": base.run.name}
    rows = []
    if "update_overlap" in wanted and at.previous_step not in base.steps:
        reason = UNDEFINED + "the first checkpoint has none before it"
        if at.previous_step is not None:
            reason = f"baseline {base.run.name} has no checkpoint of step {at.previous_step}"
        rows.append(Row(metric="update_overlap", reason=reason, **rest))
        wanted = wanted - {"update_overlap"}

    def overlap(ours: Tensor, theirs: Tensor) -> float:
        if not bool(ours.any()) or not bool(theirs.any()):
            return math.nan
        (_, u, v), (_, other_u, other_v) = singular_vectors(ours, count), singular_vectors(theirs, count)
        return (subspace_overlap(u, other_u) + subspace_overlap(v, other_v)) / 2

    def overlaps(name: str) -> dict[str, float]:
        values = {}
        ours, theirs = (run.dense_weight(at.step, name) for run in (at.trajectory, base))
        if "weight_overlap" in wanted:
            values["weight_overlap"] = overlap(ours, theirs)
        if "update_overlap" in wanted:
            ours = ours - at.trajectory.dense_weight(at.previous_step, name)
            values["update_overlap"] = overlap(ours, theirs - base.dense_weight(at.previous_step, name))
        return values

    found = at.map_targets(overlaps)
    return rows + _target_rows(at, {m: {name: row[m] for name, row in found.items()} for m in wanted}, **rest)


def _target_rows(at: StepContext, values: dict[str, dict[str, float]], **rest: Any) -> list[Row]:
    """Rows of every target and of the model, from values by metric and target."""
    rest |= {"kind": "target", "undefined": "the matrix is zero"}
    if at.trajectory.dense_weight_kind != "exact":
        rest["remark"] = "surrogate: the product of the factors, as the layer between them is not linear"
    return [row for metric in sorted(values) for row in scope_rows(metric, values[metric], **rest)]


def activation_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Metrics 14–16, of every layer (`hidden_states.0` is the embedding's output) and of the model, their mean."""
    base = at.baseline_for_comparison()
    batches = at.run.token_loss(min(at.settings.batch_tokens, BATCH_TOKENS)).batches(at.model)
    layers = activation_similarity(at.model, at.baseline_model, batches, shards=at.run.placement.shards)
    at.run.tick()
    rows = []
    for metric in sorted(wanted):
        rows += scope_rows(
            metric,
            {f"hidden_states.{i}": getattr(layer, ACTIVATION[metric]) for i, layer in enumerate(layers)},
            kind="layer",
            undefined="the layer is constant over the positions",
            settings=at.run.evaluated_on,
            baseline=base.run.name,
        )
    return rows


def dimension_settings(run: RunContext, metric: str) -> dict[str, Any]:
    """The settings of `intrinsic_dimension`."""
    return {**run.settings.dimension.request(), **run.evaluated_on}


def dimension_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """TwoNN's intrinsic dimension of every layer's hidden states at random positions, and their mean."""
    chosen, loss = at.settings.dimension, at.run.token_loss(min(at.settings.batch_tokens, BATCH_TOKENS))
    positions = random_positions(int((loss.attention_mask == 1).sum()), chosen.points, chosen.seed)
    layers = sampled_hidden_states(at.model, loss.batches(at.model), positions, shards=at.run.placement.shards)
    at.run.tick()

    def estimate(x_ND: Tensor) -> Estimate | None:
        """None for fewer than 20 distinct points."""
        distinct = len(x_ND.unique(dim=0))
        return intrinsic_dimension(x_ND, discard=chosen.discard) if distinct >= 20 else None

    found = {f"hidden_states.{i}": one for i, one in enumerate(at.run.placement.map(estimate, layers))}
    rows = scope_rows(
        "intrinsic_dimension",
        {scope: math.nan if one is None else one.value for scope, one in found.items()},
        kind="layer",
        undefined="the layer has fewer than 20 distinct positions",
        settings=dimension_settings(at.run, "intrinsic_dimension"),
    )
    return [_with_interval(row, found.get(row.scope)) for row in rows]


def _with_interval(row: Row, estimate: Estimate | None) -> Row:
    return row if estimate is None else replace(row, ci_low=estimate.low, ci_high=estimate.high, n=estimate.n)
