"""How a target parameter is seen as matrices: decided once, from its shape and the options of its group.

Every method works on *oriented* matrices: views whose last dimension is the one that is projected. A left projection
of W is a right projection of its transpose, so one set of formulas covers both sides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_lowrank.compat import is_view
from hf_lowrank.errors import UserError
from hf_lowrank.optim.sharding import (
    REPLICATED,
    Replicated,
    RowSharded,
    Sharding,
    check_sharded_by_rows,
    local_part,
    sharding_of,
)

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")
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
        channels_last: whether a convolution kernel's columns are in the order of that memory format.
        sharding: how the parameter's rows are sharded, None if they are not.
        partition: how each matrix is split among processes. A sharded stack is split into whole matrices.
    """

    count: int
    rows: int
    columns: int
    transposed: bool
    both: bool
    stacked: bool
    rank: int
    first_index: int
    channels_last: bool = False
    sharding: Sharding | None = None
    partition: Replicated = REPLICATED

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """Equal for parameters whose matrices can be stepped in one batch."""
        return (self.rows, self.columns, self.transposed, self.both, self.rank, self.sharding and self.sharding.key)

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
    def elements(self) -> int:
        """Elements of the whole parameter."""
        return self.count * self.rows * self.columns

    def state_shape(self, *shape: int) -> tuple[int, ...]:
        """`shape`, preceded by the number of matrices if the parameter stacks several."""
        return (self.count, *shape) if self.stacked else shape

    def matrices(self, tensor: Tensor) -> list[Tensor]:
        """Oriented 2-D views of this process's part of a tensor of the parameter's shape."""
        return [view.mT if self.transposed else view for view in self.stored(tensor)]

    def stored(self, tensor: Tensor) -> Sequence[Tensor]:
        """The same views, oriented as they are stored."""
        return tensor.unbind(0) if self.stacked else (_as_matrix(tensor, self.channels_last),)

    def parts(self, state_tensor: Tensor) -> Sequence[Tensor]:
        """Views of each matrix's part of this process's part of a state tensor."""
        return state_tensor.unbind(0) if self.stacked else (state_tensor,)


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


def is_transposed(rows: int, columns: int, proj_type: str) -> bool:
    """Whether `proj_type` projects an m × n matrix from the left (GaLore's rule, arXiv 2403.03507)."""
    if proj_type == "std":
        return rows < columns
    if proj_type == "reverse_std":
        return rows >= columns
    return proj_type == "left"


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
    flattened after its first dimension. `matrix="flatten"` or `"stack"` overrides that rule.

    Raises:
        UserError: a vector, a rank above the smaller side, or an unknown option; names the parameter.
    """
    if proj_type not in PROJ_TYPES:
        raise UserError(f"proj_type of {name} must be one of {', '.join(PROJ_TYPES)}, got {proj_type!r}")
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
    transposed = is_transposed(rows, columns, proj_type)
    if transposed:
        rows, columns = columns, rows
    both, sharding = proj_type == "full", sharding_of(param)
    partition = REPLICATED
    if sharding is not None and not stacked:
        partition = RowSharded(
            sharding,
            rows=rows,
            columns=columns,
            low_rows=rank if both else rows,
            rank=rank,
            dtype=param.dtype,
            along_rows=not transposed,
            both=both,
        )
    return Layout(
        count=count,
        rows=rows,
        columns=columns,
        transposed=transposed,
        both=both,
        stacked=stacked,
        rank=rank,
        first_index=first_index,
        channels_last=channels_last,
        sharding=sharding,
        partition=partition,
    )
