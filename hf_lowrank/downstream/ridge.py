"""Ridge regression that is judged on runs it has not seen, with everything that is fitted fitted without them.

Everything a fit needs of a run are sums over its rows. Sums of chosen runs are added up by a matrix of ones and zeros,
so a run that is left out enters with a factor of exactly 0; nothing is subtracted. Legend: N rows, P columns, R runs,
F fits, L penalties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PENALTIES: Array = np.logspace(-3, 3, 13)


@dataclass(frozen=True)
class Moments:
    """Sums over each run's rows: counts (R,), columns (R, P), their products (R, P, P), targets and theirs."""

    count_R: Array
    x_RP: Array
    xx_RPP: Array
    y_R: Array
    xy_RP: Array

    @classmethod
    def of(cls, x_NP: Array, y_N: Array, runs_N: NDArray[np.int64], runs: int) -> Moments:
        member = (runs_N[None, :] == np.arange(runs)[:, None]).astype(float)
        outer = x_NP[:, :, None] * x_NP[:, None, :]
        return cls(
            member.sum(1),
            member @ x_NP,
            np.einsum("rn,npq->rpq", member, outer),
            member @ y_N,
            member @ (x_NP * y_N[:, None]),
        )


@dataclass(frozen=True)
class Fits:
    """F standardisations and ridge solutions per penalty: a prediction is `mean_y + ((x − mean)/scale) @ coef`."""

    mean_FP: Array
    scale_FP: Array
    mean_y_F: Array
    coef_FLP: Array


def fit(moments: Moments, chosen_FR: Array, penalties_L: Array = PENALTIES) -> Fits:
    """Fits on the runs that each row of `chosen_FR` (ones and zeros) takes.

    Columns are standardised by the mean and standard deviation of just these rows; one that is constant there gets
    coefficient 0. The penalty is per row: the sum of squares plus `penalty · rows · ‖coef‖²`.
    """
    count = chosen_FR @ moments.count_R
    mean = chosen_FR @ moments.x_RP / count[:, None]
    mean_y = chosen_FR @ moments.y_R / count
    second = np.einsum("fr,rpq->fpq", chosen_FR, moments.xx_RPP) / count[:, None, None]
    covariance = second - mean[:, :, None] * mean[:, None, :]
    cross = chosen_FR @ moments.xy_RP / count[:, None] - mean * mean_y[:, None]
    variance = np.einsum("fpp->fp", covariance)
    level = np.einsum("fpp->fp", second)
    varies = variance > 1e-12 * level
    scale = np.sqrt(np.where(varies, variance, 1.0))
    keep = varies / scale
    correlation = covariance * keep[:, :, None] * keep[:, None, :]
    values, vectors = np.linalg.eigh(correlation)
    projected = np.einsum("fpk,fp->fk", vectors, cross * keep)
    shrunk = projected[:, None, :] / (np.maximum(values, 0)[:, None, :] + penalties_L[None, :, None])
    return Fits(mean, scale, mean_y, np.einsum("fpk,flk->flp", vectors, shrunk) * varies[:, None, :])


def predict_rows(fits: Fits, fold_N: NDArray[np.int64], x_NP: Array) -> Array:
    """(L, N) predictions of each row by the fit that `fold_N` names for it."""
    z = (x_NP - fits.mean_FP[fold_N]) / fits.scale_FP[fold_N]
    return (np.einsum("np,nlp->ln", z, fits.coef_FLP[fold_N])) + fits.mean_y_F[fold_N]


@dataclass(frozen=True)
class Fold:
    """What was fitted without one run: enough to predict it, and to show that it was not looked at."""

    mean_P: Array
    scale_P: Array
    mean_y: float
    coef_P: Array
    penalty: float


def leave_one_run_out(
    x_NP: Array, y_N: Array, runs_N: NDArray[np.int64], penalties_L: Array = PENALTIES
) -> tuple[Array, list[Fold]]:
    """(N,) predictions of every run by fits on the others, and those fits.

    The penalty of each fit is the one that predicts best when, among the runs it is fitted on, each in turn is left
    out (standardised anew each time).

    Args:
        x_NP, y_N: the table.
        runs_N: each row's run, 0 … R − 1; at least three runs.
    """
    runs = int(runs_N.max()) + 1
    moments = Moments.of(x_NP, y_N, runs_N, runs)
    everyone = np.ones((runs, runs))
    outer = fit(moments, everyone - np.eye(runs), penalties_L)
    first, second = np.triu_indices(runs, 1)
    pairs = np.ones((len(first), runs))
    pairs[np.arange(len(first)), first] = 0.0
    pairs[np.arange(len(first)), second] = 0.0
    inner = fit(moments, pairs, penalties_L)
    pair_of = np.zeros((runs, runs), dtype=np.int64)
    pair_of[first, second] = pair_of[second, first] = np.arange(len(first))
    # errors[g, l]: squared error over all runs but g, each predicted without g and itself.
    errors = np.zeros((runs, len(penalties_L)))
    for g in range(runs):
        rows = np.flatnonzero(runs_N != g)
        predicted = predict_rows(inner, pair_of[g, runs_N[rows]], x_NP[rows])
        errors[g] = ((predicted - y_N[rows]) ** 2).sum(1)
    best = errors.argmin(1)
    every = predict_rows(outer, runs_N, x_NP)
    folds = [
        Fold(outer.mean_FP[g], outer.scale_FP[g], float(outer.mean_y_F[g]), outer.coef_FLP[g, best[g]],
             float(penalties_L[best[g]]))
        for g in range(runs)
    ]  # fmt: skip
    return every[best[runs_N], np.arange(len(y_N))], folds
