"""Ridge regression judged on groups of rows that it has not seen, with everything that is fitted fitted without them.

All that a fit needs of a group are weighted sums over its rows. Sums of chosen groups are added up by a matrix of ones
and zeros, so a group that is left out enters with a factor of exactly 0; nothing is subtracted. Every group has the
same total weight. Legend: N rows, P columns, G groups, F fits, L penalties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
PENALTIES: Array = np.logspace(-3, 3, 13)


@dataclass(frozen=True)
class Moments:
    """Weighted means per group: columns (G, P), their products (G, P, P), targets (G,) and products with them."""

    x_GP: Array
    xx_GPP: Array
    y_G: Array
    xy_GP: Array

    @classmethod
    def of(cls, x_NP: Array, y_N: Array, groups_N: Integers, weights_N: Array) -> Moments:
        groups = int(groups_N.max()) + 1
        weight_GN = np.where(groups_N[None, :] == np.arange(groups)[:, None], weights_N, 0.0)
        weight_GN = weight_GN / weight_GN.sum(1, keepdims=True)
        products = (x_NP[:, :, None] * x_NP[:, None, :]).reshape(len(y_N), -1)
        return cls(
            weight_GN @ x_NP,
            (weight_GN @ products).reshape(groups, x_NP.shape[1], x_NP.shape[1]),
            weight_GN @ y_N,
            weight_GN @ (x_NP * y_N[:, None]),
        )


@dataclass(frozen=True)
class Fits:
    """F standardisations and ridge solutions per penalty: a prediction is `mean_y + ((x − mean)/scale) @ coef`."""

    mean_FP: Array
    scale_FP: Array
    mean_y_F: Array
    coef_FLP: Array


def fit(moments: Moments, chosen_FG: Array, penalties_L: Array = PENALTIES) -> Fits:
    """Fits on the groups that each row of `chosen_FG` (ones and zeros) takes.

    Columns are standardised by the mean and standard deviation of just these groups; one that is constant there gets
    coefficient 0. `penalty · ‖coef‖²` is added to the mean squared error.
    """
    count = chosen_FG.sum(1)
    mean = chosen_FG @ moments.x_GP / count[:, None]
    mean_y = chosen_FG @ moments.y_G / count
    columns = moments.x_GP.shape[1]
    second = (chosen_FG @ moments.xx_GPP.reshape(len(moments.y_G), -1)).reshape(-1, columns, columns)
    second = second / count[:, None, None]
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
    coefficients = (shrunk @ vectors.transpose(0, 2, 1)) * varies[:, None, :]
    return Fits(mean, scale, mean_y, coefficients)


def predict_rows(fits: Fits, fold_N: Integers, x_NP: Array) -> Array:
    """(L, N) predictions of each row by the fit that `fold_N` names for it."""
    z = (x_NP - fits.mean_FP[fold_N]) / fits.scale_FP[fold_N]
    return np.einsum("np,nlp->ln", z, fits.coef_FLP[fold_N]) + fits.mean_y_F[fold_N]


@dataclass(frozen=True)
class Fold:
    """What was fitted without one group: enough to predict it, and to show that the group was not used."""

    mean_P: Array
    scale_P: Array
    mean_y: float
    coef_P: Array
    penalty: float


def leave_one_group_out(
    x_NP: Array, y_N: Array, groups_N: Integers, weights_N: Array | None = None, penalties_L: Array = PENALTIES
) -> tuple[Array, list[Fold]]:
    """(N,) predictions of every group by fits on the others, and those fits.

    The penalty of each fit is the one that predicts best when each of the groups it is fitted on is left out in turn
    (standardised anew each time).

    Args:
        x_NP, y_N: the table.
        groups_N: each row's group, 0 … G − 1; at least three groups.
        weights_N: of the rows within their groups; None: equal.
    """
    groups = int(groups_N.max()) + 1
    weights_N = np.ones(len(y_N)) if weights_N is None else weights_N
    share_N = weights_N / np.bincount(groups_N, weights_N, groups)[groups_N]
    moments = Moments.of(x_NP, y_N, groups_N, weights_N)
    outer = fit(moments, np.ones((groups, groups)) - np.eye(groups), penalties_L)
    first, second = np.triu_indices(groups, 1)
    pairs = np.ones((len(first), groups))
    pairs[np.arange(len(first)), first] = 0.0
    pairs[np.arange(len(first)), second] = 0.0
    inner = fit(moments, pairs, penalties_L)
    pair_of = np.zeros((groups, groups), dtype=np.int64)
    pair_of[first, second] = pair_of[second, first] = np.arange(len(first))
    # errors[g, l]: squared error over all groups but g, each predicted without g and itself.
    errors = np.zeros((groups, len(penalties_L)))
    for group in range(groups):
        rows = np.flatnonzero(groups_N != group)
        predicted = predict_rows(inner, pair_of[group, groups_N[rows]], x_NP[rows])
        errors[group] = ((predicted - y_N[rows]) ** 2) @ share_N[rows]
    best = errors.argmin(1)
    every = predict_rows(outer, groups_N, x_NP)
    folds = [
        Fold(outer.mean_FP[g], outer.scale_FP[g], float(outer.mean_y_F[g]), outer.coef_FLP[g, best[g]],
             float(penalties_L[best[g]]))
        for g in range(groups)
    ]  # fmt: skip
    return every[best[groups_N], np.arange(len(y_N))], folds
