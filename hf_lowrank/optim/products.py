"""Products of matrices, by the fastest kernel of the device.

torch multiplies float32 matrices on a CPU by MKL, which on processors of other makers than Intel runs at half the
speed of oneDNN, the library that torch's compiled code and its bfloat16 products use.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowrank.compat import onednn_linear

# Multiplications from which a call of oneDNN costs less than what it saves.
LEAST = 2**23
# Elements of a temporary between a product and the matrix that it is added to.
MOST_ADDED = 2**20


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`left @ right` of matrices (rows, inner) and (inner, columns); in any memory order, if not in `out`."""
    linear = _kernel(left, right)
    if linear is None:
        return left @ right if out is None else torch.mm(left, right, out=out)
    # Of a transposed first factor oneDNN would make a copy.
    found = linear(left, right.mT) if left.stride(-1) == 1 else linear(right.mT, left).mT
    return found if out is None else out.copy_(found)


def products(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of stacked matrices, (k, rows, inner) and (k, inner, columns), in any memory order."""
    if len(left) == 1 and left.device.type == "cpu":  # whose batched kernels copy what is transposed
        return product(left[0], right[0]).unsqueeze(0)
    if _kernel(left, right) is None:
        return left @ right
    return torch.stack([product(one, other) for one, other in zip(left.unbind(), right.unbind(), strict=True)])


def add_product_(matrix: Tensor, left: Tensor, right: Tensor, *, keep: float = 1.0, factor: float = 1.0) -> None:
    """`matrix ← keep · matrix + factor · left @ right`, with a temporary of a few megabytes at most."""
    if _kernel(left, right) is None or matrix.dtype != left.dtype:
        matrix.addmm_(left, right, beta=keep, alpha=factor)
        return
    if matrix.stride(-1) != 1:
        matrix, left, right = matrix.mT, right.mT, left.mT
    rows = max(MOST_ADDED // matrix.shape[1], 1)
    for part, factors in zip(matrix.split(rows), left.split(rows), strict=True):
        if keep != 1:
            part.mul_(keep)
        part.add_(product(factors, right), alpha=factor)


def add_products(matrices: Tensor, left: Tensor, right: Tensor, *, keep: float, factor: float = 1.0) -> Tensor:
    """`keep · matrices + factor · left @ right` of stacked matrices, (k, …) each."""
    if _kernel(left, right) is None:
        return torch.baddbmm(matrices, left, right, beta=keep, alpha=factor)
    return products(left, right).mul_(factor).add_(matrices, alpha=keep)


def _kernel(left: Tensor, right: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's `x @ w.mT` where it is worth a call; None where torch's own product is as fast."""
    if left.device.type != "cpu" or left.dtype != torch.float32 or right.dtype != torch.float32:
        return None
    return onednn_linear() if left.shape[-2] * right.shape[-2] * right.shape[-1] >= LEAST else None
