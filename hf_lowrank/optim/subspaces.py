"""The choice of subspaces for oriented gradients (rows × columns): `rank` directions of their row spaces.

Pure functions of tensors, for all matrices of a shape at once, none of which reads a value on the host. A group's
`subspace` names an entry of `SUBSPACES`.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_lowrank.compat import active_fake_mode, fast_bfloat16
from hf_lowrank.optim.layout import REPLICATED, Replicated
from hf_lowrank.optim.products import products


def draw_seed(*key: int) -> int:
    """A seed that depends only on `key`, so that any draw can be repeated after a resume or on another machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def draw_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator on `device` whose seed depends only on `key`."""
    return torch.Generator(device).manual_seed(draw_seed(*key))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a choice of subspaces is based on, for k matrices of equal shape.

    Attributes:
        grads: the oriented gradients (k, rows, columns). One that is zero or not finite disturbs no other; whether
            its choice is used is up to the caller.
        rank: number of directions.
        transposed: whether `grads` are the transposes of the stored gradients.
        previous: the bases in use (k, columns, rank), or None at the first choice.
        keys: seeds of each matrix's random draws: (seed, matrix, refresh).
        turns: whether bases are turned to the singular directions inside their subspace; always at the first choice.
    """

    grads: Tensor
    rank: int
    transposed: bool
    previous: Tensor | None
    keys: Sequence[tuple[int, ...]]
    turns: bool = False

    @property
    def work(self) -> Tensor:
        """The gradients in a type that decompositions support."""
        return self.grads if self.grads.dtype == torch.float64 else self.grads.float()

    @property
    def columns(self) -> int:
        return self.grads.shape[-1]


def exact_basis(request: Request) -> Tensor:
    """The top right singular vectors of the gradients, (k, columns, rank)."""
    return exact_bases(request)[0]


def exact_bases(request: Request) -> tuple[Tensor, Tensor]:
    """The top right and left singular vectors, (k, columns, rank) and (k, rows, rank), from one decomposition.

    It decomposes the gradients as stored: the signs of singular vectors depend on the call, and moments that are kept
    over a refresh depend on the signs.
    """
    stored = request.work.mT if request.transposed else request.work
    left, _, right = torch.linalg.svd(torch.where(is_usable(stored).view(-1, 1, 1), stored, 0), full_matrices=False)
    right = right.narrow(1, 0, request.rank).mT
    left = left.narrow(2, 0, request.rank)
    return (left, right) if request.transposed else (right, left)


def is_usable(grads: Tensor) -> Tensor:
    """Whether each gradient has directions: is finite and not zero, (k, …) -> (k,) bool."""
    wide = torch.promote_types(grads.dtype, torch.float32)
    norms = torch.linalg.vector_norm(grads, dim=tuple(range(1, grads.ndim)), dtype=wide)
    return norms.isfinite() & (norms > 0)


OVERSAMPLING = 16
SHIFT = 0.6
TURNING_ITERATIONS = 16
# Weight of the last basis in the columns that are made orthonormal; its square is the share of energy that it costs.
PULL = 1e-5
# Elements of a matrix from which bfloat16 is worth it.
LEAST_ROUNDED = 2**16
# Above the rounding of a Gram matrix of unit columns in float32.
GUARD = 1e-4


def randomized_basis(request: Request) -> Tensor:
    """Nearly the top right singular vectors, by power iteration from the basis in use (arXiv 0909.4061).

    `Q ← orth(Gᵀ G Q)` three times, from a random start four times. The columns keep the order and the signs of the
    last basis, since moments are kept. A turn (Rayleigh–Ritz) orders them by their singular values.
    """
    grads, rank, previous = request.work, request.rank, request.previous
    size = largest(grads, (-2, -1), keepdim=True).clamp(min=torch.finfo(grads.dtype).tiny)
    factor = rounded(grads)
    if previous is None:
        width = min(rank + OVERSAMPLING, *grads.shape[-2:])
        first = orthonormal(gaussian_matrices(grads, request.columns, width, request.keys))
    else:
        first = previous = previous.to(grads.dtype)
    basis = shifted(factor, size, iterated(factor, size, iterated(factor, size, first)), first)
    if previous is None:
        return turned(grads, shifted(factor, size, basis, basis)).narrow(2, 0, rank)
    if request.turns:
        basis = turned(grads, basis)
    return basis * torch.where((basis * previous).sum(-2, keepdim=True) < 0, -1.0, 1.0).to(basis.dtype)


def rounded(grads: Tensor) -> Tensor:
    """Large float32 gradients in bfloat16 where its products are faster.

    The rounding errors of so many values cancel in products with bases, which are orthonormal to float32 nevertheless.
    """
    takes = grads.dtype == torch.float32 and grads.shape[1:].numel() >= LEAST_ROUNDED and fast_bfloat16(grads.device)
    return grads.bfloat16() if takes else grads


def iterated(grads: Tensor, size: Tensor, basis: Tensor) -> Tensor:
    """`orth(GᵀG Q)` of bases (k, columns, r), orthonormal enough to start another iteration from."""
    fresh = gram_product(grads, size, basis)
    return divided(fresh.div_(column_norms(fresh)), GUARD)


def shifted(grads: Tensor, size: Tensor, basis: Tensor, toward: Tensor) -> Tensor:
    """`orth((GᵀG − a) Q)` of bases (k, columns, r), where a is `SHIFT` times the least `‖G q‖²`; see `orthonormal`.

    The shift brings directions just inside the subspace ahead of those just outside, as half an iteration more would.
    """
    fresh = gram_product(grads, size, basis)
    least = (basis * fresh).sum(-2, keepdim=True).amin(-1, keepdim=True)
    return orthonormal(fresh.addcmul_(basis, least, value=-SHIFT), toward=toward)


def gram_product(grads: Tensor, size: Tensor, basis: Tensor) -> Tensor:
    """`GᵀG Q / size` of bases (k, columns, r), in their type; no square of G overflows or vanishes.

    The columns of G Q need not be made orthonormal on the way to `orth(GᵀG Q)`: a triangular factor on the right does
    not change what is made orthonormal.
    """
    low = products(grads, (basis / size).to(grads.dtype))
    return products(grads.mT, low).to(basis.dtype)


def turned(grads: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal bases (k, columns, r) of the same subspaces, turned to the gradients' singular directions there.

    It iterates on the r × r matrices `(G Q)ᵀ G Q`, largest first: an eigendecomposition would make the host wait.
    """
    low = products(grads, basis)
    low = low / torch.linalg.vector_norm(low, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(low.dtype).tiny)
    inside = low.mT @ low
    turn = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device).expand_as(inside)
    for _ in range(TURNING_ITERATIONS):
        turn = orthonormal(inside @ turn, toward=turn)
    return orthonormal(basis @ turn)


def orthonormal(tall: Tensor, toward: Tensor | None = None) -> Tensor:
    """Orthonormal columns with the leading spans of those of k matrices, (k, n, r) with r ≤ n; no value is read.

    On a CPU by Householder's QR, elsewhere by Cholesky factors of normalised columns, in float64 and once more in the
    given type: products, which are batched, in place of decompositions.

    Args:
        toward: orthonormal columns that each takes a little of, so that those without a direction of their own, as
            of a gradient whose rank is too small, keep theirs. They are the result where a factorisation fails.
    """
    scaled = tall / column_norms(tall)
    if toward is not None:
        scaled.add_(toward, alpha=PULL)
    if by_householder(scaled):
        q, r = torch.linalg.qr(scaled)
        return q.mul_(torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2).to(q.dtype))
    found = divided(divided(scaled, dtype=torch.float64))
    if toward is None:
        return found
    return torch.where(found.isfinite().flatten(1).all(-1).view(-1, 1, 1), found, toward)


def by_householder(columns: Tensor) -> bool:
    """Whether decompositions are as fast as products: a CPU's, which has no launches to save."""
    return columns.device.type == "cpu"


def divided(columns: Tensor, guard: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """`A L⁻ᵀ` with `L Lᵀ = AᵀA + guard`: one pass of Cholesky QR; NaN where there is no L.

    It is orthonormal up to the rounding of `dtype` (that of A) times A's squared condition. A guard above the rounding
    makes sure that there is an L; the columns span the same, but those that depend on earlier ones end short.
    """
    work = columns.to(dtype or columns.dtype)
    gram = products(work.mT, work)
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + guard * unit if guard else gram)
    if not guard:
        factor = torch.where(failed.view(-1, 1, 1) == 0, factor, torch.nan)
    inverse = torch.linalg.solve_triangular(factor, unit.expand_as(factor), upper=False)
    return products(columns, inverse.mT.to(columns.dtype))


def largest(values: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """The largest absolute value along dimensions, by two passes without a temporary."""
    return torch.maximum(values.amax(dim, keepdim), -values.amin(dim, keepdim))


def column_norms(columns: Tensor) -> Tensor:
    """Norms to divide columns by, (k, n, r) -> (k, 1, r); in float64 no square overflows or vanishes."""
    norms = torch.linalg.vector_norm(columns, dim=-2, keepdim=True, dtype=torch.float64)
    return norms.clamp(min=torch.finfo(columns.dtype).tiny).to(columns.dtype)


def random_basis(request: Request) -> Tensor:
    """Orthonormal bases of random subspaces, (k, columns, rank)."""
    return orthonormal(gaussian_basis(request))


def gaussian_basis(request: Request) -> Tensor:
    """Matrices of N(0, 1/rank) entries, (k, columns, rank)."""
    return gaussian_matrices(request.work, request.columns, request.rank, request.keys)


def gaussian_matrices(like: Tensor, columns: int, rank: int, keys: Sequence[tuple[int, ...]]) -> Tensor:
    """A matrix of N(0, 1/rank) entries per key, (k, columns, rank), in the type and on the device of `like`.

    Each depends on its key alone. All are drawn at once, by Box and Muller's transform of counters that are hashed.
    """
    dtype, count = torch.promote_types(like.dtype, torch.float32), columns * rank
    bits = _hashed(keys, -(-count // 2), like.device)
    radius = (((bits >> 32) & _LOW).to(dtype) + 0.5).mul_(2.0**-32).log_().mul_(-2 / rank).sqrt_()
    angle = (bits & _LOW).to(dtype).mul_(2 * math.pi * 2.0**-32)
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], -1)
    return pairs.narrow(1, 0, count).reshape(len(keys), columns, rank).to(like.dtype)


def random_columns(request: Request) -> Tensor:
    """`rank` distinct random columns, ascending: (k, rank) indices."""
    order = _hashed(request.keys, request.columns, request.grads.device).argsort(-1)
    return order.narrow(1, 0, request.rank).sort(-1).values


def dct_columns(request: Request) -> Tensor:
    """The columns of the DCT in which the gradients are largest, by L1 norm (arXiv 2505.17967): (k, rank) indices.

    Columns that were chosen before keep their places, and with them their moments.
    """
    basis = cosines(request.columns, request.work.dtype, request.grads.device)
    sizes = products(request.work, basis.mT.expand(len(request.grads), -1, -1)).abs().sum(-2)
    chosen, last = sizes.topk(request.rank).indices.sort(-1).values, request.previous
    if last is None:
        return chosen
    same = last.unsqueeze(-1) == chosen.unsqueeze(-2)
    vacant = same.any(-1).long().argsort(dim=-1, stable=True)
    new = same.any(-2).long().argsort(dim=-1, stable=True)
    number = torch.arange(request.rank, device=last.device)
    moves = number < same.any(-2).logical_not().sum(-1, keepdim=True)
    return last.scatter(-1, vacant, torch.where(moves, chosen.gather(-1, new), last.gather(-1, vacant)))


def cosines(columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II basis, (columns, columns): a vector per row, from the lowest frequency."""
    if active_fake_mode() is not None:  # a fake one must not be remembered
        return _cosines.__wrapped__(columns, dtype, device)
    return _cosines(columns, dtype, device)


@lru_cache(maxsize=16)
def _cosines(columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    number = torch.arange(columns, dtype=torch.float64, device=device)
    waves = torch.cos(torch.outer(number, 2 * number + 1) * (math.pi / (2 * columns))) * math.sqrt(2 / columns)
    return torch.where(number.unsqueeze(-1) == 0, math.sqrt(1 / columns), waves).to(dtype)


_LOW = 2**32 - 1


def _hashed(keys: Sequence[tuple[int, ...]], count: int, device: torch.device) -> Tensor:
    """`count` random 64-bit integers per key, (k, count): the numbers of SplitMix64, each on its own.

    A generator would need a launch per key, and its numbers depend on the device.
    """
    seeds = torch.tensor([draw_seed(*key) for key in keys], device=device)
    bits = seeds.unsqueeze(-1) + torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits ^= (bits >> shift) & ((1 << (64 - shift)) - 1)  # a shift that brings in zeros
        bits *= factor
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


def captured_energy(grad: Tensor, basis: Tensor, partition: Replicated = REPLICATED) -> Tensor:
    """Share of the gradient's squared norm in the span of an orthonormal `basis`, 0 to 1 (1 for a zero gradient)."""
    work = grad.to(basis.dtype)
    total = partition.sum(work.square().sum())
    return torch.where(total > 0, partition.energy(work @ basis) / total, torch.ones_like(total))


def subspace_overlap(basis: Tensor, other: Tensor, partition: Replicated = REPLICATED) -> Tensor:
    """`‖UᵀV‖_F² / k` of two orthonormal bases (columns, k): 1 for equal spans, k / columns for random ones."""
    return partition.sum(basis.mT @ other).square().sum() / basis.shape[-1]


# By the name of a group's `subspace`.
SUBSPACES: dict[str, Callable[[Request], Tensor]] = {
    "svd": exact_basis,
    "randomized": randomized_basis,
    "random": random_basis,
    "columns": random_columns,
    "dct": dct_columns,
    "gaussian": gaussian_basis,
}
# Drawn again from its seed at each step, and never stored.
UNSTORED = "seeded"
# Those whose basis is column indices, those that depend on the gradient, and those that start from the last basis.
OF_INDICES = ("columns", "dct")
OF_GRADIENTS = ("svd", "randomized", "dct")
FROM_THE_LAST = ("randomized", "dct")
# Refreshes of a matrix from one turn of its basis to the next.
TURN_EVERY = 10
