"""The choice of subspace for an oriented gradient (rows × columns): `rank` directions of its row space.

Pure functions of tensors. A group's `subspace` names an entry of `SUBSPACES`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.optim.layout import REPLICATED, Replicated


def draw_seed(*key: int) -> int:
    """A seed that depends only on `key`, so that any draw can be repeated after a resume or on another machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def draw_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator on `device` whose seed depends only on `key`."""
    return torch.Generator(device).manual_seed(draw_seed(*key))


@dataclass(frozen=True)
class Request:
    """What a choice of subspace is based on.

    Attributes:
        grad: the oriented gradient (rows, columns), finite.
        rank: number of directions.
        transposed: whether `grad` is the transpose of the stored gradient.
        previous: the basis in use (columns, rank), or None at the first choice.
        key: seeds random draws: (seed, matrix, refresh).
    """

    grad: Tensor
    rank: int
    transposed: bool
    previous: Tensor | None
    key: tuple[int, ...]

    @property
    def work(self) -> Tensor:
        """The gradient in a type that decompositions support."""
        return self.grad if self.grad.dtype == torch.float64 else self.grad.float()


def exact_basis(request: Request) -> Tensor:
    """The top right singular vectors of the gradient, (columns, rank)."""
    return exact_bases(request)[0]


def exact_bases(request: Request) -> tuple[Tensor, Tensor]:
    """The top right and left singular vectors, (columns, rank) and (rows, rank), from one decomposition.

    It decomposes the gradient as stored: the signs of singular vectors depend on the call, and moments that are kept
    over a refresh depend on the signs.
    """
    stored = request.work.mT if request.transposed else request.work
    left, _, right = torch.linalg.svd(stored, full_matrices=False)
    right = right[: request.rank].mT
    left = left[:, : request.rank]
    return (left, right) if request.transposed else (right, left)


OVERSAMPLING = 16
ENOUGH_ENERGY = 0.99
LEAST_GAIN = 0.003
MOST_ITERATIONS = 8


def randomized_basis(request: Request) -> Tensor:
    """Nearly the top right singular vectors, by subspace iteration from the basis in use (arXiv 0909.4061).

    It stops when the basis captures 0.99 of the gradient's energy, in training usually after one iteration, or, for a
    flat spectrum, when an iteration adds little. The result is rotated to the singular directions inside the subspace
    (Rayleigh–Ritz), largest first, with signs that agree with the last basis, since moments are kept.
    """
    grad, rank = request.work, request.rank
    if request.previous is None:
        width = min(rank + OVERSAMPLING, *grad.shape)
        generator = draw_generator(grad.device, *request.key)
        basis = torch.randn(grad.shape[-1], width, generator=generator, device=grad.device, dtype=grad.dtype)
        basis = torch.linalg.qr(basis)[0]
    else:
        basis = request.previous.to(grad.dtype)
    total = float(grad.square().sum())
    low = grad @ basis
    energy = float(low.square().sum())
    for _ in range(MOST_ITERATIONS):
        basis = torch.linalg.qr(grad.mT @ low)[0]
        low = grad @ basis
        before, energy = energy, float(low.square().sum())
        if energy >= ENOUGH_ENERGY * total or energy - before <= LEAST_GAIN * energy:
            break
    _, turn = torch.linalg.eigh(low.mT @ low)
    basis = basis @ turn[:, -rank:].flip(-1)
    if request.previous is not None:
        agreement = (basis * request.previous).sum(0)
        basis = torch.where(agreement < 0, -basis, basis)
    return basis


def random_basis(request: Request) -> Tensor:
    """An orthonormal basis of a random subspace, (columns, rank)."""
    return torch.linalg.qr(gaussian_matrix(request.work, request.rank, request.key))[0]


def gaussian_matrix(grad: Tensor, rank: int, key: tuple[int, ...]) -> Tensor:
    """A (columns, rank) matrix of N(0, 1/rank) entries on `grad`'s device, in its type; it depends only on `key`."""
    return gaussian_matrices(grad, grad.shape[-1], rank, [key])[0]


def gaussian_matrices(like: Tensor, columns: int, rank: int, keys: Sequence[tuple[int, ...]]) -> Tensor:
    """Such a matrix per key, (k, columns, rank)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    wide = torch.empty(len(keys), columns, rank, device=like.device, dtype=dtype)
    generator = torch.Generator(like.device)
    for matrix, key in zip(wide.unbind(), keys, strict=True):
        matrix.normal_(generator=generator.manual_seed(draw_seed(*key)))
    return wide.mul_(rank**-0.5).to(like.dtype)


def random_columns(request: Request) -> Tensor:
    """`rank` distinct random columns, ascending: (rank,) indices."""
    generator = draw_generator(torch.device("cpu"), *request.key)
    chosen = torch.randperm(request.grad.shape[-1], generator=generator)[: request.rank]
    return chosen.sort().values.to(request.grad.device)


def captured_energy(grad: Tensor, basis: Tensor, partition: Replicated = REPLICATED) -> Tensor:
    """Share of the gradient's squared norm in the span of an orthonormal `basis`, 0 to 1 (1 for a zero gradient)."""
    work = grad.to(basis.dtype)
    total = partition.sum(work.square().sum())
    return torch.where(total > 0, partition.energy(work @ basis) / total, torch.ones_like(total))


def subspace_overlap(basis: Tensor, other: Tensor, partition: Replicated = REPLICATED) -> Tensor:
    """`‖UᵀV‖_F² / k` of two orthonormal bases (columns, k): 1 for equal spans, k / columns for random ones."""
    return partition.sum(basis.mT @ other).square().sum() / basis.shape[-1]


# By the name of a group's `subspace`. "gaussian" is drawn again at each step from its seed and never stored.
SUBSPACES: dict[str, Callable[[Request], Tensor]] = {
    "svd": exact_basis,
    "randomized": randomized_basis,
    "random": random_basis,
    "columns": random_columns,
}
UNSTORED = "gaussian"
# Those whose basis is column indices, those that depend on the gradient, and those that start from the last basis.
OF_INDICES = ("columns",)
OF_GRADIENTS = ("svd", "randomized")
FROM_THE_LAST = ("randomized",)
