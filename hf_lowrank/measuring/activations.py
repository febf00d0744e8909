"""Metrics 14–16: hidden states against the baseline's at the same step."""

from __future__ import annotations

import math

from hf_lowrank.geometry import activation_similarity
from hf_lowrank.measuring.context import Row, StepContext
from hf_lowrank.runs.measurements import UNDEFINED

# All hidden states of both models are held for one batch: so many tokens keep that below 200 MiB at 60M parameters.
BATCH_TOKENS = 512
FIELDS = {
    "activation_l2": "l2",
    "activation_cosine": "cosine",
    "activation_cka": "cka",
    "activation_cka_debiased": "cka_debiased",
}


def activation_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """A row for each layer (`hidden_states.0` is the embedding's output) and their mean for the model."""
    base = at.baseline_for_comparison()
    batches = at.run.token_loss(min(at.settings.batch_tokens, BATCH_TOKENS)).batches(at.model)
    layers = activation_similarity(at.model, at.plain_baseline_model, batches, team=at.run.placement.team)
    at.run.tick()
    rows = []
    for metric in sorted(wanted):
        values = {f"hidden_states.{i}": getattr(layer, FIELDS[metric]) for i, layer in enumerate(layers)}
        finite = [value for value in values.values() if math.isfinite(value)]
        values["model"] = sum(finite) / len(finite) if finite else math.nan
        for scope, value in values.items():
            reason = None if math.isfinite(value) else UNDEFINED + "the layer is constant over the positions"
            rows.append(
                Row(
                    metric=metric,
                    scope=scope,
                    value=value,
                    settings=at.run.evaluated_on,
                    baseline=base.run.name,
                    reason=reason,
                )
            )
    return rows
