"""What the page says about each quantity: its name, its unit, its place, and how to read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dimension = Literal["training", "landscape", "interpolation", "spectra", "activations", "downstream", "extras"]
DIMENSIONS: dict[Dimension, str] = {
    "training": "Training",
    "landscape": "Loss landscape",
    "interpolation": "Interpolation",
    "spectra": "Spectra",
    "activations": "Activations",
    "downstream": "Downstream",
    "extras": "Extras",
}


@dataclass(frozen=True)
class Quantity:
    """A quantity of the page.

    Attributes:
        id: metric id, as in `measurements.jsonl`.
        title: its name in tables and above pictures.
        dimension: the section it belongs to.
        meaning: one sentence: what it is and how to read it.
        unit: shown with its name; empty for plain numbers.
        short: the name in narrow columns; the title if empty.
    """

    id: str
    title: str
    dimension: Dimension
    meaning: str
    unit: str = ""
    short: str = ""


_ALL = (
    Quantity(
        "loss",
        "Validation loss, as measured",
        "training",
        "Mean negative log-likelihood per held-out token; lower is better.",
        "nats",
        "Val. loss",
    ),
    Quantity("perplexity", "Perplexity", "training", "The exponential of the validation loss; lower is better."),
    Quantity(
        "random_sharpness",
        "Sharpness, random directions",
        "landscape",
        "How much the loss rises on average when all weights take a random step; higher means a narrower valley.",
        "nats",
        "Random sharpness",
    ),
    Quantity(
        "random_variance",
        "Variance, random directions",
        "landscape",
        "How differently the loss rises from one random direction to the next; near zero, all directions are alike.",
        "nats²",
        "Random variance",
    ),
    Quantity(
        "pca1_sharpness",
        "Sharpness, top PCA direction",
        "landscape",
        "How much the loss rises along the strongest singular direction of every matrix at once.",
        "nats",
        "PCA-1 sharpness",
    ),
    Quantity(
        "pcak_sharpness",
        "Sharpness, top K PCA directions",
        "landscape",
        "How much the loss rises along the strongest K singular directions, averaged over them.",
        "nats",
        "PCA-K sharpness",
    ),
    Quantity(
        "step_barrier",
        "Barrier between checkpoints",
        "interpolation",
        "The hill on the straight line from the checkpoint before to this one; at or below zero, there is none.",
        "nats",
        "Step barrier",
    ),
    Quantity(
        "method_barrier",
        "Barrier to the baseline",
        "interpolation",
        "The hill on the straight line from this run to the full-rank run at the same step; "
        "a high one means another basin.",
        "nats",
        "Method barrier",
    ),
    Quantity(
        "weight_effective_rank",
        "Effective rank of weights",
        "spectra",
        "How many directions a weight matrix spreads over, as a share of all it could use: 1 is flat, 0 is rank one.",
        "share",
        "Eff. rank W",
    ),
    Quantity(
        "weight_stable_rank",
        "Stable rank of weights",
        "spectra",
        "The squared norm over the squared largest singular value: small where one direction dominates.",
        "",
        "Stable rank W",
    ),
    Quantity(
        "weight_spectral_gap",
        "Spectral gap of weights",
        "spectra",
        "How far the largest singular value stands above the second, relative to the largest.",
        "share",
        "Spectral gap W",
    ),
    Quantity(
        "weight_sv_fraction",
        "Singular values above 0.1",
        "spectra",
        "The share of a matrix's singular values that are larger than 0.1.",
        "share",
        "σ > 0.1",
    ),
    Quantity(
        "update_norm",
        "Size of the update",
        "spectra",
        "How far the weights moved since the checkpoint before, relative to their own size.",
        "share",
        "Update norm",
    ),
    Quantity(
        "update_effective_rank",
        "Effective rank of updates",
        "spectra",
        "How many directions the change since the checkpoint before spreads over, as a share of all.",
        "share",
        "Eff. rank ΔW",
    ),
    Quantity(
        "update_stable_rank",
        "Stable rank of updates",
        "spectra",
        "The stable rank of the change since the checkpoint before: small where one direction dominates it.",
        "",
        "Stable rank ΔW",
    ),
    Quantity(
        "activation_l2",
        "Distance of activations",
        "activations",
        "How far the hidden states lie from the baseline's on the same tokens, relative to the baseline's size.",
        "share",
        "Activation L2",
    ),
    Quantity(
        "activation_cosine",
        "Cosine of activations",
        "activations",
        "The mean cosine between the hidden states and the baseline's on the same tokens; 1 is the same direction.",
        "",
        "Cosine",
    ),
    Quantity(
        "activation_cka",
        "CKA of activations",
        "activations",
        "How alike the two runs' representations are, whatever their rotation and scale; 1 is the same.",
        "",
        "CKA",
    ),
    Quantity(
        "downstream",
        "Mean above-chance score",
        "downstream",
        "Over the tasks that all scored runs have: 0 is guessing, 1 is every item right; higher is better.",
        "",
        "Above chance",
    ),
    Quantity(
        "weight_tail_exponent",
        "Tail exponent of weights",
        "extras",
        "How fast the largest singular values fall off, as the exponent of a power law; lower is a heavier tail.",
        "",
    ),
    Quantity(
        "weight_overlap",
        "Overlap of weights with the baseline",
        "extras",
        "How much of the weights' strongest directions the baseline shares: 1 is the same subspace.",
        "share",
    ),
    Quantity(
        "update_overlap",
        "Overlap of updates with the baseline",
        "extras",
        "How much of the change's strongest directions the baseline's change shares: 1 is the same subspace.",
        "share",
    ),
    Quantity(
        "total_update_norm",
        "Distance from the start",
        "extras",
        "How far the weights have moved since the first checkpoint, relative to their size.",
        "share",
    ),
    Quantity(
        "total_update_effective_rank",
        "Effective rank of the whole change",
        "extras",
        "How many directions the change since the first checkpoint spreads over, as a share of all.",
        "share",
    ),
    Quantity(
        "total_update_stable_rank",
        "Stable rank of the whole change",
        "extras",
        "The stable rank of the change since the first checkpoint.",
        "",
    ),
    Quantity(
        "activation_cka_debiased",
        "CKA of activations, debiased",
        "extras",
        "As CKA, by the estimator that few positions do not push towards 1.",
        "",
    ),
    Quantity(
        "step_barrier_interpolated",
        "Barrier between checkpoints, above the line",
        "extras",
        "As the barrier, above the line between the two losses instead of above their mean.",
        "nats",
    ),
    Quantity(
        "method_barrier_interpolated",
        "Barrier to the baseline, above the line",
        "extras",
        "As the barrier, above the line between the two losses instead of above their mean.",
        "nats",
    ),
    Quantity(
        "aligned_method_barrier",
        "Barrier to the baseline, aligned",
        "extras",
        "The barrier after the baseline's hidden units were permuted to match.",
        "nats",
    ),
    Quantity(
        "hessian_top",
        "Top Hessian eigenvalue",
        "extras",
        "The sharpest curvature of the loss in any direction.",
        "nats",
    ),
    Quantity(
        "hessian_trace",
        "Hessian trace",
        "extras",
        "The sum of the loss's curvatures over all directions.",
        "nats",
    ),
    Quantity(
        "critical_sharpness",
        "Critical sharpness",
        "extras",
        "Two over the smallest step along the gradient that no longer lowers the loss.",
        "",
    ),
)
QUANTITIES: dict[str, Quantity] = {quantity.id: quantity for quantity in _ALL}


def quantity(metric: str) -> Quantity:
    """The entry of `metric`; a metric unknown here gets a plain one among the extras."""
    known = QUANTITIES.get(metric)
    return known or Quantity(metric, metric.replace("_", " ").capitalize(), "extras", "An extra beyond the sixteen.")


def quantity_order(metric: str) -> tuple[int, str]:
    """A sort key that follows the order of the sixteen, extras last by name."""
    known = list(QUANTITIES)
    return (known.index(metric), metric) if metric in QUANTITIES else (len(known), metric)
