"""The gradient noise scale: how large a batch must be for its gradient to be more signal than noise."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hf_lowrank.statistics import Estimate

from .landscape import log_jackknife

Gradient = Sequence[Tensor]


def noise_scale(gradients: Callable[[], Iterable[Gradient]], batch_size: int) -> Estimate:
    """`tr(Σ) / ‖G‖²` (arXiv 1812.06162, "simple" noise scale), in the unit of `batch_size`, such as sequences.

    Both parts are estimated without bias from K batches of b examples: with `s` the mean of the batches' squared
    gradient norms and `S` the squared norm of their mean, `‖G‖² ≈ (K S − s) / (K − 1)` and
    `tr(Σ) ≈ b K (s − S) / (K − 1)`.

    Args:
        gradients: `() -> iterable`, called twice: the gradients of K ≥ 3 disjoint batches of equal size, each a
            sequence of tensors in one order. One at a time is held, beside one sum.
        batch_size: b, examples per batch.

    Returns:
        The estimate, at least 0, with a 95 % jackknife interval over batches and K. NaN where `‖G‖²` is estimated as
        not positive: the gradient cannot be distinguished from noise with this many batches.

    Raises:
        ValueError: fewer than three batches, or a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    total: list[Tensor] | None = None
    squares: list[float] = []
    for gradient in gradients():
        squares.append(_dot(gradient, gradient))
        if total is None:
            total = [tensor.detach().clone() for tensor in gradient]
        else:
            for running, tensor in zip(total, gradient, strict=True):
                running.add_(tensor)
    count = len(squares)
    if total is None or count < 3:
        raise ValueError(f"a noise scale needs at least 3 batches, got {count}")
    whole = _dot(total, total)
    products = [_dot(gradient, total) for gradient in gradients()]
    value = _ratio(sum(squares) / count, whole / count**2, count, batch_size)
    left_out = [
        _ratio(
            (sum(squares) - squares[k]) / (count - 1),
            (whole - 2 * products[k] + squares[k]) / (count - 1) ** 2,
            count - 1,
            batch_size,
        )
        for k in range(count)
    ]
    return log_jackknife(value, left_out)


def _ratio(mean_square: float, square_of_mean: float, count: int, batch_size: int) -> float:
    signal = (count * square_of_mean - mean_square) / (count - 1)
    noise = batch_size * count * (mean_square - square_of_mean) / (count - 1)
    return max(noise, 0.0) / signal if signal > 0 else math.nan


def _dot(first: Gradient, second: Gradient) -> float:
    return math.fsum(float(torch.sum(a.double() * b.double())) for a, b in zip(first, second, strict=True))
