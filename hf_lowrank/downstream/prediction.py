"""Does geometry add to perplexity in predicting downstream scores?

Two ridge regressions on the same checkpoints are compared, on log-perplexity alone and on log-perplexity and the
geometry metrics; both are evaluated on runs left out (`ridge.leave_one_group_out`). Pure statistics: no files, no
models.

The gain's interval resamples whole runs, since the checkpoints of a run are not independent. The permutation test
exchanges between runs the part of the geometry that log-perplexity and the step's mean do not explain, by the same
permutation at every step. Each run keeps its perplexity and its scores, and geometry keeps its trajectory within a run
and its relation to perplexity; only the link between a run's own geometry and its own scores is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from hf_lowrank.downstream.ridge import Array, Fold, leave_one_group_out
from hf_lowrank.errors import UserError
from hf_lowrank.statistics import spearman

FEWEST_RUNS = 8
PERMUTATIONS = 199
RESAMPLES = 2000


@dataclass(frozen=True)
class Table:
    """Checkpoints of R runs at the same S steps.

    Attributes:
        runs: names (R,).
        steps: (S,).
        metrics: names of the P geometry metrics.
        log_perplexity: (R, S).
        geometry: (R, S, P).
        target: (R, S), mean above-chance score.
        notes: what was left out, and why.
    """

    runs: Sequence[str]
    steps: Sequence[int]
    metrics: Sequence[str]
    log_perplexity: Array
    geometry: Array
    target: Array
    notes: list[str] = field(default_factory=list)

    def columns(self, metrics: Sequence[int] | None = None) -> Array:
        """(N, 1 + P) log-perplexity and the metrics (by default all), rows ordered by run, then step."""
        chosen = self.geometry if metrics is None else self.geometry[:, :, list(metrics)]
        both = np.concatenate([self.log_perplexity[:, :, None], chosen], axis=2)
        return both.reshape(-1, both.shape[2])

    @property
    def run_of_row(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.runs)), len(self.steps))


@dataclass(frozen=True)
class Coefficient:
    """A standardised coefficient: its mean and standard deviation over the fits, one for each run left out."""

    name: str
    mean: float
    spread: float


@dataclass(frozen=True)
class Ranked:
    """A single metric: R² by itself, and the gain in R² when it is added to log-perplexity."""

    metric: str
    r2_alone: float
    gain: float
    spearman: float


@dataclass(frozen=True)
class Prediction:
    """The result; R² and Spearman's ρ are over the checkpoints of runs left out.

    Attributes:
        runs, checkpoints: their numbers.
        r2_perplexity, r2_both, spearman_perplexity, spearman_both: of the two regressions.
        gain, gain_low, gain_high: R² of both minus R² of perplexity alone, with a 95 % interval over runs.
        p_value: fraction of permutations, the identity included, with a gain at least as large.
        coefficients: of the regression on both, largest first.
        ranking: single metrics, largest gain first.
        seen, predicted_perplexity, predicted_both: (N,) actual and predicted scores, by run, then step.
        notes: what was left out, and why.
    """

    runs: int
    checkpoints: int
    r2_perplexity: float
    r2_both: float
    spearman_perplexity: float
    spearman_both: float
    gain: float
    gain_low: float
    gain_high: float
    p_value: float
    coefficients: list[Coefficient]
    ranking: list[Ranked]
    seen: Array
    predicted_perplexity: Array
    predicted_both: Array
    notes: list[str]


def analyse(
    table: Table, *, permutations: int = PERMUTATIONS, resamples: int = RESAMPLES, seed: int = 0
) -> Prediction:
    """Both regressions, their gain, its interval and its permutation test.

    Metrics that are constant or not known at every checkpoint are left out, with a note.

    Raises:
        UserError: fewer than 8 runs, no metric, or the target does not vary.
    """
    if len(table.runs) < FEWEST_RUNS:
        raise UserError(f"prediction needs at least {FEWEST_RUNS} runs, got {len(table.runs)}")
    table = _with_usable_metrics(table)
    y, runs = table.target.reshape(-1), table.run_of_row
    if not np.isfinite(y).all() or np.ptp(y) <= 1e-12:
        raise UserError("the downstream scores do not vary between checkpoints, so there is nothing to predict")
    if not table.metrics:
        raise UserError("no geometry metric varies and is known at every checkpoint; " + "; ".join(table.notes))
    base, _ = leave_one_group_out(table.columns([]), y, runs)
    both, folds = leave_one_group_out(table.columns(), y, runs)
    gain = _r2(y, both) - _r2(y, base)
    low, high = gain_interval(table.target, base, both, resamples=resamples, seed=seed)
    return Prediction(
        runs=len(table.runs),
        checkpoints=len(y),
        r2_perplexity=_r2(y, base),
        r2_both=_r2(y, both),
        spearman_perplexity=spearman(y, base),
        spearman_both=spearman(y, both),
        gain=gain,
        gain_low=low,
        gain_high=high,
        p_value=permutation_p_value(table, gain, permutations=permutations, seed=seed),
        coefficients=_coefficients(table, folds),
        ranking=_ranking(table, y, runs, base),
        seen=y,
        predicted_perplexity=base,
        predicted_both=both,
        notes=list(table.notes),
    )


def _with_usable_metrics(table: Table) -> Table:
    """The table without metrics that are null somewhere or constant, with a note for each."""
    keep: list[int] = []
    notes = list(table.notes)
    for number, metric in enumerate(table.metrics):
        values = table.geometry[:, :, number]
        known: list[bool] = np.isfinite(values.min(axis=1)).tolist()
        if not all(known):
            missing = [run for run, has_value in zip(table.runs, known, strict=True) if not has_value]
            some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            notes.append(f"{metric} is null in {some}: left out")
        elif np.ptp(values) <= 1e-9 * max(1e-300, float(np.abs(values).max())):
            notes.append(f"{metric} is constant: left out")
        else:
            keep.append(number)
    metrics = [table.metrics[number] for number in keep]
    return replace(table, metrics=metrics, geometry=table.geometry[:, :, keep], notes=notes)


def gain_interval(
    target_RS: Array, base_N: Array, both_N: Array, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the gain by the studentised, symmetric bootstrap over runs.

    With few runs, percentiles of the bootstrap are too narrow; dividing each resample's deviation by its own standard
    error widens them as Student's t does. Resampling the errors of held-out runs ignores that other runs would give
    other regressions; the factor of Nadeau and Bengio (2003) for overlapping training sets, √(1 + R/(R − 1)), corrects
    for it.
    """
    runs = target_RS.shape[0]
    target_N = target_RS.reshape(-1)
    reduction = ((base_N - target_N) ** 2 - (both_N - target_N) ** 2).reshape(runs, -1).sum(1)
    total = ((target_RS - target_RS.mean()) ** 2).sum(1)
    picked = torch.randint(runs, (resamples, runs), generator=torch.Generator().manual_seed(seed)).numpy()
    gain = reduction.sum() / total.sum()
    error = float(_ratio_error(reduction[None], total[None])[0])
    values = reduction[picked].sum(1) / np.maximum(total[picked].sum(1), 1e-300)
    errors = _ratio_error(reduction[picked], total[picked])
    t = ((values - gain) / np.maximum(errors, 1e-300))[errors > 1e-9 * error]
    if not error or len(t) < resamples // 2:
        return float(gain), float(gain)
    half = float(np.quantile(np.abs(t), 0.95)) * math.sqrt(1 + runs / (runs - 1)) * error
    return float(gain - half), float(gain + half)


def _ratio_error(reduction_BR: Array, total_BR: Array) -> Array:
    """(B,) standard error of Σ reduction / Σ total over runs, by linearisation."""
    runs = reduction_BR.shape[1]
    sum_total = np.maximum(total_BR.sum(1, keepdims=True), 1e-300)
    residual = reduction_BR - reduction_BR.sum(1, keepdims=True) / sum_total * total_BR
    return np.sqrt((residual**2).sum(1) * runs / (runs - 1)) / sum_total[:, 0]


def permutation_p_value(table: Table, gain: float, *, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """Fraction of permutations of the geometry (see the module) with a gain of at least `gain`, itself included."""
    y, runs = table.target.reshape(-1), table.run_of_row
    base, _ = leave_one_group_out(table.columns([]), y, runs)
    explained, rest = _explained(table)
    generator = torch.Generator().manual_seed(seed)
    as_large = 1
    for _ in range(permutations):
        order = torch.randperm(len(table.runs), generator=generator).numpy()
        columns = np.concatenate([table.log_perplexity[:, :, None], explained + rest[order]], axis=2)
        both, _ = leave_one_group_out(columns.reshape(len(y), -1), y, runs)
        as_large += _r2(y, both) - _r2(y, base) >= gain
    return as_large / (permutations + 1)


def _explained(table: Table) -> tuple[Array, Array]:
    """The geometry (R, S, P) split into what log-perplexity and the step's mean explain, and the rest."""
    geometry = table.geometry
    level = geometry.mean(0, keepdims=True)
    predictor = table.log_perplexity - table.log_perplexity.mean(0, keepdims=True)
    weight = float((predictor**2).sum())
    slope = np.einsum("rs,rsp->p", predictor, geometry - level) / (weight if weight > 1e-300 else 1.0)
    explained = level + predictor[:, :, None] * slope
    return explained, geometry - explained


def _coefficients(table: Table, folds: Sequence[Fold]) -> list[Coefficient]:
    coefficients = np.stack([fold.coef_P for fold in folds])
    names = ["log_perplexity", *table.metrics]
    found = [Coefficient(n, float(c.mean()), float(c.std(ddof=1))) for n, c in zip(names, coefficients.T, strict=True)]
    return sorted(found, key=lambda c: -abs(c.mean))


def _ranking(table: Table, y: Array, runs: NDArray[np.int64], base: Array) -> list[Ranked]:
    found = []
    for number, metric in enumerate(table.metrics):
        alone, _ = leave_one_group_out(table.columns([number])[:, 1:], y, runs)
        joined, _ = leave_one_group_out(table.columns([number]), y, runs)
        found.append(Ranked(metric, _r2(y, alone), _r2(y, joined) - _r2(y, base), spearman(y, alone)))
    return sorted(found, key=lambda ranked: -ranked.gain)


def _r2(y: Array, predicted: Array) -> float:
    """1 − squared error / squared deviation from the mean; below 0 where the mean would predict better."""
    return float(1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum())
