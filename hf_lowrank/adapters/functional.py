"""The layers' computations as functions of tensors.

Shapes: x (..., in), A (r, in), B (out, r), W (out, in); the support holds flat row-major indices into W.

Operations whose memory matters are custom operators of torch: autograd saves exactly the tensors named here, selective
checkpointing can distinguish them from other products, and `torch.compile`, for which they are opaque, cannot replace
their recomputation by a saved dense weight.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import linear

from hf_lowrank.errors import UserError


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a layer's products: autocast's if autocast is on, else its weight's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def sltrain_weight(A: Tensor, B: Tensor, values: Tensor, support: Tensor, scaling: float) -> Tensor:
    """W = scaling · B A + S, (out, in), in the factors' dtype."""
    weight = (B * scaling) @ A
    weight.view(-1).index_add_(0, support, values)
    return weight


@torch.library.custom_op("hf_lowrank::sltrain_linear", mutates_args=())
def _sltrain_linear(x: Tensor, A: Tensor, B: Tensor, values: Tensor, support: Tensor, scaling: float) -> Tensor:
    return linear(x, sltrain_weight(A, B, values, support, scaling))


@torch.library.custom_op("hf_lowrank::sltrain_grad_input", mutates_args=())
def _sltrain_grad_input(grad: Tensor, A: Tensor, B: Tensor, values: Tensor, support: Tensor, scaling: float) -> Tensor:
    return grad @ sltrain_weight(A, B, values, support, scaling)


@torch.library.custom_op("hf_lowrank::sltrain_grad_weights", mutates_args=())
def _sltrain_grad_weights(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, support: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    grad_A = (B * scaling).T @ grad_weight
    grad_B = (grad_weight @ A.T).mul_(scaling)
    return grad_A, grad_B, grad_weight.view(-1).index_select(0, support)


@_sltrain_linear.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, values: Tensor, support: Tensor, scaling: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


@_sltrain_grad_input.register_fake
def _(grad: Tensor, A: Tensor, B: Tensor, values: Tensor, support: Tensor, scaling: float) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], A.shape[1]))


@_sltrain_grad_weights.register_fake
def _(grad: Tensor, x: Tensor, A: Tensor, B: Tensor, support: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(A), torch.empty_like(B), grad.new_empty(support.shape)


def _save_for_sltrain(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _sltrain_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, A, B, values, support = ctx.saved_tensors
    grad_x = grad_A = grad_B = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_x = _sltrain_grad_input(grad, A, B, values, support, ctx.scaling)
    if any(ctx.needs_input_grad[1:4]):
        grad_A, grad_B, grad_values = _sltrain_grad_weights(grad, x, A, B, support, ctx.scaling)
    return grad_x, grad_A, grad_B, grad_values, None, None


def first_derivatives_only(title: str, reason: str) -> Callable[..., None]:
    """The backward pass of a layer's gradients: an error that says why there is none."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise UserError(
            f"{title}'s layer has first derivatives only, because {reason}; for second derivatives use the dense "
            "model of to_dense()"
        )

    return refuse


_refuse_second_derivative = first_derivatives_only("SLTrain", "it recomputes its weight in the backward pass")
_sltrain_linear.register_autograd(_sltrain_backward, setup_context=_save_for_sltrain)
_sltrain_grad_input.register_autograd(_refuse_second_derivative)
_sltrain_grad_weights.register_autograd(_refuse_second_derivative)


def sltrain_linear(
    x: Tensor, A: Tensor, B: Tensor, values: Tensor, support: Tensor, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """x Wᵀ + bias with W = scaling · B A + S (arXiv 2406.02214), saving only x, the factors and the sparse values.

    W exists during one product in the forward and one in the backward pass. The gradient of the values is the dense
    gradient gathered on the support; it exists for one layer at a time. Second derivatives are an error.
    """
    dtype = compute_dtype(x, A)
    y = _sltrain_linear(x.to(dtype), A.to(dtype), B.to(dtype), values.to(dtype), support, scaling)
    return y if bias is None else y + bias.to(dtype)


@torch.library.custom_op("hf_lowrank::bottleneck", mutates_args=())
def _bottleneck(x: Tensor, A: Tensor) -> Tensor:
    return linear(x, A)


@_bottleneck.register_fake
def _(x: Tensor, A: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], A.shape[0]))


def _save_for_bottleneck(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _bottleneck_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, A = ctx.saved_tensors
    grad_x = grad @ A if ctx.needs_input_grad[0] else None
    grad_A = None
    if ctx.needs_input_grad[1]:
        grad_A = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return grad_x, grad_A


_bottleneck.register_autograd(_bottleneck_backward, setup_context=_save_for_bottleneck)

# CoLA-M saves only the r-wide outputs of this operator of each block.
SAVED_BY_COLA_M = [torch.ops.hf_lowrank.bottleneck.default]


def bottleneck(x: Tensor, A: Tensor) -> Tensor:
    """A x, (..., r), whose result selective checkpointing saves."""
    dtype = compute_dtype(x, A)
    return _bottleneck(x.to(dtype), A.to(dtype))


def truncated_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in), the two halves of the best rank-r approximation B A of `weight`, in float32."""
    u, sigma, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    root = sigma[:r].sqrt()
    return u[:, :r] * root, root[:, None] * vt[:r]


def structured_product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The product of two factors with x; a factor of three dimensions (b, rows, columns) is a block-diagonal matrix.

    After a block-diagonal A a block-diagonal B has a shuffle before and after it, see `adapters.structured`.
    """
    low = linear(x, A) if A.ndim == 2 else _in_blocks(x, A)
    return linear(low, B) if B.ndim == 2 else _shuffled(_in_blocks(_shuffled(low, B.shape[0]), B), B.shape[0])


def _in_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    parts = x.unflatten(-1, (blocks.shape[0], blocks.shape[2]))
    return torch.einsum("...bi,boi->...bo", parts, blocks).flatten(-2)


def _shuffled(x: Tensor, rows: int) -> Tensor:
    return x.unflatten(-1, (rows, -1)).transpose(-1, -2).flatten(-2)


def balanced_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A' = √S Vᵀ (r, in) and B' = U √S (out, r) with U S Vᵀ = B A, in float32 at least.

    The product is never formed: QR of both factors, and the SVD of an (r, r) matrix. The sign of each pair of singular
    vectors makes the largest entry of the left one positive, so that rounding does not decide it.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    left, left_r = torch.linalg.qr(B.to(wide))
    right, right_r = torch.linalg.qr(A.to(wide).mT)
    u, sigma, vt = torch.linalg.svd(left_r @ right_r.mT)
    U = left @ u
    largest = U.gather(0, U.abs().argmax(0, keepdim=True)).squeeze(0)
    root = sigma.sqrt()
    signed = torch.where(largest < 0, -root, root)
    return signed[:, None] * (vt @ right.mT), U * signed


def keyed_generator(seed: int, *keys: str | int) -> torch.Generator:
    """A CPU generator whose state depends on `seed` and `keys` alone.

    A layer draws the same numbers on every rank and device, after a resume, and in any order of the layers.
    """
    digest = hashlib.sha256(repr((int(seed), *keys)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def placed_like(drawn: Tensor, target: Tensor) -> Tensor:
    """`drawn`, equal on every rank, on `target`'s device and sharded like `target`."""
    drawn = drawn.to(target.device)
    if isinstance(target, DTensor):
        return distribute_tensor(drawn, target.device_mesh, target.placements)
    return drawn


@torch.no_grad()
def fill(target: Tensor, drawn: Tensor) -> None:
    """Copies `drawn` into `target`, which may have another dtype or device or be sharded."""
    target.copy_(placed_like(drawn.to(target.dtype), target))


@torch.no_grad()
def fill_from_first(target: Tensor, computed: Tensor) -> None:
    """`fill`, with the first process's `computed` in all of them: a decomposition may differ between devices."""
    fill(target, computed)
    if dist.is_available() and dist.is_initialized() and not isinstance(target, DTensor):
        dist.broadcast(target, 0)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """float32 draws from U(-bound, bound)."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def kaiming_uniform(rows: int, fan_in: int, generator: torch.Generator) -> Tensor:
    """(rows, fan_in) Kaiming-uniform draws with a = sqrt(5), whose bound is 1/sqrt(fan_in)."""
    return uniform((rows, fan_in), 1 / math.sqrt(fan_in), generator)


def draw_support(rows: int, columns: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct entries of a (rows, columns) matrix, uniform without replacement.

    Returns flat row-major indices, ascending, int32. The smaller of the support and its complement is drawn, by
    collecting distinct uniform draws and dropping a uniformly chosen excess, so that the cost grows with the support,
    not with the matrix.
    """
    total = rows * columns
    draw_complement = count > total // 2
    wanted = total - count if draw_complement else count
    chosen = torch.empty(0, dtype=torch.int64)
    while chosen.numel() < wanted:
        more = torch.randint(total, (wanted - chosen.numel() + 16,), generator=generator)
        chosen = torch.unique(torch.cat([chosen, more]))
    if chosen.numel() > wanted:
        kept = torch.randperm(chosen.numel(), generator=generator)[:wanted]
        chosen = chosen[kept].sort().values
    if draw_complement:
        inside = torch.ones(total, dtype=torch.bool)
        inside[chosen] = False
        chosen = inside.nonzero().squeeze(1)
    return chosen.to(torch.int32)
