"""Where the parts of a matrix lie, and what the steps of a method need from the other processes.

Oriented so that G (rows × columns) is projected to R = G Q, a matrix of which each process i holds some rows as stored
is cut in one of two ways:

    along its rows      R_i = G_i Q, with the whole Q: the bases are gathered.
    along its columns   R = Σ_i G_i Q_i, with the rows Q_i of Q that belong to the columns of G_i: the products are
                        summed, each process keeping its rows R_i; what is lifted back is gathered.

In both, process i keeps the rows R_i of the moments and the rows Q_i of the basis, and nothing else. With both sides
projected, R = Pᵀ G Q is a sum over processes either way.

Legend: k matrices of one shape at a time; `rows_i` are a process's rows of the projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowrank.optim.sharding import Sharding


class Alone:
    """Matrices that a process holds whole: there is nothing to exchange."""

    def bases(self, parts: list[Tensor]) -> list[Tensor]:
        """The bases as this process multiplies by them, from its rows of them."""
        return parts

    def left_bases(self, parts: list[Tensor]) -> list[Tensor]:
        """The same of the bases that project the rows."""
        return parts

    def of_whole(self, bases: list[Tensor]) -> list[Tensor]:
        """The bases as this process multiplies by them, from whole ones."""
        return bases

    def basis_rows(self, parts: list[Tensor], columns: int) -> list[Tensor]:
        """This process's rows of the bases, as matrices also where they are indices of columns."""
        if parts and not parts[0].is_floating_point():
            return [torch.eye(columns, device=basis.device)[:, basis] for basis in parts]
        return parts

    def own_rows(self, basis: Tensor) -> Tensor:
        """This process's rows of a whole basis."""
        return basis

    def projected(self, products: Tensor) -> Tensor:
        """This process's rows of the projections, from its products: (k, rows, rank) -> (k, rows_i, rank)."""
        return products

    def for_lifting(self, parts: Tensor) -> Tensor:
        """The rows that this process needs to lift, or to scale its part of the gradients: (k, rows_i, …)."""
        return parts

    def kept(self, whole: Tensor) -> Tensor:
        """What this process keeps of what `for_lifting` gave: one matrix."""
        return whole

    def energy(self, products: Tensor) -> Tensor:
        """`‖G Q‖²` from the product of this process's part of one gradient."""
        return products.square().sum()

    def row_norms(self, norms: Tensor) -> Tensor:
        """Norms of the gradients' rows, (k, rows_i), from the norms of what this process holds of them."""
        return norms

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes' rows."""
        return values

    def norms(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Euclidean norms over the last dimension, which runs over all processes' rows."""
        return torch.linalg.vector_norm(values, dim=-1, dtype=dtype)


ALONE = Alone()


class Cut(Alone):
    """Matrices that are cut along their rows or their columns.

    Args:
        sharding: over which processes.
        rows, columns: of a whole oriented matrix.
        low_rows, rank: shape of its projection.
        dtype: of the gradients.
        along_rows: which of the two.
        both: whether the rows are projected, too.
    """

    def __init__(
        self,
        sharding: Sharding,
        *,
        rows: int,
        columns: int,
        low_rows: int,
        rank: int,
        dtype: torch.dtype,
        along_rows: bool,
        both: bool,
    ) -> None:
        self._sharding, self._dtype = sharding, dtype
        self._rows, self._columns, self._low_rows, self._rank = rows, columns, low_rows, rank
        self._along_rows = along_rows
        self._is_sum = both or not along_rows

    def bases(self, parts: list[Tensor]) -> list[Tensor]:
        if not parts[0].is_floating_point():
            return self.of_whole(self._gathered(parts, self._rank))
        return self._gathered(parts, self._columns) if self._along_rows else parts

    def left_bases(self, parts: list[Tensor]) -> list[Tensor]:
        return parts if self._along_rows else self._gathered(parts, self._rows)

    def of_whole(self, bases: list[Tensor]) -> list[Tensor]:
        if self._along_rows:
            return bases
        if not bases[0].is_floating_point():
            return self._unit_rows(bases)
        return [self._sharding.part(basis) for basis in bases]

    def basis_rows(self, parts: list[Tensor], columns: int) -> list[Tensor]:
        if parts[0].is_floating_point():
            return parts
        return self._unit_rows(self._gathered(parts, self._rank))

    def own_rows(self, basis: Tensor) -> Tensor:
        return self._sharding.part(basis)

    def projected(self, products: Tensor) -> Tensor:
        return self._sharding.scatter_sum(products) if self._is_sum else products

    def for_lifting(self, parts: Tensor) -> Tensor:
        return self._sharding.gather(parts, self._low_rows) if self._is_sum else parts

    def kept(self, whole: Tensor) -> Tensor:
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
        """This process's rows of the unit vectors that indices of columns stand for."""
        held = torch.arange(*self._sharding.bounds(self._columns), device=bases[0].device)
        return [(held[:, None] == chosen).to(self._dtype) for chosen in bases]
