"""The table of metrics: what can be measured, what it means, and which way is better.

Everything that is said about a metric is said here: commands, tables, pictures, the report and the cards read it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from hf_lowrank.errors import UserError, nearest

Dimension = Literal["loss", "landscape", "interpolation", "spectra", "activations", "downstream"]
Section = Literal["training", "landscape", "interpolation", "spectra", "activations", "downstream", "extras"]

# The report's sections and their titles, in order.
SECTIONS: dict[Section, str] = {
    "training": "Training",
    "landscape": "Loss landscape",
    "interpolation": "Interpolation",
    "spectra": "Spectra",
    "activations": "Activations",
    "downstream": "Downstream",
    "extras": "Extras",
}


@dataclass(frozen=True)
class Metric:
    """One quantity.

    Attributes:
        id: its name in commands and in the `metric` column.
        dimension: the aspect of a solution that it describes.
        group: metrics of one group come from one computation and are measured together.
        title: its name in tables and pictures.
        short: its name in narrow columns; the title if empty.
        summary: one sentence: what it is and how to read it.
        better: which way is commonly held better; None where neither is.
        unit: "nats", "share" (of a whole), …; empty for plain numbers.
        needs_baseline: whether it compares with the full-rank run at the same step.
        extra: not one of the sixteen; measured when named (or by `metrics="all"`).
        reference: what its numbers are relative to, as rows record it. Rows that do not are by an earlier definition,
            and do not count.
    """

    id: str
    dimension: Dimension
    group: str
    title: str
    short: str
    summary: str
    better: Literal["higher", "lower"] | None = None
    unit: str = ""
    needs_baseline: bool = False
    extra: bool = False
    reference: str = ""

    @property
    def short_title(self) -> str:
        """Its name in narrow columns."""
        return self.short or self.title

    @property
    def title_with_unit(self) -> str:
        """`Random sharpness (nats)`, for axes and headings."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def section(self) -> Section:
        """The report's section that shows it."""
        if self.dimension == "loss":
            return "training"
        return "extras" if self.extra else self.dimension


@dataclass(frozen=True)
class Sweep:
    """A curve that is measured along with a metric, one row for each offset; never requested by itself.

    Attributes:
        dimension, title: as for a metric.
        axis: the label of its x axis.
        metrics: the metrics that summarize it; the first is the one it is measured with.
        summary: one sentence on how to read the curve.
    """

    dimension: Literal["landscape", "interpolation"]
    title: str
    axis: str
    metrics: tuple[str, ...]
    summary: str


class MetricTable(dict[str, Metric]):
    """Metrics by id, in the order of their numbers; an unknown id is a `UserError` with the nearest spellings."""

    def __missing__(self, name: str) -> Metric:
        raise UserError(f"unknown metric {name!r}; {nearest(name, self)}")

    @property
    def sixteen(self) -> list[str]:
        """Ids of the sixteen, in order."""
        return [metric.id for metric in self.values() if not metric.extra]

    def select(self, names: str | Iterable[str] | None) -> list[str]:
        """Ids for None (loss, perplexity and the sixteen), "all", or a list of ids, dimensions and groups.

        Raises:
            UserError: a name is none of these.
        """
        if names is None:
            return ["loss", "perplexity", *self.sixteen]
        wanted = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names)
        chosen: set[str] = set()
        for name in wanted:
            if name == "all":
                chosen.update(self)
                continue
            members = [metric for metric in self.values() if name in (metric.dimension, metric.group)]
            members = [metric for metric in members if not metric.extra] or members
            chosen.update([self[name].id] if name in self or not members else [metric.id for metric in members])
        return [name for name in self if name in chosen]


_NATS: dict[str, Any] = {"better": "lower", "unit": "nats"}
_SHARE: dict[str, Any] = {"unit": "share"}
_BASED: dict[str, Any] = {"needs_baseline": True}
_EXTRA: dict[str, Any] = {"extra": True}
_CHORD: dict[str, Any] = {"reference": "chord"}
_EARLIER: dict[str, Any] = {"reference": "earlier checkpoint"}

_ENTRIES = (
    Metric("random_sharpness", "landscape", "random", "Random sharpness", "",
           "Mean rise of the loss when all weights take a random step; higher means a narrower valley.", **_NATS),
    Metric("random_variance", "landscape", "random", "Random variance", "",
           "Variance of the loss over random directions; near zero, all directions are alike.",
           better="lower", unit="nats²"),
    Metric("pca1_sharpness", "landscape", "pca", "PCA-1 sharpness", "",
           "Mean rise of the loss along the top singular direction of every weight matrix at once.", **_NATS),
    Metric("pcak_sharpness", "landscape", "pca", "PCA-K sharpness", "",
           "Mean rise of the loss along the top K singular directions of the weights, averaged over them.",
           **_NATS),
    Metric("step_barrier", "interpolation", "step", "Step barrier", "",
           "Highest rise of the loss above the chord on the straight line from the previous checkpoint to this one; "
           "0 where there is no hill.", **_CHORD, **_NATS),
    Metric("method_barrier", "interpolation", "method", "Method barrier", "",
           "Highest rise of the loss above the chord on the straight line between this run's and the baseline's dense "
           "weights at the same step; 0 means one basin.", **_CHORD, **_BASED, **_NATS),
    Metric("weight_effective_rank", "spectra", "weight", "Weight effective rank", "Eff. rank W",
           "exp of the entropy of a weight's normalised singular values, over min(m, n): 1 is a flat spectrum, "
           "near 0 one direction.", **_SHARE),
    Metric("weight_stable_rank", "spectra", "weight", "Weight stable rank", "Stable rank W",
           "Squared Frobenius norm of a weight over its squared largest singular value; small where one "
           "direction dominates."),
    Metric("weight_spectral_gap", "spectra", "weight", "Weight spectral gap", "Spectral gap W",
           "How far a weight's largest singular value exceeds the second: (σ₁ − σ₂)/σ₁.", **_SHARE),
    Metric("weight_sv_fraction", "spectra", "weight", "Singular values above 0.1", "σ > 0.1",
           "Share of a weight's singular values above 0.1.", **_SHARE),
    Metric("update_norm", "spectra", "update", "Update norm", "",
           "Frobenius norm of the change since the previous checkpoint, relative to that of the previous weight.",
           **_EARLIER, **_SHARE),
    Metric("update_effective_rank", "spectra", "update", "Update effective rank", "Eff. rank ΔW",
           "Effective rank of the change since the previous checkpoint, over min(m, n).", **_SHARE),
    Metric("update_stable_rank", "spectra", "update", "Update stable rank", "Stable rank ΔW",
           "Stable rank of the change since the previous checkpoint; small where one direction dominates."),
    Metric("activation_l2", "activations", "activations", "Activation distance", "Activation L2",
           "Distance of the hidden states from the baseline's on the same tokens, relative to the baseline's "
           "mean norm.", **_BASED, **_SHARE),
    Metric("activation_cosine", "activations", "activations", "Activation cosine", "Cosine",
           "Mean cosine between the hidden states and the baseline's on the same tokens; 1 is the same "
           "direction.", **_BASED),
    Metric("activation_cka", "activations", "activations", "Activation CKA", "CKA",
           "Linear centred kernel alignment of the hidden states with the baseline's; 1 is the same up to "
           "rotation and scale.", **_BASED),
    Metric("loss", "loss", "loss", "Validation loss", "Val. loss",
           "Mean negative log-likelihood per held-out token; lower is better.", **_EXTRA, **_NATS),
    Metric("perplexity", "loss", "loss", "Perplexity", "",
           "The exponential of the validation loss; lower is better.", **_EXTRA, better="lower"),
    Metric("step_imib", "interpolation", "step", "Step IMIB", "",
           "Highest loss inside the step barrier's path, above the mean of both ends: often positive without a hill. "
           "For comparison with arXiv 2605.13652.", **_EXTRA, **_NATS),
    Metric("method_imib", "interpolation", "method", "Method IMIB", "",
           "Highest loss inside the method barrier's path, above the mean of both ends. For comparison with arXiv "
           "2605.13652.", **_EXTRA, **_BASED, **_NATS),
    Metric("aligned_method_barrier", "interpolation", "aligned", "Aligned method barrier", "",
           "As the method barrier, after permuting the baseline's hidden units to match.",
           **_EXTRA, **_CHORD, **_BASED, **_NATS),
    Metric("curved_method_barrier", "interpolation", "curved", "Curved method barrier", "",
           "As the method barrier, along a curve whose middle point was trained: a hill that it goes around does not "
           "separate basins.", **_EXTRA, **_CHORD, **_BASED, **_NATS),
    Metric("weight_tail_exponent", "spectra", "weight", "Weight tail exponent", "",
           "Exponent of the power law of a weight's largest squared singular values; lower is a heavier tail.",
           **_EXTRA),
    Metric("weight_overlap", "spectra", "overlap", "Weight subspace overlap", "",
           "Overlap of a weight's top singular subspaces with the baseline's; 1 is the same subspace.",
           **_EXTRA, **_BASED, **_SHARE),
    Metric("update_overlap", "spectra", "overlap", "Update subspace overlap", "",
           "Overlap of the change's top singular subspaces with the baseline's; 1 is the same subspace.",
           **_EXTRA, **_BASED, **_SHARE),
    Metric("total_update_norm", "spectra", "total", "Total update norm", "",
           "As the update norm, since the first checkpoint and relative to it.", **_EXTRA, **_EARLIER, **_SHARE),
    Metric("total_update_effective_rank", "spectra", "total", "Total update effective rank", "",
           "As the update effective rank, since the first checkpoint.", **_EXTRA, **_SHARE),
    Metric("total_update_stable_rank", "spectra", "total", "Total update stable rank", "",
           "As the update stable rank, since the first checkpoint.", **_EXTRA),
    Metric("activation_cka_debiased", "activations", "activations", "Debiased CKA", "",
           "As activation CKA, by the estimator that few positions do not push towards 1.", **_EXTRA, **_BASED),
    Metric("hessian_top", "landscape", "hessian", "Hessian top eigenvalue", "",
           "Largest eigenvalue of the loss's Hessian, by Lanczos: the sharpest curvature in any direction. It has no "
           "interval; a remark gives the residual, within which an eigenvalue lies.",
           **_EXTRA, **_NATS),
    Metric("hessian_trace", "landscape", "hessian", "Hessian trace", "",
           "Trace of the loss's Hessian, by Hutchinson's estimator: the sum of its curvatures.",
           **_EXTRA, **_NATS),
    Metric("gradient_noise_scale", "landscape", "noise", "Gradient noise scale", "Noise scale",
           "Batch size at which the gradient's noise equals its signal, from gradients on held-out sequences.",
           **_EXTRA, unit="sequences"),
    Metric("intrinsic_dimension", "activations", "dimension", "Intrinsic dimension", "",
           "TwoNN's estimate of the dimension of the surface that a layer's hidden states lie near.", **_EXTRA),
    Metric("critical_sharpness", "landscape", "critical", "Critical sharpness", "",
           "2 over the smallest step along the gradient that no longer lowers the loss.",
           **_EXTRA, better="lower"),
    Metric("random_plane", "landscape", "plane", "Loss landscape", "",
           "Loss on the plane of two filter-normalised directions, one row for each point.",
           **_EXTRA, unit="nats"),
)  # fmt: skip
METRICS = MetricTable({metric.id: metric for metric in _ENTRIES})
"""Every metric by its id: the sixteen in their order, then the extras."""


def reference_of(name: str) -> dict[str, str]:
    """The setting that rows of a metric record about its reference; empty where it has none, or for another row."""
    reference = METRICS[name].reference if name in METRICS else ""
    return {"reference": reference} if reference else {}


# Not measured on weights: computed from the table of downstream scores.
DOWNSTREAM = Metric(
    "downstream", "downstream", "downstream", "Mean above-chance score", "Above chance",
    "Mean above-chance score over the tasks that all scored runs have: 0 is guessing, 1 is every item right; higher "
    "is better.", better="higher",
)  # fmt: skip

CURVES = {
    "random_curve": Sweep(
        "landscape", "Loss along random directions", "distance", ("random_sharpness", "random_variance"),
        "Mean over random directions with its 95 % interval; zero is the trained model.",
    ),
    "pca1_curve": Sweep(
        "landscape", "Loss along the top PCA direction", "distance", ("pca1_sharpness",),
        "A step along the top singular direction of every matrix at once; zero is the trained model.",
    ),
    "pcak_curve": Sweep(
        "landscape", "Loss along the top K PCA directions", "distance", ("pcak_sharpness",),
        "Mean over the top K singular directions with its 95 % interval; zero is the trained model.",
    ),
    "step_path": Sweep(
        "interpolation", "Path from the previous checkpoint", "position on the path", ("step_barrier",),
        "The straight line from the weights of the previous checkpoint (0) to those of this one (1).",
    ),
    "method_path": Sweep(
        "interpolation", "Path to the baseline", "position on the path", ("method_barrier",),
        "The straight line from a run's weights (0) to the baseline's (1); both ends are trained models.",
    ),
    "curved_method_path": Sweep(
        "interpolation", "Curved path to the baseline", "position on the path", ("curved_method_barrier",),
        "A curve of low loss between the same two models, its middle point trained on other held-out sequences.",
    ),
    "aligned_method_path": Sweep(
        "interpolation", "Path to the baseline, hidden units aligned", "position on the path",
        ("aligned_method_barrier",),
        "The same with the baseline's hidden units permuted to match: a hill that stays is not just a "
        "renaming of units.",
    ),
}  # fmt: skip
PLANE = "random_plane"
# The losses of single directions behind a sweep, one row for each, by the sweep's curve.
DIRECTIONS = {"random_curve": "random_draw", "pcak_curve": "pca_direction"}
# Measured point by point: neither a column of a table nor a trend.
POINTWISE = frozenset({*CURVES, *DIRECTIONS.values(), PLANE, "pca_plane"})


# Behind a name or a number that was measured by moving the parameters that an adapted model stores.
NOT_DENSE_MARK = "†"
NOT_DENSE_MEANING = "moves the model's own parameters instead of dense weights: not comparable with the others"


def moves_weights(name: str) -> bool:
    """Whether a metric or curve moves the weights of one run, in the space of the settings."""
    about = CURVES.get(name) or METRICS.get(name)
    return about is not None and (about.dimension == "landscape" or name.startswith("step_"))


def describe(name: str) -> Metric:
    """The entry of a metric in a table of results; one that is unknown here gets a plain entry among the extras."""
    if name in METRICS:
        return METRICS[name]
    if name == DOWNSTREAM.id:
        return DOWNSTREAM
    title = name.replace("_", " ").capitalize()
    return Metric(name, "landscape", "", title, "", "An extra beyond the sixteen.", **_EXTRA)


def metric_order(name: str) -> tuple[int, int, str]:
    """A sort key: by section of the report, the sixteen in their order, unknown metrics last by name."""
    known = list(METRICS)
    position = known.index(name) if name in METRICS else len(known)
    return list(SECTIONS).index(describe(name).section), position, name


def markdown_table() -> str:
    """The sixteen as the Markdown table that the documents show."""
    entries = [METRICS[name] for name in METRICS.sixteen]
    rows = [f"| `{one.id}` | {one.summary} | {one.better or 'neither'} |" for one in entries]
    return "\n".join(["| metric | what it is | better |", "|---|---|---|", *rows])
