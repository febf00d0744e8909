"""Singular values of weights and updates, and the quantities computed from them.

One decomposition per matrix serves them all. Singular values are float64, descending, and come from the smaller Gram
matrix, computed in float64: for float32 weights their error is about 1e-8 of the largest one, which float32
decompositions do not reach where a gap is small.

Shapes: M × N matrices, R their (low) rank, K = min(M, N) singular values.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

BATCH_BYTES = 64 * 2**20


def singular_values(matrix_MN: Tensor) -> Tensor:
    """All K singular values, descending, float64; leading dimensions are a batch.

    Raises:
        ValueError: the matrix holds a value that is not finite, or has fewer than two dimensions.
    """
    eigenvalues = torch.linalg.eigvalsh(_gram(_checked(matrix_MN)), UPLO="U")
    return eigenvalues.flip(-1).clamp_min(0).sqrt()  # rounding makes some negative


def singular_vectors(matrix_MN: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(all singular values (K,), u (M, count), v (N, count)) from one decomposition, float64.

    The sign of each pair is fixed (the largest entry of v is positive), so that the same matrix gives the same
    vectors on every machine.
    """
    matrix = _checked(matrix_MN).double()
    tall = matrix.shape[0] >= matrix.shape[1]
    values, vectors = torch.linalg.eigh(_gram(matrix), UPLO="U")
    sigma = values.flip(-1).clamp_min(0).sqrt()
    count = min(count, sigma.numel())
    inner = vectors.flip(-1)[:, :count]
    outer = (matrix if tall else matrix.mT) @ inner
    q, r = torch.linalg.qr(outer)
    outer = q * _signs(torch.diagonal(r))
    u, v = (outer, inner) if tall else (inner, outer)
    signs = _signs(v.gather(0, v.abs().argmax(0, keepdim=True)))
    return sigma, u * signs, v * signs


def principal_vectors(matrix_MN: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `singular_vectors`, in float32 and without those of singular values that are 0 to rounding."""
    sigma, u, v = singular_vectors(matrix_MN, count)
    rank = numerical_rank(sigma, (u.shape[0], v.shape[0]))
    return sigma, u[:, :rank].float(), v[:, :rank].float()


def product_singular_values(b_MR: Tensor, a_RN: Tensor, scaling: float = 1.0) -> Tensor:
    """Singular values of `scaling · B A` in O((M + N) R²), without forming it; min(M, N) of them, float64.

    QR of both factors reduces it to an R × R core with the same non-zero singular values; the others are exact zeros.
    """
    b, a = _checked(b_MR).double(), _checked(a_RN).double()
    if b.shape[1] != a.shape[0]:
        raise ValueError(f"factors must be (M, R) and (R, N), got {tuple(b.shape)} and {tuple(a.shape)}")
    core = torch.linalg.qr(b, mode="r")[1] @ torch.linalg.qr(a.mT, mode="r")[1].mT
    sigma = torch.linalg.svdvals(core) * abs(scaling)
    full = min(b.shape[0], a.shape[1])
    return torch.cat([sigma[:full], sigma.new_zeros(max(0, full - sigma.numel()))])


def difference_factors(
    new: tuple[Tensor, Tensor, float], old: tuple[Tensor, Tensor, float]
) -> tuple[Tensor, Tensor, float]:
    """(B, A, scaling) of the difference of two low-rank products, of rank R + R'."""
    b = torch.cat([new[0].double() * new[2], old[0].double() * -old[2]], dim=1)
    a = torch.cat([new[1].double(), old[1].double()], dim=0)
    return b, a, 1.0


def many_singular_values(matrices: Iterable[Tensor], workers: int | None = None) -> list[Tensor]:
    """Singular values of many matrices, in order: equal shapes in one batch, batches over threads.

    A decomposition of a few hundred rows gains little from several threads; several at a time, with one thread each,
    are faster.
    """
    kept = list(matrices)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(kept):
        shapes.setdefault(tuple(matrix.shape), []).append(index)
    batches: list[list[int]] = []
    for shape, indices in shapes.items():
        size = max(1, BATCH_BYTES // (8 * math.prod(shape))) if kept[indices[0]].is_cuda else 1
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    results: list[Tensor] = [torch.empty(0)] * len(kept)

    def work(batch: list[int]) -> None:
        sigma = singular_values(torch.stack([kept[i] for i in batch])) if len(batch) > 1 else None
        for position, index in enumerate(batch):
            results[index] = singular_values(kept[index]) if sigma is None else sigma[position]

    map_threads(work, batches, workers)
    return results


def map_threads(work: Callable[[T], R], items: Sequence[T], workers: int | None = None) -> list[R]:
    """`[work(item) for item in items]` in as many threads as torch uses, each with one torch thread."""
    threads = torch.get_num_threads() if workers is None else workers
    if threads <= 1 or len(items) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(work, items))


def effective_rank(singular_values_K: Tensor) -> float:
    """`exp(−Σ p log p)`, `p = σ/Σσ` (Roy & Vetterli 2007): between 1 and K; NaN where every σ is 0."""
    sigma = singular_values_K.double()
    total = sigma.sum()
    return float(torch.special.entr(sigma / total).sum().exp()) if total > 0 else math.nan


def stable_rank(singular_values_K: Tensor) -> float:
    """`‖W‖_F² / σ₁²`: between 1 and the rank; NaN where every σ is 0."""
    sigma = singular_values_K.double()
    if not sigma.numel() or not sigma.max() > 0:
        return math.nan
    return float((sigma / sigma.max()).square().sum())


def spectral_gap(singular_values_K: Tensor) -> float:
    """`(σ₁ − σ₂)/σ₁`, in [0, 1]; NaN for fewer than two values or all 0."""
    sigma = singular_values_K.double().sort(descending=True).values
    if sigma.numel() < 2 or not sigma[0] > 0:
        return math.nan
    return float((sigma[0] - sigma[1]) / sigma[0])


def singular_value_fraction(singular_values_K: Tensor, threshold: float = 0.1) -> float:
    """Share of singular values above `threshold` (absolute), in [0, 1]."""
    return float((singular_values_K > threshold).double().mean())  # NaN where there is none


def numerical_rank(singular_values_K: Tensor, shape: tuple[int, int], epsilon: float = 2.0**-23) -> int:
    """Number of σ above `max(M, N) · epsilon · σ₁`; the default epsilon is float32's."""
    if not singular_values_K.numel():
        return 0
    return int((singular_values_K > max(shape) * epsilon * singular_values_K.max()).sum())


def relative_norm(update: Tensor, weight: Tensor) -> float:
    """`‖ΔW‖_F / ‖W‖_F`, each from a matrix or from its singular values; NaN where W is 0."""
    base = float(weight.double().square().sum().sqrt())
    return float(update.double().square().sum().sqrt()) / base if base > 0 else math.nan


def tail_exponent(singular_values_K: Tensor) -> float:
    """Exponent of the power law that best fits the upper tail of the eigenvalues σ².

    Maximum likelihood above each possible cutoff, and the cutoff with the smallest Kolmogorov–Smirnov distance
    (Clauset, Shalizi & Newman, arXiv 0706.1062), on σ² as in heavy-tailed self-regularisation (arXiv 1901.08276).
    Above 1; a smaller exponent is a heavier tail. NaN with fewer than five positive values.
    """
    x = singular_values_K.double().cpu().square().sort().values
    x = x[x > x.max() * 1e-12] if x.numel() else x
    count = x.numel()
    if count < 5 or not x[-1] > x[0]:
        return math.nan
    logs = x.log()
    sizes = torch.arange(count, 0, -1, dtype=torch.float64)
    tail_sums = logs.flip(0).cumsum(0).flip(0)
    excess = tail_sums - sizes * logs
    best, best_distance = math.nan, math.inf
    for start in range(count - 2):
        if not excess[start] > 0:
            continue
        size = count - start
        exponent = 1 + size / float(excess[start])
        fitted = 1 - ((logs[start:] - logs[start]) * (1 - exponent)).exp()
        empirical = torch.arange(size, dtype=torch.float64) / size
        distance = float((fitted - empirical).abs().max())
        if distance < best_distance:
            best, best_distance = exponent, distance
    return best


def subspace_overlap(u_MK: Tensor, v_MK: Tensor) -> float:
    """`‖UᵀV‖_F² / k`: mean squared cosine of the principal angles of two k-dimensional subspaces, in [0, 1].

    Columns must be orthonormal, and their number the same in both bases.
    """
    u, v = _same_shape(u_MK, v_MK)
    return float((u.mT @ v).square().sum()) / u.shape[1]


def principal_angles(u_MK: Tensor, v_MK: Tensor) -> Tensor:
    """Principal angles in radians, ascending, (k,) float64.

    Small angles come from their sines, which keep the digits that their cosines lose.
    """
    u, v = _same_shape(u_MK, v_MK)
    inner = u.mT @ v
    cosines = torch.linalg.svdvals(inner).clamp(0, 1)
    sines = torch.linalg.svdvals(v - u @ inner).clamp(0, 1).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def _same_shape(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if u.shape != v.shape:
        raise ValueError(f"bases must have one shape, got {tuple(u.shape)} and {tuple(v.shape)}")
    return u.double(), v.double()


def _checked(matrix: Tensor) -> Tensor:
    if matrix.ndim < 2:
        raise ValueError(f"matrix must have two dimensions, got shape {tuple(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"matrix of shape {tuple(matrix.shape)} must be finite, it holds NaN or Inf")
    return matrix


def _gram(matrix: Tensor) -> Tensor:
    """The smaller Gram matrix in float64; only its upper triangle is filled in correctly."""
    tall = matrix.double() if matrix.shape[-2] >= matrix.shape[-1] else matrix.double().mT
    size = tall.shape[-1]
    gram = tall.new_zeros(*tall.shape[:-2], size, size)
    step = max(64, -(-size // 4))
    for start in range(0, size, step):
        rows = tall[..., start : start + step]
        gram[..., start : start + step, start:] = rows.mT @ tall[..., start:]
    return gram


def _signs(values: Tensor) -> Tensor:
    """Their signs, 1 for 0."""
    return torch.where(values < 0, -1.0, 1.0).to(values)
