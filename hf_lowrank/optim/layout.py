"""How a target parameter is seen as matrices: decided once, from its shape and the options of its group.

Every method works on *oriented* matrices: views whose last dimension is the one that is projected. A left projection
of W is a right projection of its transpose, so one set of formulas covers both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_lowrank.compat import is_view
from hf_lowrank.errors import UserError
from hf_lowrank.optim.sharding import Sharding, check_sharded_by_rows, local_part, sharding_of

MATRIX_VIEWS = ("auto", "stack", "flatten")


@dataclass(frozen=True)
class Layout:
    """One target parameter's matrices.

    Attributes:
        count: number of matrices (1, or the number of stacked experts).
        rows, columns: shape of an oriented matrix; `columns` is projected to `rank`.
        transposed: whether the oriented matrix is the transpose of the stored one (a left projection).
        both: whether rows are projected as well (`proj_type="full"`).
        stacked: whether the first dimension counts matrices.
        rank: of the subspace.
        first_index: index of the first matrix among all of the optimizer's; seeds its random draws.
        dtype: of the parameter.
        channels_last: whether a convolution kernel's columns are in the order of that memory format.
        sharding: how the parameter's rows are sharded, None if they are not.
    """

    count: int
    rows: int
    columns: int
    transposed: bool
    both: bool
    stacked: bool
    rank: int
    first_index: int
    dtype: torch.dtype
    channels_last: bool
    sharding: Sharding | None

    @cached_property
    def partition(self) -> Replicated:
        """How each matrix is split among processes. A sharded stack is split into whole matrices."""
        return REPLICATED if self.sharding is None or self.stacked else RowSharded(self, self.sharding)

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """Equal for parameters whose matrices can be stepped in one batch."""
        sharded = self.sharding and (self.sharding.mesh, self.sharding.placements)
        return (self.rows, self.columns, self.transposed, self.both, self.rank, sharded)

    @cached_property
    def held_indices(self) -> range:
        """Indices, among all of the optimizer's, of the matrices that this process holds something of."""
        if self.sharding is None or not self.stacked:
            return range(self.first_index, self.first_index + self.count)
        return range(*(self.first_index + bound for bound in self.sharding.bounds(self.count)))

    @property
    def low_shape(self) -> tuple[int, int]:
        """Shape of the projected gradient."""
        return (self.rank if self.both else self.rows, self.rank)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of a whole matrix as it is stored."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)

    @property
    def elements(self) -> int:
        """Elements of the whole parameter."""
        return self.count * self.rows * self.columns

    def matrices(self, tensor: Tensor) -> list[Tensor]:
        """Oriented 2-D views of this process's part of a tensor of the parameter's shape."""
        return [view.mT if self.transposed else view for view in self.stored(tensor)]

    def stored(self, tensor: Tensor) -> Sequence[Tensor]:
        """The same views, oriented as they are stored."""
        return tensor.unbind(0) if self.stacked else (_as_matrix(tensor, self.channels_last),)

    def parts(self, state_tensor: Tensor) -> Sequence[Tensor]:
        """Views of each matrix's part of this process's part of a state tensor."""
        return state_tensor.unbind(0) if self.stacked else (state_tensor,)


class Replicated:
    """Matrices that each process holds whole: nothing is communicated.

    Methods take k matrices of one shape at a time; `rows_i` are a process's rows of the projection.
    """

    def bases(self, parts: list[Tensor]) -> list[Tensor]:
        """The bases that this process multiplies by, from its rows of them."""
        return parts

    def whole_indices(self, parts: list[Tensor]) -> list[Tensor]:
        """Whole bases of column indices, from this process's parts of them."""
        return parts

    def left_bases(self, parts: list[Tensor]) -> list[Tensor]:
        """The same for the bases that project the rows."""
        return parts

    def bases_from_whole(self, bases: list[Tensor]) -> list[Tensor]:
        """The bases that this process multiplies by, from whole ones."""
        return bases

    def basis_rows(self, parts: list[Tensor]) -> list[Tensor]:
        """This process's rows of the bases, see `dense_basis`."""
        return parts

    def own_rows(self, basis: Tensor) -> Tensor:
        """This process's rows of a whole basis."""
        return basis

    def own_basis_rows(self, bases: Tensor) -> Tensor:
        """This process's rows of the bases that it multiplies by, (k, columns or columns_i, rank)."""
        return bases

    def projected(self, products: Tensor) -> Tensor:
        """This process's rows of the projections, from its products: (k, rows, rank) -> (k, rows_i, rank)."""
        return products

    def for_lifting(self, parts: Tensor) -> Tensor:
        """The rows that this process needs to lift, or to scale its part of the gradients: (k, rows_i, …)."""
        return parts

    def own_low_rows(self, whole: Tensor) -> Tensor:
        """The inverse of `for_lifting`, for one matrix."""
        return whole

    def energy(self, products: Tensor) -> Tensor:
        """`‖G Q‖²` of one gradient, from this process's product."""
        return products.square().sum()

    def row_norms(self, norms: Tensor) -> Tensor:
        """Norms of the gradients' rows, (k, rows_i), from the norms of this process's parts of them."""
        return norms

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        return values

    def norms(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Euclidean norms over the last dimension, which is split among processes."""
        return torch.linalg.vector_norm(values, dim=-1, dtype=dtype)


REPLICATED = Replicated()


class RowSharded(Replicated):
    """Matrices that are sharded along their rows or their columns: those of a parameter that is not a stack."""

    def __init__(self, layout: Layout, sharding: Sharding) -> None:
        self._layout, self._sharding = layout, sharding
        self._along_rows = not layout.transposed
        self._is_sum = layout.both or layout.transposed

    def bases(self, parts: list[Tensor]) -> list[Tensor]:
        if not parts[0].is_floating_point():
            return self.bases_from_whole(self._gathered(parts, self._layout.rank))
        return self._gathered(parts, self._layout.columns) if self._along_rows else parts

    def whole_indices(self, parts: list[Tensor]) -> list[Tensor]:
        return self._gathered(parts, self._layout.rank)

    def left_bases(self, parts: list[Tensor]) -> list[Tensor]:
        return parts if self._along_rows else self._gathered(parts, self._layout.rows)

    def bases_from_whole(self, bases: list[Tensor]) -> list[Tensor]:
        if self._along_rows:
            return bases
        if not bases[0].is_floating_point():
            return self._unit_rows(bases)
        return [self._sharding.part(basis) for basis in bases]

    def basis_rows(self, parts: list[Tensor]) -> list[Tensor]:
        if parts[0].is_floating_point():
            return parts
        return self._unit_rows(self._gathered(parts, self._layout.rank))

    def own_rows(self, basis: Tensor) -> Tensor:
        return self._sharding.part(basis)

    def own_basis_rows(self, bases: Tensor) -> Tensor:
        if not self._along_rows:
            return bases
        first, end = self._sharding.bounds(self._layout.columns)
        return bases.narrow(1, first, end - first)

    def projected(self, products: Tensor) -> Tensor:
        return self._sharding.scatter_sum(products) if self._is_sum else products

    def for_lifting(self, parts: Tensor) -> Tensor:
        return self._sharding.gather(parts, self._layout.low_shape[0]) if self._is_sum else parts

    def own_low_rows(self, whole: Tensor) -> Tensor:
        return self._sharding.part(whole) if self._is_sum else whole

    def energy(self, products: Tensor) -> Tensor:
        if not self._along_rows:
            products = self._sharding.scatter_sum(products[None])
        return self.sum(products.square().sum())

    def row_norms(self, norms: Tensor) -> Tensor:
        return self._sharding.scatter_sum(norms.square()).sqrt() if self._is_sum else norms

    def sum(self, values: Tensor) -> Tensor:
        return self._sharding.sum(values)

    def norms(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.sum(super().norms(values, dtype).square()).sqrt()

    def _gathered(self, parts: Sequence[Tensor], length: int) -> list[Tensor]:
        return list(self._sharding.gather(torch.stack(list(parts)), length).unbind())

    def _unit_rows(self, bases: Sequence[Tensor]) -> list[Tensor]:
        """This process's rows of the unit vectors that column indices stand for."""
        held = torch.arange(*self._sharding.bounds(self._layout.columns), device=bases[0].device)
        return [(held[:, None] == chosen).to(self._layout.dtype) for chosen in bases]


def dense_basis(basis: Tensor, columns: int) -> Tensor:
    """A basis as a matrix (columns, rank) in at least float32; column indices stand for unit vectors."""
    if basis.is_floating_point():
        return basis.to(torch.promote_types(basis.dtype, torch.float32))
    return torch.eye(columns, device=basis.device).index_select(1, basis)


def stored_in(layout: Layout, weight: Tensor, name: str) -> Sequence[Tensor]:
    """`layout.stored` of a weight that is written to.

    Raises:
        UserError: the weight's memory format has changed since the layout was made; names the parameter.
    """
    views = layout.stored(weight)
    if weight.ndim > 2 and not is_view(views[0]):
        raise UserError(
            f"{name} is in another memory format than when the optimizer was created; convert the model before that"
        )
    return views


def _as_matrix(tensor: Tensor, channels_last: bool) -> Tensor:
    if tensor.ndim == 2:
        return tensor
    return (tensor.permute(0, 2, 3, 1) if channels_last else tensor).flatten(1)


def check_rank(rank: object, name: str, shape: Sequence[int], rows: int, columns: int) -> None:
    """Raises UserError unless `rank` is an integer from 1 to the shorter side of parameter `name`'s matrices."""
    most = min(rows, columns)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise UserError(f"rank must be from 1 to {most} for {name} of shape {tuple(shape)}, got {rank!r}")


def make_layout(
    param: Tensor, name: str, *, rank: int, proj_type: str, matrix: str = "auto", first_index: int = 0
) -> Layout:
    """The layout of target parameter `name`.

    A parameter of three dimensions is a stack of matrices (experts); one of four or five is a convolution kernel,
    flattened after its first dimension. `matrix="flatten"` or `"stack"` overrides that rule. `proj_type` is one of the
    settings' sides, or `std_left`: `std`, but a square matrix is projected on its left.

    Raises:
        UserError: a vector, a rank above the smaller side, or an unknown `matrix`; names the parameter.
    """
    if matrix not in MATRIX_VIEWS:
        raise UserError(f"matrix of {name} must be one of {', '.join(MATRIX_VIEWS)}, got {matrix!r}")
    if param.ndim < 2:
        raise UserError(
            f"{name} of shape {tuple(param.shape)} is not a matrix and has no low-rank subspace; "
            "put it into a group with rank=None, or pass the model itself"
        )
    stacked = param.ndim == 3 if matrix == "auto" else matrix == "stack"
    if stacked and param.ndim != 3:
        raise UserError(f"matrix='stack' needs three dimensions, {name} has shape {tuple(param.shape)}")
    check_sharded_by_rows(param, name)
    held = local_part(param.detach())
    channels_last = not stacked and held.ndim == 4 and held.is_contiguous(memory_format=torch.channels_last)
    if not stacked and held.ndim > 2 and not is_view(_as_matrix(held, channels_last)):
        raise UserError(f"{name} of shape {tuple(param.shape)} must be contiguous to be seen as a matrix")
    count = param.shape[0] if stacked else 1
    rows, columns = param.shape[-2:] if stacked else (param.shape[0], math.prod(param.shape[1:]))
    check_rank(rank, name, param.shape, rows, columns)
    # GaLore's rule (arXiv 2403.03507) and LDAdam's (arXiv 2410.16103); False for "right" and "full".
    left = {"std": rows < columns, "std_left": rows <= columns, "reverse_std": rows >= columns, "left": True}
    transposed = left.get(proj_type, False)
    if transposed:
        rows, columns = columns, rows
    return Layout(
        count=count,
        rows=rows,
        columns=columns,
        transposed=transposed,
        both=proj_type == "full",
        stacked=stacked,
        rank=rank,
        first_index=first_index,
        dtype=param.dtype,
        channels_last=channels_last,
        sharding=sharding_of(param),
    )
