"""Directions in parameter space, computed tensor by tensor and block by block, so that none is ever held as a whole.

A parameter is seen as a matrix of rows (its first dimension) by columns (the rest); one-dimensional ones are a
single row. A block is a range of whole rows. Random numbers are drawn on the CPU from a separate generator for each
(seed, draw, parameter, block), so they depend neither on the device nor on the order, nor on how a parameter is
sharded: a process draws the blocks of which it holds rows.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .sharding import (
    LocalShard,
    ProcessGroup,
    as_rows,
    full_norms,
    full_tensor,
    local_shard,
    local_tensor,
    sum_over_shards,
)
from .spectra import principal_vectors

Normalize = Literal["none", "tensor", "filter"]
BLOCK_ENTRIES = 2**18


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """The fixed division of a parameter into blocks of whole rows, as (start, stop)."""
    step = max(1, BLOCK_ENTRIES // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def keyed_generator(*key: object) -> torch.Generator:
    """A CPU generator whose seed is a hash of `key`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class Direction(Protocol):
    """A direction `d` in the space of a model's parameters."""

    def block(self, name: str, shard: LocalShard, start: int, stop: int) -> Tensor | None:
        """d's entries on one of a parameter's `row_blocks`, those that match entries of `shard`; None where d is 0.

        Args:
            name: of the parameter.
            shard: the unperturbed parameter, as far as this process holds it.
            start, stop: the block's rows in the full parameter.

        Returns:
            A tensor on the parameter's device that the caller may overwrite.
        """
        ...


@dataclass
class Gaussian:
    """`d ~ N(0, I)` on every parameter, regenerated from its key whenever it is needed.

    `normalize="filter"` gives each row of `d` the norm of the parameter's row, `"tensor"` gives each tensor of `d` the
    norm of the parameter; with both, `d` is 0 on one-dimensional parameters (arXiv 1712.09913). `"none"` leaves `d`
    as drawn.
    """

    seed: int
    draw: int
    normalize: Normalize = "none"
    _norms: dict[str, float] = field(default_factory=dict, repr=False)

    def block(self, name: str, shard: LocalShard, start: int, stop: int) -> Tensor | None:
        """See `Direction`."""
        if self.normalize != "none" and shard.shape[0] == 1:
            return None
        noise = self._noise(name, start, stop, shard.shape[1])
        block = shard.crop(noise, start).to(shard.entries_RC.device)
        if self.normalize == "filter":
            return _with_row_norms(block, shard.entries(start, stop))
        if self.normalize == "tensor":
            block *= shard.norm() / self._norm(name, shard.shape)
        return block

    def _noise(self, name: str, start: int, stop: int, columns: int) -> Tensor:
        generator = keyed_generator(self.seed, self.draw, name, start)
        return torch.randn(stop - start, columns, generator=generator)

    def _norm(self, name: str, shape: tuple[int, int]) -> float:
        if name not in self._norms:
            rows, columns = shape
            noise = (self._noise(name, start, stop, columns) for start, stop in row_blocks(rows, columns))
            self._norms[name] = sum(float(block.double().square().sum()) for block in noise) ** 0.5 or 1.0
        return self._norms[name]


def _with_row_norms(block: Tensor, like: Tensor) -> Tensor:
    """`block`, scaled in place to the row norms of `like`."""
    norms = torch.linalg.vector_norm(like, dim=1, keepdim=True)
    return block.mul_(norms / torch.linalg.vector_norm(block, dim=1, keepdim=True).clamp_min(1e-30))


@dataclass
class RankOne:
    """`u vᵀ` on the parameters in `pairs`, a given tensor on those in `tensors`, 0 elsewhere.

    `normalize="tensor"` scales the direction on every parameter to the parameter's norm, so that an offset of 0.1
    changes each of them by a tenth; `"filter"` does so row by row.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    normalize: Normalize = "none"
    _norms: Mapping[str, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # Gathering needs all processes, and `block` is called only by those that hold rows of the block.
        if self.normalize != "none":
            self._norms = full_norms({name: t for name, t in self.tensors.items() if isinstance(t, DTensor)})

    def block(self, name: str, shard: LocalShard, start: int, stop: int) -> Tensor | None:
        """See `Direction`."""
        if name in self.pairs:
            u, v = (vector.to(shard.entries_RC) for vector in self.pairs[name])
            rows = shard.local_rows(start, stop)
            block = torch.outer(u[rows.start + shard.row : rows.stop + shard.row], v)
        elif name in self.tensors:
            block = _matching_entries(self.tensors[name], shard, start, stop)
        else:
            return None
        if self.normalize == "tensor" or (self.normalize == "filter" and not shard.has_full_rows):
            block *= shard.norm() / (self._norm(name) or 1.0)
        elif self.normalize == "filter":
            _with_row_norms(block, shard.entries(start, stop))
        return block

    def _norm(self, name: str) -> float:
        if name in self.pairs:
            u, v = self.pairs[name]
            return float(torch.linalg.vector_norm(u) * torch.linalg.vector_norm(v))
        return self._norms[name] if name in self._norms else float(torch.linalg.vector_norm(self.tensors[name]))


def _matching_entries(tensor: Tensor, shard: LocalShard, start: int, stop: int) -> Tensor:
    """A copy of the entries of `tensor` in rows start … stop that match those of `shard`.

    `tensor` has the parameter's shape and is sharded like it, or not at all.
    """
    if isinstance(tensor, DTensor):
        return local_shard(tensor).entries(start, stop).to(shard.entries_RC, copy=True)
    return shard.crop(as_rows(tensor)[start:stop], start).to(shard.entries_RC, copy=True)


@dataclass
class Difference:
    """`end − model` for stored end-point tensors; along it, `t` in [0, 1] is linear interpolation."""

    end: Mapping[str, Tensor]

    def block(self, name: str, shard: LocalShard, start: int, stop: int) -> Tensor | None:
        return _matching_entries(self.end[name], shard, start, stop).sub_(shard.entries(start, stop))


def weight_pca_directions(
    model: nn.Module,
    count: int,
    *,
    normalize: Normalize = "none",
    known: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> list[RankOne]:
    """The top `count` PCA directions of a model's own weights.

    The k-th is `u_k v_kᵀ`, of unit Frobenius norm, on every matrix and the parameter itself on every one-dimensional
    parameter. It is 0 on a matrix with fewer than k singular values above rounding: the vectors of the others are
    arbitrary.

    Args:
        model: parameters of one or more dimensions; more than two are seen as (first, rest).
        count: number of directions K.
        normalize: see `RankOne`.
        known: (u (M, ≥K), v (N, ≥K)) of matrices that have been decomposed already, by parameter name.
    """
    known = known or {}
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    own = {name: parameter.clone() for name, parameter in parameters.items() if parameter.ndim < 2}
    unknown = {name: p for name, p in parameters.items() if name not in own and name not in known}
    vectors = {**_vectors(unknown, count), **{name: known[name] for name in parameters if name in known}}
    return [
        RankOne(
            {name: (u[:, k], v[:, k]) for name, (u, v) in vectors.items() if k < u.shape[1]},
            own,
            normalize,
        )
        for k in range(count)
    ]


def _vectors(matrices: Mapping[str, Tensor], count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(u, v) of matrices by name, float32; the processes split the sharded ones.

    Raises:
        ValueError, RuntimeError: a matrix cannot be decomposed; raised in all processes.
    """

    def decompose(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return principal_vectors(as_rows(matrix), count)[1:]

    sharded = {name: matrix for name, matrix in matrices.items() if isinstance(matrix, DTensor)}
    found = {name: decompose(matrix) for name, matrix in matrices.items() if name not in sharded}
    if not sharded:
        return found
    shards = ProcessGroup(next(iter(sharded.values())).device_mesh.get_group())
    names = list(sharded)
    for start in range(0, len(names), shards.size):
        batch = names[start : start + shards.size]
        own: Tensor | None = None
        for owner, name in enumerate(batch):
            matrix = full_tensor(sharded[name])
            own = matrix if owner == shards.rank else own
        pair: Any = None
        try:
            if own is not None:
                pair = tuple(vectors.cpu() for vectors in decompose(own))
        except (ValueError, RuntimeError) as error:
            pair = error
        for name, outcome in zip(batch, shards.all_gather(pair), strict=False):
            if isinstance(outcome, Exception):
                raise outcome
            found[name] = outcome
    return found


def trajectory_pca_directions(
    states: Sequence[Mapping[str, Tensor]], names: Iterable[str], count: int, *, normalize: Normalize = "none"
) -> tuple[list[RankOne], Tensor]:
    """Principal components of a trajectory of checkpoints, centred, and the share of variance of each.

    Computed from the S × S Gram matrix of S checkpoints, in float64. Without normalisation, directions have unit norm
    over all parameters.

    Raises:
        ValueError: fewer than two checkpoints, or `count` above S − 1.
    """
    if not 1 <= count <= len(states) - 1:
        raise ValueError(f"count must be between 1 and checkpoints - 1 = {len(states) - 1}, got {count}")
    names = list(names)
    gram = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name in names:
        flat = torch.stack([local_tensor(state[name]).flatten().float() for state in states]).double()
        flat -= flat.mean(0)
        gram += (flat @ flat.mT).cpu()
    if names:
        gram = sum_over_shards(gram, states[0][names[0]])
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    directions = []
    for k in range(count):
        # Σ_s c_s (θ_s − mean) = Σ_s c_s θ_s, because the coefficients of a centred Gram matrix sum to 0.
        weights = (vectors[:, k] / values[k].sqrt().clamp_min(1e-30)).tolist()
        tensors = {
            name: sum(weight * state[name].double() for weight, state in zip(weights, states, strict=True)).float()
            for name in names
        }
        directions.append(RankOne({}, tensors, normalize))
    return directions, values[:count] / values.sum().clamp_min(1e-30)
