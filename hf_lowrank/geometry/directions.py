"""Directions in parameter space, given tensor by tensor and block by block, so that none is ever held whole.

A parameter is seen as a matrix of rows (its first dimension) by columns (the rest); one-dimensional ones are a
single row. A block is a range of whole rows. Random numbers are drawn on the CPU from a generator of their own for
each (seed, draw, parameter), so they depend on neither device nor order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .spectra import singular_vectors

Normalize = Literal["none", "tensor", "filter"]
BLOCK_ENTRIES = 2**18


def as_rows(tensor: Tensor) -> Tensor:
    """A view of a parameter as (rows, columns); one-dimensional ones are one row."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(tensor.shape[0], -1)


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

    def block(self, name: str, parameter_RC: Tensor, start: int, stop: int) -> Tensor | None:
        """d's entries (stop − start, columns) on rows of one parameter, on its device; None where `d` is 0.

        `parameter_RC` is the unperturbed parameter as rows; `start` and `stop` are one of its `row_blocks`. The
        caller may write into the result.
        """
        ...


@dataclass
class Gaussian:
    """`d ~ N(0, I)` on every parameter, regenerated from its key whenever it is needed.

    `normalize="filter"` gives each row of `d` the norm of the parameter's row, `"tensor"` the whole tensor its norm;
    both leave one-dimensional parameters where they are (arXiv 1712.09913). `"none"` is the unnormalised direction.
    """

    seed: int
    draw: int
    normalize: Normalize = "none"
    _norms: dict[str, float] = field(default_factory=dict, repr=False)

    def block(self, name: str, parameter_RC: Tensor, start: int, stop: int) -> Tensor | None:
        if self.normalize != "none" and parameter_RC.shape[0] == 1:
            return None
        block = self._noise(name, start, stop, parameter_RC.shape[1]).to(parameter_RC.device)
        if self.normalize == "filter":
            return _scale_rows(block, parameter_RC[start:stop])
        if self.normalize == "tensor":
            block *= float(torch.linalg.vector_norm(parameter_RC)) / self._norm(name, parameter_RC)
        return block

    def _noise(self, name: str, start: int, stop: int, columns: int) -> Tensor:
        generator = keyed_generator(self.seed, self.draw, name, start)
        return torch.randn(stop - start, columns, generator=generator)

    def _norm(self, name: str, parameter_RC: Tensor) -> float:
        if name not in self._norms:
            rows, columns = parameter_RC.shape
            noise = (self._noise(name, start, stop, columns) for start, stop in row_blocks(rows, columns))
            self._norms[name] = sum(float(block.double().square().sum()) for block in noise) ** 0.5 or 1.0
        return self._norms[name]


def _scale_rows(block: Tensor, like: Tensor) -> Tensor:
    """`block` with the row norms of `like`, in place."""
    norms = torch.linalg.vector_norm(like, dim=1, keepdim=True)
    return block.mul_(norms / torch.linalg.vector_norm(block, dim=1, keepdim=True).clamp_min(1e-30))


@dataclass
class RankOne:
    """`u vᵀ` on the parameters in `pairs`, a given tensor on those in `tensors`, 0 elsewhere.

    `normalize="tensor"` scales every parameter's part to the parameter's own norm, so that an offset of 0.1 changes
    each of them by a tenth; `"filter"` does so row by row.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    normalize: Normalize = "none"

    def block(self, name: str, parameter_RC: Tensor, start: int, stop: int) -> Tensor | None:
        if name not in self.pairs and name not in self.tensors:
            return None
        block = self._block(name, parameter_RC, start, stop)
        if self.normalize == "tensor":
            block *= float(torch.linalg.vector_norm(parameter_RC)) / (self._norm(name) or 1.0)
        elif self.normalize == "filter":
            _scale_rows(block, parameter_RC[start:stop])
        return block

    def _block(self, name: str, parameter_RC: Tensor, start: int, stop: int) -> Tensor:
        if name in self.pairs:
            u, v = self.pairs[name]
            return torch.outer(u[start:stop].to(parameter_RC), v.to(parameter_RC))
        return as_rows(self.tensors[name])[start:stop].to(parameter_RC, copy=True)

    def _norm(self, name: str) -> float:
        if name in self.pairs:
            u, v = self.pairs[name]
            return float(torch.linalg.vector_norm(u) * torch.linalg.vector_norm(v))
        return float(torch.linalg.vector_norm(self.tensors[name]))


@dataclass
class Difference:
    """`end − model` for stored end-point tensors; along it, `t` in [0, 1] is linear interpolation."""

    end: Mapping[str, Tensor]

    def block(self, name: str, parameter_RC: Tensor, start: int, stop: int) -> Tensor | None:
        return as_rows(self.end[name])[start:stop].to(parameter_RC, copy=True).sub_(parameter_RC[start:stop])


def weight_pca_directions(
    model: nn.Module,
    count: int,
    *,
    normalize: Normalize = "none",
    known: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> list[RankOne]:
    """The top `count` PCA directions of a model's own weights.

    The k-th puts `u_k v_kᵀ`, of unit Frobenius norm, on every matrix and the parameter itself on every
    one-dimensional parameter. A matrix with fewer than k singular directions stays where it is in the k-th.

    Args:
        model: parameters of one or more dimensions; more than two are seen as (first, rest).
        count: number of directions K.
        normalize: see `RankOne`.
        known: (u (M, ≥K), v (N, ≥K)) of matrices that are decomposed already, by parameter name.
    """
    vectors: dict[str, tuple[Tensor, Tensor]] = {}
    own: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            own[name] = parameter.detach().clone()
        elif known is not None and name in known:
            vectors[name] = known[name]
        else:
            _, u, v = singular_vectors(as_rows(parameter.detach()), count)
            vectors[name] = (u.float(), v.float())
    return [
        RankOne(
            {name: (u[:, k], v[:, k]) for name, (u, v) in vectors.items() if k < u.shape[1]},
            own,
            normalize,
        )
        for k in range(count)
    ]


def trajectory_pca_directions(
    states: Sequence[Mapping[str, Tensor]], names: Iterable[str], count: int, *, normalize: Normalize = "none"
) -> tuple[list[RankOne], Tensor]:
    """Principal components of a trajectory of checkpoints, centred, and the share of variance of each.

    Computed from the S × S Gram matrix of S checkpoints, in float64. Directions have unit norm over all parameters
    unless normalised.

    Raises:
        ValueError: fewer than two checkpoints, or `count` above S − 1.
    """
    if not 1 <= count <= len(states) - 1:
        raise ValueError(f"count must be between 1 and checkpoints - 1 = {len(states) - 1}, got {count}")
    names = list(names)
    gram = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name in names:
        flat = torch.stack([state[name].flatten().float() for state in states]).double()
        flat -= flat.mean(0)
        gram += (flat @ flat.mT).cpu()
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
