"""Does geometry add to perplexity in predicting downstream scores?

Observations are nested: checkpoints in runs (seeds, learning rates, ranks), runs in methods. What is constant within
a method, such as the fingerprint of its geometry and its own score, makes one observation however many seeds it has.
So there are two questions, each with its own groups:

- *unseen method*: one method is left out at a time; the interval is a jackknife over methods, and the permutation test
  exchanges the methods' fingerprints.
- *unseen run*, of a known method: everything is centred within its method; one run is left out at a time, the interval
  is a jackknife over runs, and runs of the same method exchange their fingerprints.

Each compares two ridge regressions on the same checkpoints: log-perplexity with its square, and the same with the
geometry metrics. A fingerprint is the mean, over a group's checkpoints, of the geometry that log-perplexity and its
square do not explain; exchanging it keeps each group's perplexity, scores, and variation within the group, and cuts
only the link between a group's own geometry and its own scores. Pure statistics: no files, no models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hf_lowrank.downstream.ridge import Array, Fold, Integers, leave_one_group_out
from hf_lowrank.errors import UserError
from hf_lowrank.statistics import spearman, student_t_quantile

FEWEST_METHODS = 6
FEWEST_RUNS = 8
PERMUTATIONS = 199

QuestionName = Literal["unseen_method", "unseen_run"]


@dataclass(frozen=True)
class Table:
    """N checkpoints of R runs of M methods; runs may have different steps.

    Attributes:
        methods: names (M,).
        runs: names (R,).
        metrics: names of the P geometry metrics.
        method_R: each run's method.
        run_N: each checkpoint's run; every run has a checkpoint.
        step_N: each checkpoint's step.
        log_perplexity_N, geometry_NP: the predictors.
        target_N: mean above-chance score.
        notes: what was left out and why.
    """

    methods: Sequence[str]
    runs: Sequence[str]
    metrics: Sequence[str]
    method_R: Integers
    run_N: Integers
    step_N: Integers
    log_perplexity_N: Array
    geometry_NP: Array
    target_N: Array
    notes: Sequence[str] = field(default_factory=list)

    @property
    def method_N(self) -> Integers:  # noqa: N802
        """Each checkpoint's method."""
        return self.method_R[self.run_N]


@dataclass(frozen=True)
class Coefficient:
    """A standardised coefficient: its mean and standard deviation over the fits, one per group left out."""

    name: str
    mean: float
    spread: float


@dataclass(frozen=True)
class Ranked:
    """What one metric alone does: R² by itself, and the gain in R² when it joins log-perplexity."""

    metric: str
    r2_alone: float
    gain: float
    spearman: float


@dataclass(frozen=True)
class Answer:
    """The answer to one question; R² and Spearman's ρ are over the checkpoints of groups left out.

    Attributes:
        question: which of the two.
        methods, runs, checkpoints: how many the answer rests on.
        reason: why there is no answer; None where there is one. Without one all numbers are NaN or empty.
        r2_perplexity, r2_both, spearman_perplexity, spearman_both: of the two regressions.
        gain, gain_low, gain_high: R² of both minus R² of perplexity alone, with a 95 % interval over groups.
        p_value: share of exchanges (the identity included) with a gain as large.
        coefficients: of the regression on both, largest first.
        ranking: single metrics, largest gain first.
        rows: (n,) the checkpoints of the table that take part.
        observed, predicted_perplexity, predicted_both: (n,), centred within methods for *unseen run*.
    """

    question: QuestionName
    methods: int
    runs: int
    checkpoints: int
    reason: str | None = None
    r2_perplexity: float = math.nan
    r2_both: float = math.nan
    spearman_perplexity: float = math.nan
    spearman_both: float = math.nan
    gain: float = math.nan
    gain_low: float = math.nan
    gain_high: float = math.nan
    p_value: float = math.nan
    coefficients: Sequence[Coefficient] = ()
    ranking: Sequence[Ranked] = ()
    rows: Integers = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)
    observed: Array = field(default_factory=lambda: np.zeros(0), repr=False)
    predicted_perplexity: Array = field(default_factory=lambda: np.zeros(0), repr=False)
    predicted_both: Array = field(default_factory=lambda: np.zeros(0), repr=False)


@dataclass(frozen=True)
class Prediction:
    """Both answers, and what was left out."""

    unseen_method: Answer
    unseen_run: Answer
    notes: Sequence[str]

    @property
    def answers(self) -> tuple[Answer, Answer]:
        return self.unseen_method, self.unseen_run


@dataclass(frozen=True)
class Question:
    """The arrays of one question.

    Attributes:
        name: which of the two.
        metrics: names of the P metrics.
        rows: (n,) the checkpoints of the table that take part.
        base_nB: log-perplexity and its square.
        geometry_nP, target_n: the other columns.
        groups_n: what is left out together, 0 … G − 1.
        weights_n: of the checkpoints within their groups.
        strata_G: groups are resampled and exchanged only within equal numbers.
    """

    name: QuestionName
    metrics: Sequence[str]
    rows: Integers
    base_nB: Array
    geometry_nP: Array
    target_n: Array
    groups_n: Integers
    weights_n: Array
    strata_G: Integers

    @cached_property
    def share_n(self) -> Array:
        """Weights with which every group counts the same."""
        return self.weights_n / np.bincount(self.groups_n, self.weights_n)[self.groups_n]

    def predictions(self, *columns: Array) -> tuple[Array, list[Fold]]:
        """Predictions (n,) of groups left out from these columns."""
        return leave_one_group_out(np.concatenate(columns, axis=1), self.target_n, self.groups_n, self.weights_n)

    def r2(self, predicted_n: Array) -> float:
        """1 − squared error over the squares around the mean; below 0 where the mean would predict better."""
        return float(1 - self._error(predicted_n) / self._total)

    def _error(self, predicted_n: Array) -> float:
        return float(self.share_n @ (self.target_n - predicted_n) ** 2)

    @cached_property
    def _total(self) -> float:
        share = self.share_n
        return float(share @ (self.target_n - share @ self.target_n / share.sum()) ** 2)

    @cached_property
    def base(self) -> Array:
        """Predictions from perplexity alone."""
        return self.predictions(self.base_nB)[0]

    @cached_property
    def both(self) -> tuple[Array, list[Fold]]:
        """Predictions from perplexity and geometry, and the fits behind them."""
        return self.predictions(self.base_nB, self.geometry_nP)

    @property
    def gain(self) -> float:
        """R² of both minus R² of perplexity alone."""
        return self.r2(self.both[0]) - self.r2(self.base)


def too_few(method_of_runs: Sequence[str]) -> str | None:
    """Why neither question can be asked of runs of these methods; None where one can.

    Args:
        method_of_runs: the method of each run.
    """
    reasons = [_too_few_methods(len(set(method_of_runs)))]
    counts = Counter(method_of_runs)
    reasons.append(_too_few_runs(sum(counts[method] >= 2 for method in method_of_runs)))
    return "; ".join(map(str, reasons)) if all(reasons) else None


def _too_few_methods(methods: int) -> str | None:
    enough = methods >= FEWEST_METHODS
    return None if enough else f"leaving a method out needs at least {FEWEST_METHODS} methods, got {methods}"


def _too_few_runs(runs: int) -> str | None:
    needed = f"leaving a run of a known method out needs at least {FEWEST_RUNS} runs of methods with several runs"
    return None if runs >= FEWEST_RUNS else f"{needed}, got {runs}"


def question(table: Table, name: QuestionName) -> Question:
    """The arrays of a question.

    Raises:
        UserError: too few methods or runs for it, or scores that do not vary; the message says why.
    """
    if name == "unseen_method":
        reason = _too_few_methods(len(table.methods))
    else:
        reason = _too_few_runs(int(_has_siblings(table).sum()))
    if reason is not None:
        raise UserError(reason)
    rows = np.arange(len(table.target_N))
    asked = _arrays(table, name, rows if name == "unseen_method" else rows[_has_siblings(table)[table.run_N]])
    if not np.isfinite(asked.target_n).all() or np.ptp(asked.target_n) <= 1e-12:
        raise UserError("the downstream scores do not vary between checkpoints, so there is nothing to predict")
    return asked


def _has_siblings(table: Table) -> NDArray[np.bool_]:
    """(R,) whether a run's method has other runs."""
    return np.bincount(table.method_R)[table.method_R] >= 2


def _arrays(table: Table, name: QuestionName, rows: Integers) -> Question:
    if name == "unseen_method":
        groups, strata = table.method_N, np.zeros(len(table.methods), dtype=np.int64)
        checkpoints = np.bincount(table.run_N)[table.run_N]
        runs = np.bincount(table.method_R)[table.method_N]
        weights = 1.0 / (checkpoints * runs)
    else:
        used, groups = np.unique(table.run_N[rows], return_inverse=True)
        strata = table.method_R[used]
        weights = np.ones(len(rows))
    base = _with_square(table.log_perplexity_N)[rows]
    geometry, target = table.geometry_NP[rows], table.target_N[rows]
    if name == "unseen_run":
        base, geometry, target = (_centred(values, table.method_N[rows]) for values in (base, geometry, target))
    return Question(name, table.metrics, rows, base, geometry, target, groups, weights, strata)


def _with_square(log_perplexity_N: Array) -> Array:
    """(N, 2) log-perplexity and its square, around the mean of the table so that the two are not collinear."""
    deviation = log_perplexity_N - log_perplexity_N.mean()
    return np.stack([deviation, deviation**2], axis=1)


def _centred(values: Array, method_N: Integers) -> Array:
    methods, index = np.unique(method_N, return_inverse=True)
    means = np.stack([values[index == number].mean(0) for number in range(len(methods))])
    return values - means[index]


def analyse(table: Table, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Prediction:
    """Both questions, each with its gain, its interval and its permutation test.

    Raises:
        UserError: neither question can be answered, or no metric varies.
    """
    table = without_useless(table)
    if not table.metrics:
        raise UserError("no geometry metric varies and is known at every checkpoint; " + "; ".join(table.notes))
    answers: dict[QuestionName, Answer] = {}
    names: tuple[QuestionName, QuestionName] = ("unseen_method", "unseen_run")
    for name in names:
        try:
            asked = question(table, name)
        except UserError as error:
            counts = len(table.methods), len(table.runs), len(table.target_N)
            answers[name] = Answer(name, *counts, reason=str(error))
        else:
            answers[name] = answer(table, asked, permutations=permutations, seed=seed)
    if all(found.reason for found in answers.values()):
        raise UserError("; ".join(dict.fromkeys(str(found.reason) for found in answers.values())))
    return Prediction(answers["unseen_method"], answers["unseen_run"], list(table.notes))


def answer(table: Table, asked: Question, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Answer:
    """The answer to one question."""
    both, folds = asked.both
    low, high = gain_interval(table, asked)
    run_n = table.run_N[asked.rows]
    return Answer(
        asked.name,
        methods=len(np.unique(table.method_N[asked.rows])),
        runs=len(np.unique(run_n)),
        checkpoints=len(asked.rows),
        r2_perplexity=asked.r2(asked.base),
        r2_both=asked.r2(both),
        spearman_perplexity=spearman(asked.target_n, asked.base),
        spearman_both=spearman(asked.target_n, both),
        gain=asked.gain,
        gain_low=low,
        gain_high=high,
        p_value=permutation_p_value(asked, permutations=permutations, seed=seed),
        coefficients=_coefficients(asked, folds),
        ranking=_ranking(asked),
        rows=asked.rows,
        observed=asked.target_n,
        predicted_perplexity=asked.base,
        predicted_both=both,
    )


def without_useless(table: Table) -> Table:
    """The table without metrics that are unknown somewhere or constant, with a note for each."""
    keep: list[int] = []
    notes = list(table.notes)
    for number, metric in enumerate(table.metrics):
        values = table.geometry_NP[:, number]
        unknown = [table.runs[run] for run in np.unique(table.run_N[~np.isfinite(values)])]
        if unknown:
            some = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            notes.append(f"{metric} is null in {some}: left out")
        elif np.ptp(values) <= 1e-9 * max(1e-300, float(np.abs(values).max())):
            notes.append(f"{metric} is constant: left out")
        else:
            keep.append(number)
    return Table(
        table.methods, table.runs, [table.metrics[i] for i in keep], table.method_R, table.run_N, table.step_N,
        table.log_perplexity_N, table.geometry_NP[:, keep], table.target_N, notes,
    )  # fmt: skip


def gain_interval(table: Table, asked: Question) -> tuple[float, float]:
    """95 % interval of the gain by the delete-one jackknife over groups, with Student's t.

    Everything is done anew without each group in turn: centring, penalties, fits and predictions. Resampling the
    errors of groups left out, with the regressions kept, would not see that other groups lead to other penalties, and
    covers the expected gain too rarely. Centring within methods costs a degree of freedom per method.
    """
    groups = len(asked.strata_G)
    gains = np.array([_without(table, asked, group).gain for group in range(groups)])
    degrees = groups - len(np.unique(asked.strata_G))
    lost = 1.0 if asked.name == "unseen_method" else groups / degrees
    variance = lost * (groups - 1) / groups * float(((gains - gains.mean()) ** 2).sum())
    half = student_t_quantile(0.975, degrees) * math.sqrt(variance)
    return asked.gain - half, asked.gain + half


def _without(table: Table, asked: Question, group: int) -> Question:
    """The same question of the checkpoints that take part, without one group."""
    rows = asked.rows[asked.groups_n != group]
    used_runs, run_N = np.unique(table.run_N[rows], return_inverse=True)
    used_methods, method_R = np.unique(table.method_R[used_runs], return_inverse=True)
    rest = Table(
        [table.methods[method] for method in used_methods], [table.runs[run] for run in used_runs], table.metrics,
        method_R, run_N, table.step_N[rows], table.log_perplexity_N[rows], table.geometry_NP[rows],
        table.target_N[rows],
    )  # fmt: skip
    return _arrays(rest, asked.name, np.arange(len(rows)))


def permutation_p_value(asked: Question, *, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """Share of exchanges of fingerprints between groups (see the module) with at least the gain of the identity.

    The geometry enters without what log-perplexity and its square explain of it, before and after each exchange alike,
    so that the identity is one exchange among the others.
    """
    within, fingerprint = _fingerprints(asked)
    generator = torch.Generator().manual_seed(seed)

    def r2(order: Integers) -> float:
        columns = _unexplained(asked, within + fingerprint[order][asked.groups_n])
        return asked.r2(asked.predictions(asked.base_nB, columns)[0])

    identity = np.arange(len(asked.strata_G))
    observed = r2(identity)
    as_large = 1
    for _ in range(permutations):
        order = identity.copy()
        for stratum in np.unique(asked.strata_G):
            members = np.flatnonzero(asked.strata_G == stratum)
            order[members] = members[torch.randperm(len(members), generator=generator).numpy()]
        as_large += r2(order) >= observed - 1e-12
    return as_large / (permutations + 1)


def _unexplained(asked: Question, columns_nP: Array) -> Array:
    """The columns without what a constant, log-perplexity and its square explain of them, groups weighing equally."""
    design = np.concatenate([np.ones((len(columns_nP), 1)), asked.base_nB], axis=1)
    root = np.sqrt(asked.share_n)[:, None]
    coefficients = np.linalg.lstsq(design * root, columns_nP * root, rcond=None)[0]
    return columns_nP - design @ coefficients


def _fingerprints(asked: Question) -> tuple[Array, Array]:
    """Unexplained geometry as its variation within groups (n, P) and each group's fingerprint (G, P)."""
    rest = _unexplained(asked, asked.geometry_nP)
    weighted = asked.share_n[:, None] * rest
    fingerprint: Array = np.stack([np.bincount(asked.groups_n, column) for column in weighted.T], axis=1)
    return rest - fingerprint[asked.groups_n], fingerprint


def _coefficients(asked: Question, folds: Sequence[Fold]) -> list[Coefficient]:
    coefficients = np.stack([fold.coef_P for fold in folds])
    names = ["log_perplexity", "log_perplexity_squared", *asked.metrics]
    found = [Coefficient(n, float(c.mean()), float(c.std(ddof=1))) for n, c in zip(names, coefficients.T, strict=True)]
    return sorted(found, key=lambda c: -abs(c.mean))


def _ranking(asked: Question) -> list[Ranked]:
    found = []
    base = asked.r2(asked.base)
    for number, metric in enumerate(asked.metrics):
        column = asked.geometry_nP[:, [number]]
        alone, _ = asked.predictions(column)
        joined, _ = asked.predictions(asked.base_nB, column)
        found.append(Ranked(metric, asked.r2(alone), asked.r2(joined) - base, spearman(asked.target_n, alone)))
    return sorted(found, key=lambda ranked: -ranked.gain)
