"""Ridge regression evaluated on groups of rows that were left out of everything that is fitted.

A fit needs only sums over the rows of each group. A matrix of ones and zeros adds up the sums of the groups of each
fit, so a group that is left out enters with a factor of exactly 0; nothing is subtracted. Legend: N rows, P columns,
G groups, F fits, L penalties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PENALTIES: Array = np.logspace(-3, 3, 13)


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of each group: counts, columns, products of columns, targets, and columns times targets."""

    count_G: Array
    x_GP: Array
    xx_GPP: Array
    y_G: Array
    xy_GP: Array

    @classmethod
    def of(cls, x_NP: Array, y_N: Array, groups_N: NDArray[np.int64], groups: int) -> Moments:
        member = (groups_N[None, :] == np.arange(groups)[:, None]).astype(float)
        outer = x_NP[:, :, None] * x_NP[:, None, :]
        return cls(
            member.sum(1),
            member @ x_NP,
            np.einsum("gn,npq->gpq", member, outer),
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


def fit(moments: Moments, chosen_FG: Array, penalties_L: Array = PENALTIES) -> Fits:
    """Fits on the groups that are 1 in each row of `chosen_FG`, which is 0 elsewhere.

    Columns are standardised by the mean and standard deviation of the rows of these groups; a column that is constant
    in them gets coefficient 0. The penalty is per row: the sum of squares plus `penalty · rows · ‖coef‖²`.
    """
    count = chosen_FG @ moments.count_G
    mean = chosen_FG @ moments.x_GP / count[:, None]
    mean_y = chosen_FG @ moments.y_G / count
    second = np.einsum("fg,gpq->fpq", chosen_FG, moments.xx_GPP) / count[:, None, None]
    covariance = second - mean[:, :, None] * mean[:, None, :]
    cross = chosen_FG @ moments.xy_GP / count[:, None] - mean * mean_y[:, None]
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
    """(L, N) predictions of each row by its fit, whose index is in `fold_N`."""
    z = (x_NP - fits.mean_FP[fold_N]) / fits.scale_FP[fold_N]
    return (np.einsum("np,nlp->ln", z, fits.coef_FLP[fold_N])) + fits.mean_y_F[fold_N]


@dataclass(frozen=True)
class Fold:
    """The fit without one group."""

    mean_P: Array
    scale_P: Array
    mean_y: float
    coef_P: Array
    penalty: float


def leave_one_group_out(
    x_NP: Array, y_N: Array, groups_N: NDArray[np.int64], penalties_L: Array = PENALTIES
) -> tuple[Array, list[Fold]]:
    """(N,) predictions of every group by a fit on the other groups, and these fits.

    The penalty of a fit is the one with the smallest error when each of the groups it is fitted on is left out in turn
    (standardised anew each time).

    Args:
        x_NP, y_N: the table.
        groups_N: each row's group, 0 … G − 1; at least three groups.
    """
    groups = int(groups_N.max()) + 1
    moments = Moments.of(x_NP, y_N, groups_N, groups)
    outer = fit(moments, np.ones((groups, groups)) - np.eye(groups), penalties_L)
    first, second = np.triu_indices(groups, 1)
    pair = np.arange(len(first))
    without_pair = np.ones((len(first), groups))
    without_pair[pair, first] = without_pair[pair, second] = 0.0
    inner = fit(moments, without_pair, penalties_L)
    pair_of = np.zeros((groups, groups), dtype=np.int64)
    pair_of[first, second] = pair_of[second, first] = pair
    # errors[g, l]: squared error over all groups but g, each predicted without g and without itself.
    errors = np.zeros((groups, len(penalties_L)))
    for g in range(groups):
        rows = np.flatnonzero(groups_N != g)
        predicted = predict_rows(inner, pair_of[g, groups_N[rows]], x_NP[rows])
        errors[g] = ((predicted - y_N[rows]) ** 2).sum(1)
    best = errors.argmin(1)
    by_penalty = predict_rows(outer, groups_N, x_NP)
    folds = [
        Fold(outer.mean_FP[g], outer.scale_FP[g], float(outer.mean_y_F[g]), outer.coef_FLP[g, best[g]],
             float(penalties_L[best[g]]))
        for g in range(groups)
    ]  # fmt: skip
    return by_penalty[best[groups_N], np.arange(len(y_N))], folds
