"""How a parameter is seen as matrices: decided once, from its shape and its group's options.

Every method works on *oriented* matrices: a view whose last dimension is the one that gets projected. A left
projection of W is a right projection of its transpose, so that one set of formulas serves both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.errors import UserError
from hf_lowrank.optim.places import ALONE, Alone, Cut
from hf_lowrank.optim.sharding import Sharding, check_divided_by_rows, local_part, sharding_of

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")
MATRIX_VIEWS = ("auto", "stack", "flatten")


@dataclass(frozen=True)
class Layout:
    """One target parameter's matrices.

    Attributes:
        count: how many matrices it holds (1, or the number of stacked experts).
        rows, columns: shape of an oriented matrix; `columns` is projected to `rank`.
        transposed: whether the oriented matrix is the transpose of the stored one (a left projection).
        both: whether rows are projected as well (`proj_type="full"`).
        stacked: whether the first dimension counts matrices.
        channels_last: whether a kernel's columns are in the order of that memory format; it is free.
        rank: the rank of the subspace.
        index: the number of the first matrix among all of the optimizer's; keys its random draws.
        sharding: how the parameter's rows are divided among processes, None where they are not.
        place: where the parts of each matrix lie. A stack is divided into whole matrices.
    """

    count: int
    rows: int
    columns: int
    transposed: bool
    both: bool
    stacked: bool
    rank: int
    index: int
    channels_last: bool = False
    sharding: Sharding | None = None
    place: Alone = ALONE

    @property
    def numbers(self) -> range:
        """The numbers of the matrices of which this process holds something, among all of the optimizer's."""
        if self.sharding is None or not self.stacked:
            return range(self.index, self.index + self.count)
        return range(*(self.index + bound for bound in self.sharding.bounds(self.count)))

    @property
    def low_shape(self) -> tuple[int, int]:
        """Shape of the projected gradient."""
        return (self.rank if self.both else self.rows, self.rank)

    @property
    def param_elements(self) -> int:
        return self.count * self.rows * self.columns

    def state_shape(self, *shape: int) -> tuple[int, ...]:
        """`shape`, with the number of matrices in front where the parameter holds several."""
        return (self.count, *shape) if self.stacked else shape

    def zeros(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """A state tensor of zeros, divided as the parameter `like` is."""
        if self.sharding is None or not shape:
            return torch.zeros(shape, dtype=dtype, device=like.device)
        return self.sharding.zeros(shape, like, dtype)

    def matrices(self, tensor: Tensor) -> list[Tensor]:
        """Oriented 2-D views of what this process holds of a weight or gradient of this layout's parameter."""
        return [view.mT if self.transposed else view for view in self.stored(tensor)]

    def stored(self, tensor: Tensor) -> Sequence[Tensor]:
        """The same views, oriented as they are stored."""
        return tensor.unbind(0) if self.stacked else (_as_matrix(tensor, self.channels_last),)

    def parts(self, state_tensor: Tensor) -> list[Tensor]:
        """What this process holds of a state tensor for each matrix, as views."""
        state_tensor = local_part(state_tensor)
        return list(state_tensor.unbind(0)) if self.stacked else [state_tensor]

    def stored_in(self, weight: Tensor, name: str) -> Sequence[Tensor]:
        """`stored`, of a weight that is written to.

        Raises:
            UserError: the memory format is no longer that which the layout was made for; names the parameter.
        """
        views = self.stored(weight)
        if weight.ndim > 2 and not views[0]._is_view():
            raise UserError(
                f"{name} is in another memory format than when the optimizer was made; convert the model before"
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


def make_layout(param: Tensor, name: str, *, rank: int, proj_type: str, matrix: str, index: int) -> Layout:
    """The layout of target parameter `name`.

    Three dimensions are a stack of matrices (experts); four or five a convolution kernel, flattened behind its
    first dimension; `matrix="flatten"` or `"stack"` decides where that guess is wrong.

    Raises:
        UserError: a vector, a rank above the smaller side, or an unknown option, naming the parameter.
    """
    if proj_type not in PROJ_TYPES:
        raise UserError(f"proj_type of {name} must be one of {', '.join(PROJ_TYPES)}, got {proj_type!r}")
    if matrix not in MATRIX_VIEWS:
        raise UserError(f"matrix of {name} must be one of {', '.join(MATRIX_VIEWS)}, got {matrix!r}")
    if param.ndim < 2:
        raise UserError(
            f"{name} of shape {tuple(param.shape)} is no matrix and has no low-rank subspace; "
            "put it into a group with rank=None, or pass the model itself"
        )
    stacked = param.ndim == 3 if matrix == "auto" else matrix == "stack"
    if stacked and param.ndim != 3:
        raise UserError(f"matrix='stack' needs three dimensions, {name} has shape {tuple(param.shape)}")
    check_divided_by_rows(param, name)
    held = local_part(param.detach())
    channels_last = not stacked and held.ndim == 4 and held.is_contiguous(memory_format=torch.channels_last)
    if not stacked and held.ndim > 2 and not _as_matrix(held, channels_last)._is_view():
        raise UserError(f"{name} of shape {tuple(param.shape)} must be contiguous to be seen as a matrix")
    count = param.shape[0] if stacked else 1
    rows, columns = param.shape[-2:] if stacked else (param.shape[0], math.prod(param.shape[1:]))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(rows, columns):
        raise UserError(
            f"rank must be from 1 to {min(rows, columns)} for {name} of shape {tuple(param.shape)}, got {rank!r}"
        )
    transposed = is_transposed(rows, columns, proj_type)
    if transposed:
        rows, columns = columns, rows
    both, sharding = proj_type == "full", sharding_of(param)
    place: Alone = ALONE
    if sharding is not None and not stacked:
        place = Cut(
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
        index=index,
        channels_last=channels_last,
        sharding=sharding,
        place=place,
    )
