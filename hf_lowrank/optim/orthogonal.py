"""Orthogonal factors of stacked matrices, (k, rows, columns): without a loop over them, or a wait of the host."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowrank.optim.products import add_products, products

# Each polynomial X ← aX + b(XXᵀ)X + c(XXᵀ)²X. Newton–Schulz repeats one (as torch.optim.Muon does); Polar Express
# (arXiv 2505.16932) has one for each step, the last of which may be repeated.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# The polynomials of each rule, and what the Frobenius norm is multiplied by in the division before them.
RULES = {"newton_schulz": (NEWTON_SCHULZ, 1.0), "polar_express": (POLAR_EXPRESS, 1.02)}
SMALLEST_NORM = 1e-7
# Above the rounding errors of a Gram matrix in float64, relative to its diagonal.
SHIFT = 1e-12


def orthogonalise(matrices: Tensor, steps: int = 5, rule: str = "newton_schulz") -> Tensor:
    """The matrices with their singular values brought close to one, in their type.

    Args:
        matrices: (…, rows, columns); zeros stay zeros.
        steps: polynomials of degree five that are applied.
        rule: `newton_schulz` (singular values end between 0.7 and 1.2) or `polar_express` (closer to one).
    """
    polynomials, margin = RULES[rule]
    tall = matrices.shape[-2] > matrices.shape[-1]
    work = matrices.mT if tall else matrices
    batch = work.reshape(-1, *work.shape[-2:])
    wide = torch.promote_types(batch.dtype, torch.float32)
    norms = torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True, dtype=wide).to(batch.dtype)
    batch = batch / (norms.clamp(min=SMALLEST_NORM) * margin)
    for step in range(steps):
        a, b, c = polynomials[min(step, len(polynomials) - 1)]
        gram = products(batch, batch.mT)
        batch = add_products(batch, add_products(gram, gram, gram, keep=b, factor=c), batch, keep=a)
    work = batch.reshape(work.shape)
    return work.mT if tall else work


def orthonormal_columns(
    matrices: Tensor, total: Callable[[Tensor], Tensor] = lambda gram: gram, toward: Tensor | None = None
) -> Tensor:
    """The Q-factors of (k, rows, r) matrices, with the signs that make the diagonals of their R-factors positive.

    Cholesky QR, twice, in float64: `X R⁻¹` for any triangular R has the Q-factor of X, so the first pass may shift the
    Gram matrix to be safely positive definite. Columns that depend on earlier ones become zeros or noise of unit norm
    at most, never NaN.

    Args:
        total: sums Gram matrices, (k, r, r), over the processes that hold the other rows.
        toward: orthonormal columns that take the places of those that depend on earlier ones. If X is P times a
            positive semidefinite matrix from the left, those of P are always independent of the others.
    """
    work = _divided(matrices.double(), total)
    if toward is not None:
        # The shift leaves a column that is independent its norm, and takes that of one that is not.
        norms = total(work.square().sum(-2, keepdim=True))
        work = _divided(torch.where(norms > 0.5, work, toward.double()), total)
        return _divided(work, total, shift=0.0).to(matrices.dtype)
    return _divided(work, total).to(matrices.dtype)


def _divided(work: Tensor, total: Callable[[Tensor], Tensor], shift: float = SHIFT) -> Tensor:
    """`X R⁻¹` with the R-factor of X, whose Gram matrix is shifted by its diagonal: one pass of Cholesky QR."""
    gram = total(work.mT @ work)
    added = gram.diagonal(dim1=-2, dim2=-1) * shift + torch.finfo(gram.dtype).tiny
    factor = torch.linalg.cholesky_ex(gram + torch.diag_embed(added)).L
    return torch.linalg.solve_triangular(factor.mT, work, upper=True, left=False)
