"""Choosing the subspace of an oriented gradient (rows × columns): `rank` directions of its row space.

Pure functions of tensors. `SUBSPACES` is the table that a group's `subspace` names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.optim.places import ALONE, Alone


def draw_seed(*key: int) -> int:
    """A seed that `key` alone decides, so that any draw can be repeated after a resume or elsewhere."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def draw_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator on `device` seeded by `key` alone."""
    return torch.Generator(device).manual_seed(draw_seed(*key))


@dataclass(frozen=True)
class Request:
    """What a choice of subspace may look at.

    Attributes:
        grad: the oriented gradient (rows, columns), finite.
        rank: how many directions.
        transposed: whether `grad` is the transpose of the stored gradient.
        previous: the basis in use before (columns, rank), or None at the first choice.
        key: seeds the draws: (seed, matrix, refresh).
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
    """The top right and left singular vectors, (columns, rank) and (rows, rank), of one decomposition.

    It is taken of the gradient as stored: the signs of singular vectors depend on the call, and the moments that
    are carried over a refresh depend on the signs.
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

    It ends when the basis captures 0.99 of the gradient's energy, and so of what any basis can; in training that is
    after one iteration. Where the spectrum is flat, it ends when an iteration adds little. The result is turned to
    the singular directions inside the subspace (Rayleigh-Ritz), largest first, and signed to agree with the last
    basis, since moments are carried over.
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
    """A (columns, rank) matrix of N(0, 1/rank) entries on `grad`'s device, in its type; `key` alone decides it."""
    return gaussian_matrices(grad, grad.shape[-1], rank, [key])[0]


def gaussian_matrices(like: Tensor, columns: int, rank: int, keys: Sequence[tuple[int, ...]]) -> Tensor:
    """Such a matrix for each of `keys`, (k, columns, rank)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    wide = torch.empty(len(keys), columns, rank, device=like.device, dtype=dtype)
    generator = torch.Generator(like.device)
    for matrix, key in zip(wide.unbind(), keys, strict=True):
        matrix.normal_(generator=generator.manual_seed(draw_seed(*key)))
    return wide.mul_(rank**-0.5).to(like.dtype)


def random_columns(request: Request) -> Tensor:
    """`rank` different columns at random, ascending: (rank,) indices."""
    generator = draw_generator(torch.device("cpu"), *request.key)
    chosen = torch.randperm(request.grad.shape[-1], generator=generator)[: request.rank]
    return chosen.sort().values.to(request.grad.device)


def captured_energy(grad: Tensor, basis: Tensor, place: Alone = ALONE) -> Tensor:
    """Share of the gradient's squared norm inside the span of an orthonormal `basis`, 0 to 1 (1 for zero)."""
    work = grad.to(basis.dtype)
    total = place.sum(work.square().sum())
    return torch.where(total > 0, place.energy(work @ basis) / total, torch.ones_like(total))


def subspace_overlap(basis: Tensor, other: Tensor, place: Alone = ALONE) -> Tensor:
    """`‖UᵀV‖_F² / k` of two orthonormal bases (columns, k): 1 for one span, k / columns for random ones."""
    return place.sum(basis.mT @ other).square().sum() / basis.shape[-1]


# What a group's `subspace` may be. "gaussian" is drawn anew at each step from its seed and never stored.
SUBSPACES: dict[str, Callable[[Request], Tensor]] = {
    "svd": exact_basis,
    "randomized": randomized_basis,
    "random": random_basis,
    "columns": random_columns,
}
UNSTORED = "gaussian"
# Those whose basis is the indices of columns, those that look at the gradient, and those that begin from the last.
OF_INDICES = ("columns",)
OF_GRADIENTS = ("svd", "randomized")
FROM_THE_LAST = ("randomized",)
