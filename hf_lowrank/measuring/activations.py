"""Metrics 14–16: hidden states compared with those of the baseline at the same step."""

from __future__ import annotations

from hf_lowrank.geometry import activation_similarity
from hf_lowrank.measuring.context import StepContext
from hf_lowrank.measuring.rows import Row, scope_rows

# All hidden states of both models are held for one batch: at 60M parameters less than 200 MiB for so many tokens.
BATCH_TOKENS = 512
FIELDS = {
    "activation_l2": "l2",
    "activation_cosine": "cosine",
    "activation_cka": "cka",
    "activation_cka_debiased": "cka_debiased",
}


def activation_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Rows of every layer (`hidden_states.0` is the embedding's output) and of the model, their mean."""
    base = at.baseline_for_comparison()
    batches = at.run.token_loss(min(at.settings.batch_tokens, BATCH_TOKENS)).batches(at.model)
    layers = activation_similarity(at.model, at.plain_baseline_model, batches, shards=at.run.placement.shards)
    at.run.tick()
    rows = []
    for metric in sorted(wanted):
        rows += scope_rows(
            metric,
            {f"hidden_states.{i}": getattr(layer, FIELDS[metric]) for i, layer in enumerate(layers)},
            kind="layer",
            undefined="the layer is constant over the positions",
            settings=at.run.evaluated_on,
            baseline=base.run.name,
        )
    return rows
