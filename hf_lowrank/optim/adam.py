"""Adam's arithmetic on lists of tensors, with torch's fused kernels if the device has them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_lowrank.compat import fused_adamw_, fused_kernel_devices


def decay_factors(lr: float, weight_decay: float, variant: str) -> tuple[float, float]:
    """`(keep, gain)` such that `weight ← keep · weight − lr · gain · update` is `variant`'s decoupled weight decay.

    `official` decays the weight after the update, `torch` before it.
    """
    keep = 1 - lr * weight_decay
    return keep, (keep if variant == "official" else 1.0)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    age: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    variant: str,
) -> None:
    """The `age`-th AdamW step (from 1) of parameters that share device and dtype, in place."""
    keep, gain = decay_factors(lr, weight_decay, variant)
    # torch adds ε after the bias correction, the official packages before it.
    eps = eps / math.sqrt(1 - betas[1] ** age) if variant == "official" else eps
    options: dict[str, Any] = {
        "lr": lr * gain,
        "beta1": betas[0],
        "beta2": betas[1],
        "weight_decay": (1 - keep) / (lr * gain) if lr * gain else 0.0,
        "eps": eps,
        "amsgrad": False,
        "maximize": False,
    }
    alike, others, plain = _by_layout(list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)))
    if alike:
        _fused(alike, age, options)
    for four in others:
        packed = tuple(tensor.contiguous() for tensor in four)
        _fused([packed], age, options)
        for tensor, copy in zip(four, packed, strict=True):
            if copy is not tensor and tensor is not four[1]:
                tensor.copy_(copy)
    if plain:
        weights, directions, firsts, seconds = (list(kind) for kind in zip(*plain, strict=True))
        steps = list(torch.full((len(weights),), float(age - 1), dtype=torch.float32).unbind())
        adamw(weights, directions, firsts, seconds, [], steps, fused=False, foreach=None, **options)


Four = tuple[Tensor, ...]  # weight, gradient, moments


def _fused(fours: list[Four], age: int, options: dict[str, Any]) -> None:
    weights, directions, firsts, seconds = (list(kind) for kind in zip(*fours, strict=True))
    # The kernel that torch.optim.AdamW ends in, without its sorting. It does not increment `step`.
    step = torch.full((), float(age), dtype=torch.float32, device=weights[0].device)
    fused_adamw_(weights, directions, firsts, seconds, [], [step] * len(weights), **options)


def _by_layout(fours: list[Four]) -> tuple[list[Four], list[Four], list[Four]]:
    """What the fused kernel can step directly, what it can step as contiguous copies, and what it cannot.

    The kernel ignores shapes and strides: it assumes that weight, gradient and moments have the same memory layout
    without gaps. Other kernels round 16-bit intermediates, so results would depend on the layout.
    """
    first = fours[0][0]
    if first.device.type not in fused_kernel_devices() or not first.is_floating_point():
        return [], [], fours
    alike: list[Four] = []
    others: list[Four] = []
    plain: list[Four] = []
    for four in fours:
        shape, stride = four[0].shape, four[0].stride()
        if any(tensor.shape != shape for tensor in four[1:]):
            plain.append(four)
        elif _is_dense(four[0]) and all(tensor.stride() == stride for tensor in four[1:]):
            alike.append(four)
        else:
            others.append(four)
    return alike, others, plain


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a contiguous piece of memory, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
