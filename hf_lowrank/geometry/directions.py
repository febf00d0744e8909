"""Directions in parameter space, given tensor by tensor and block by block, so that none is ever held whole.

A parameter is seen as a matrix of rows (its first dimension) by columns (the rest); one-dimensional ones are a
single row. A block is a range of whole rows. Random numbers are drawn on the CPU from a generator of their own for
each (seed, draw, parameter, block), so they depend on neither device nor order, nor on how a parameter is divided
among processes: each of them draws the blocks that it holds rows of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .parts import Part, as_rows, local, norms, part_of, summed, whole
from .spectra import singular_vectors
from .team import Team

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

    def block(self, name: str, parameter_RC: Tensor | Part, start: int, stop: int) -> Tensor | None:
        """d's entries (stop − start, columns) on rows of one parameter, on its device; None where `d` is 0.

        `parameter_RC` is the unperturbed parameter as rows; `start` and `stop` are one of its `row_blocks`. Of a
        parameter that is divided among processes it is the `Part` held here, and only the entries in that part are
        wanted. The caller may write into the result.
        """
        ...


def _seen(parameter_RC: Tensor | Part) -> Part:
    return parameter_RC if isinstance(parameter_RC, Part) else part_of(parameter_RC)


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

    def block(self, name: str, parameter_RC: Tensor | Part, start: int, stop: int) -> Tensor | None:
        part = _seen(parameter_RC)
        if self.normalize != "none" and part.shape[0] == 1:
            return None
        block = part.cut(self._noise(name, start, stop, part.shape[1]), start).to(part.device)
        if self.normalize == "filter":
            return _scale_rows(block, part.held_RC[part.rows(start, stop)])
        if self.normalize == "tensor":
            block *= part.total_norm() / self._norm(name, part.shape)
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
    _norms: Mapping[str, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # Here, where every process comes by: blocks are asked for where they lie.
        if self.normalize != "none":
            self._norms = norms({name: t for name, t in self.tensors.items() if isinstance(t, DTensor)})

    def block(self, name: str, parameter_RC: Tensor | Part, start: int, stop: int) -> Tensor | None:
        if name not in self.pairs and name not in self.tensors:
            return None
        part = _seen(parameter_RC)
        block = self._block(name, part, start, stop)
        if self.normalize == "tensor" or (self.normalize == "filter" and not part.whole_rows):
            block *= part.total_norm() / (self._norm(name) or 1.0)
        elif self.normalize == "filter":
            _scale_rows(block, part.held_RC[part.rows(start, stop)])
        return block

    def _block(self, name: str, part: Part, start: int, stop: int) -> Tensor:
        if name in self.pairs:
            u, v = (vector.to(part.held_RC) for vector in self.pairs[name])
            rows = part.rows(start, stop)
            return torch.outer(u[rows.start + part.row : rows.stop + part.row], v)
        return _there(self.tensors[name], part, start, stop)

    def _norm(self, name: str) -> float:
        if name in self.pairs:
            u, v = self.pairs[name]
            return float(torch.linalg.vector_norm(u) * torch.linalg.vector_norm(v))
        return self._norms[name] if name in self._norms else float(torch.linalg.vector_norm(self.tensors[name]))


def _there(tensor: Tensor, part: Part, start: int, stop: int) -> Tensor:
    """A copy of rows start … stop of `tensor`, which is divided as the parameter is or whole, that lie in `part`."""
    if isinstance(tensor, DTensor):
        return part_of(tensor).held_RC[part.rows(start, stop)].to(part.held_RC, copy=True)
    return part.cut(as_rows(tensor)[start:stop], start).to(part.held_RC, copy=True)


@dataclass
class Difference:
    """`end − model` for stored end-point tensors; along it, `t` in [0, 1] is linear interpolation."""

    end: Mapping[str, Tensor]

    def block(self, name: str, parameter_RC: Tensor | Part, start: int, stop: int) -> Tensor | None:
        part = _seen(parameter_RC)
        return _there(self.end[name], part, start, stop).sub_(part.held_RC[part.rows(start, stop)])


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
    """(u, v) of matrices by name, float32; those that are divided among processes are shared out.

    Raises:
        ValueError, RuntimeError: a matrix cannot be decomposed; on all processes, whichever it belonged to.
    """

    def of(matrix: Tensor) -> tuple[Tensor, Tensor]:
        _, u, v = singular_vectors(as_rows(matrix), count)
        return u.float(), v.float()

    divided = {name: matrix for name, matrix in matrices.items() if isinstance(matrix, DTensor)}
    found = {name: of(matrix) for name, matrix in matrices.items() if name not in divided}
    if not divided:
        return found
    team = Team(next(iter(divided.values())).device_mesh.get_group())
    names = list(divided)
    for start in range(0, len(names), team.size):
        batch = names[start : start + team.size]
        mine: Tensor | None = None
        for owner, name in enumerate(batch):
            matrix = whole(divided[name])
            mine = matrix if owner == team.rank else mine
        pair: Any = None
        try:
            if mine is not None:
                pair = tuple(vectors.cpu() for vectors in of(mine))
        except (ValueError, RuntimeError) as error:
            pair = error
        for name, outcome in zip(batch, team.exchange(pair), strict=False):
            if isinstance(outcome, Exception):
                raise outcome
            found[name] = outcome
    return found


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
        flat = torch.stack([local(state[name]).flatten().float() for state in states]).double()
        flat -= flat.mean(0)
        gram += (flat @ flat.mT).cpu()
    if names:
        gram = summed(gram, states[0][names[0]])
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
