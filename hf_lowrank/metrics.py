"""The table of metrics: what can be asked for, what it means, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_lowrank.errors import UserError, nearest

Dimension = Literal["loss", "landscape", "interpolation", "spectra", "activations"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One quantity.

    Attributes:
        id: what commands and the `metric` column say.
        dimension: the part of the picture it belongs to.
        group: metrics of one group come from one computation and are measured together.
        title: how tables and pictures spell it.
        summary: one sentence.
        better: which way is commonly held better; None where neither is.
        unit: "nats", "1" for pure numbers, …
        needs_baseline: whether it compares with the full-rank run at the same step.
        extra: not one of the sixteen; measured when named (or by `metrics="all"`).
    """

    id: str
    dimension: Dimension
    group: str
    title: str
    summary: str
    better: Literal["higher", "lower"] | None = None
    unit: str = "1"
    needs_baseline: bool = False
    extra: bool = False


class MetricTable(Mapping[str, Metric]):
    """Metrics by id, in the order of their numbers; an unknown id is a `UserError` with the nearest spellings."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = {metric.id: metric for metric in metrics}

    def __getitem__(self, name: str) -> Metric:
        try:
            return self._metrics[name]
        except KeyError:
            raise UserError(f"unknown metric {name!r}; {nearest(name, self._metrics)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._metrics

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)

    @property
    def sixteen(self) -> list[str]:
        """Ids of the sixteen, in order."""
        return [metric.id for metric in self._metrics.values() if not metric.extra]

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
                chosen.update(self._metrics)
                continue
            members = [m.id for m in self._metrics.values() if name in (m.dimension, m.group) and not m.extra]
            members = members or [m.id for m in self._metrics.values() if name in (m.dimension, m.group)]
            chosen.update({name} if name in self._metrics else members or {self[name].id})
        return [name for name in self._metrics if name in chosen]


def _metric(name: str, dimension: Dimension, group: str, title: str, summary: str, **rest: Any) -> Metric:
    return Metric(id=name, dimension=dimension, group=group, title=title, summary=summary, **rest)


_LOWER: dict[str, Any] = {"better": "lower", "unit": "nats"}
_EXTRA_BASED: dict[str, Any] = {"extra": True, "needs_baseline": True}

METRICS = MetricTable(
    [
        _metric("random_sharpness", "landscape", "random", "Random sharpness",
                "Mean rise of the loss under Gaussian perturbations of all weights.", **_LOWER),
        _metric("random_variance", "landscape", "random", "Random variance",
                "Variance of the loss over random directions, averaged over the grid.", better="lower", unit="nats²"),
        _metric("pca1_sharpness", "landscape", "pca", "PCA-1 sharpness",
                "Mean rise of the loss along the top principal direction of the weights.", **_LOWER),
        _metric("pcak_sharpness", "landscape", "pca", "PCA-K sharpness",
                "Mean rise of the loss along the top K principal directions of the weights.", **_LOWER),
        _metric("step_barrier", "interpolation", "step", "Step barrier",
                "Highest loss between consecutive checkpoints above the mean of the two.", **_LOWER),
        _metric("method_barrier", "interpolation", "method", "Method barrier",
                "Highest loss between the run's and the baseline's dense weights above the mean of the two.",
                needs_baseline=True, **_LOWER),
        _metric("weight_effective_rank", "spectra", "weight", "Weight effective rank",
                "exp of the entropy of the weight's normalised singular values, over min(m, n)."),
        _metric("weight_stable_rank", "spectra", "weight", "Weight stable rank",
                "Squared Frobenius norm of the weight over its squared largest singular value."),
        _metric("weight_spectral_gap", "spectra", "weight", "Weight spectral gap",
                "(σ₁ − σ₂)/σ₁ of the weight."),
        _metric("weight_sv_fraction", "spectra", "weight", "Weight σ > 0.1",
                "Share of the weight's singular values above 0.1."),
        _metric("update_norm", "spectra", "update", "Update norm",
                "Frobenius norm of the change since the last checkpoint over that of the weight."),
        _metric("update_effective_rank", "spectra", "update", "Update effective rank",
                "exp of the entropy of the change's normalised singular values, over min(m, n)."),
        _metric("update_stable_rank", "spectra", "update", "Update stable rank",
                "Squared Frobenius norm of the change over its squared largest singular value."),
        _metric("activation_l2", "activations", "activations", "Activation distance",
                "Distance of hidden states from the baseline's over the baseline's mean norm.", needs_baseline=True),
        _metric("activation_cosine", "activations", "activations", "Activation cosine",
                "Mean cosine of hidden states with the baseline's.", needs_baseline=True),
        _metric("activation_cka", "activations", "activations", "Activation CKA",
                "Linear centred kernel alignment of hidden states with the baseline's.", needs_baseline=True),
        _metric("loss", "loss", "loss", "Validation loss",
                "Mean negative log-likelihood per token on the held-out sequences.", extra=True, **_LOWER),
        _metric("perplexity", "loss", "loss", "Perplexity", "exp of the validation loss.", extra=True, better="lower"),
        _metric("step_barrier_interpolated", "interpolation", "step", "Step barrier (interpolated)",
                "As step_barrier, above the line between the end points' losses.", extra=True, **_LOWER),
        _metric("method_barrier_interpolated", "interpolation", "method", "Method barrier (interpolated)",
                "As method_barrier, above the line between the end points' losses.", **_EXTRA_BASED, **_LOWER),
        _metric("aligned_method_barrier", "interpolation", "aligned", "Aligned method barrier",
                "As method_barrier, after permuting the baseline's hidden units to match.", **_EXTRA_BASED, **_LOWER),
        _metric("weight_tail_exponent", "spectra", "weight", "Weight tail exponent",
                "Exponent of the power law of the largest squared singular values.", extra=True),
        _metric("weight_overlap", "spectra", "overlap", "Weight subspace overlap",
                "Overlap of the weight's top singular subspaces with the baseline's.", **_EXTRA_BASED),
        _metric("update_overlap", "spectra", "overlap", "Update subspace overlap",
                "Overlap of the change's top singular subspaces with the baseline's.", **_EXTRA_BASED),
        _metric("total_update_norm", "spectra", "total", "Total update norm",
                "As update_norm, since the first checkpoint.", extra=True),
        _metric("total_update_effective_rank", "spectra", "total", "Total update effective rank",
                "As update_effective_rank, since the first checkpoint.", extra=True),
        _metric("total_update_stable_rank", "spectra", "total", "Total update stable rank",
                "As update_stable_rank, since the first checkpoint.", extra=True),
        _metric("activation_cka_debiased", "activations", "activations", "Debiased CKA",
                "As activation_cka, by the debiased estimator.", **_EXTRA_BASED),
        _metric("hessian_top", "landscape", "hessian", "Hessian top eigenvalue",
                "Largest eigenvalue of the loss's Hessian, by Lanczos.", extra=True, **_LOWER),
        _metric("hessian_trace", "landscape", "hessian", "Hessian trace",
                "Trace of the loss's Hessian, by Hutchinson's estimator.", extra=True, **_LOWER),
        _metric("critical_sharpness", "landscape", "critical", "Critical sharpness",
                "2 over the smallest step along the gradient that no longer lowers the loss.", extra=True, **_LOWER),
        _metric("random_plane", "landscape", "plane", "Loss landscape",
                "Loss on the plane of two filter-normalised directions, a row for each point.",
                extra=True, unit="nats"),
    ]
)  # fmt: skip

# Sweeps that come with a metric, for pictures: a row for each offset, never asked for by themselves.
CURVES = {
    "random_curve": "random_sharpness",
    "pca1_curve": "pca1_sharpness",
    "pcak_curve": "pcak_sharpness",
    "step_path": "step_barrier",
    "method_path": "method_barrier",
    "aligned_method_path": "aligned_method_barrier",
}
