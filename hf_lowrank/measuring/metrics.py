"""The table of metrics: what can be asked for, what it means, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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


def _spectral(prefix: str, what: str) -> list[Metric]:
    update = prefix == "update"
    metrics = [
        Metric(id=f"{prefix}_effective_rank", dimension="spectra", group=prefix, title=f"{what} effective rank",
               summary=f"exp of the entropy of the normalised singular values of {what.lower()}, by min(m, n)."),
        Metric(id=f"{prefix}_stable_rank", dimension="spectra", group=prefix, title=f"{what} stable rank",
               summary=f"Squared Frobenius norm over squared largest singular value of {what.lower()}."),
    ]  # fmt: skip
    if update:
        norm = Metric(
            id="update_norm",
            dimension="spectra",
            group="update",
            title="Update norm",
            summary="Frobenius norm of the change since the last checkpoint over that of the weight.",
        )
        return [norm, *metrics]
    return [
        *metrics,
        Metric(id="weight_spectral_gap", dimension="spectra", group="weight", title="Weight spectral gap",
               summary="(σ₁ − σ₂)/σ₁ of the weight."),
        Metric(id="weight_sv_fraction", dimension="spectra", group="weight", title="Weight σ > 0.1",
               summary="Share of the weight's singular values above 0.1."),
    ]  # fmt: skip


METRICS = MetricTable(
    [
        Metric(id="random_sharpness", dimension="landscape", group="random", title="Random sharpness", better="lower",
               unit="nats", summary="Mean rise of the loss under Gaussian perturbations of all weights."),
        Metric(id="random_variance", dimension="landscape", group="random", title="Random variance", better="lower",
               unit="nats²", summary="Variance of the loss over Gaussian directions, averaged over the grid."),
        *_spectral("weight", "Weight"),
        *_spectral("update", "Update"),
        Metric(id="loss", dimension="loss", group="loss", title="Validation loss", better="lower", unit="nats",
               extra=True, summary="Mean negative log-likelihood per token on the held-out sequences."),
        Metric(id="perplexity", dimension="loss", group="loss", title="Perplexity", better="lower", extra=True,
               summary="exp of the validation loss."),
        Metric(id="random_curve", dimension="landscape", group="random", title="Random loss curve", unit="nats",
               extra=True, summary="Mean loss over the random directions at one offset; with random_sharpness."),
    ]
)  # fmt: skip
