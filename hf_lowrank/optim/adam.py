"""Adam's arithmetic on lists of tensors, with torch's fused kernels if the device has them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_lowrank.compat import foreach_copy_, foreach_mul_, fused_adamw_, fused_kernel_devices

Number = float | Tensor
Four = tuple[Tensor, ...]  # weight, gradient, moments


def decay_factors(lr: Number, weight_decay: float, variant: str) -> tuple[Number, Number]:
    """`(keep, gain)` such that `weight ← keep · weight − lr · gain · update` is `variant`'s decoupled weight decay.

    `official` decays the weight after the update, `torch` before it.
    """
    keep = 1 - lr * weight_decay if weight_decay else 1.0
    return keep, (keep if variant == "official" else 1.0)


# Kinds of devices whose values the host reads without waiting for work that it has launched there.
HOST_READS = frozenset({"cpu"})


def host_reads(device: torch.device) -> bool:
    """Whether the host may look at a value on `device` in the middle of a step."""
    return device.type in HOST_READS


def host_copy(values: Tensor) -> Callable[[], list[float]]:
    """Sends a vector to the host without a wait; what is returned gives its numbers, and waits only for them."""
    if values.device.type == "cpu":
        return values.tolist
    sent = values.to("cpu", non_blocking=True)  # into pinned memory
    arrived = torch.Event(values.device)
    arrived.record(torch.accelerator.current_stream(values.device))

    def read() -> list[float]:
        arrived.synchronize()
        found: list[float] = sent.tolist()
        return found

    return read


def rate(group: Mapping[str, Any]) -> Number:
    """A group's learning rate: a number, or a tensor without dimensions on a device that the host does not read."""
    lr = group["lr"]
    if not isinstance(lr, Tensor) or host_reads(lr.device):
        return float(lr)
    return lr if not lr.ndim else lr.reshape(())


def rotated_moments(
    mean: Tensor, square: Tensor, right: Tensor, left: Tensor | None, *, age: int, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Adam's moments, (…, rows, rank) each, carried into a new basis by LDAdam's rule (arXiv 2410.16103).

    The entries are taken as independent, so that their variances, not their squares, turn with the squared matrix.

    Args:
        right: `Qᵀ Q_new`, (…, rank, rank).
        left: `P_newᵀ P`, if rows are projected too.
        age: number of Adam steps behind the moments, at least 1.
    """

    def turn(matrix: Tensor, power: int) -> Tensor:
        matrix = matrix @ right.pow(power)
        return matrix if left is None else left.pow(power) @ matrix

    seen, seen_squares = (1 - beta**age for beta in betas)
    variance = turn(square / seen_squares - (mean / seen).square(), 2)
    turned = turn(mean, 1)
    return turned, (variance + (turned / seen).square()).abs() * seen_squares


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    age: int,
    lr: Number,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    variant: str,
    finite: Sequence[Tensor] | None = None,
) -> None:
    """The `age`-th AdamW step (from 1) of parameters that share device and dtype, in place.

    Args:
        finite: a flag per parameter, on its device; one without it stays as it is, with its moments.
    """
    keep, gain = decay_factors(lr, weight_decay, variant)
    # torch adds ε after the bias correction, the official packages before it.
    eps = eps / math.sqrt(1 - betas[1] ** age) if variant == "official" else eps
    options: dict[str, Any] = {
        "lr": lr * gain,
        "beta1": betas[0],
        "beta2": betas[1],
        "weight_decay": 0.0,
        "eps": eps,
        "amsgrad": False,
        "maximize": False,
    }
    fours: list[Four] = list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True))
    if isinstance(keep, Tensor) and finite is None:  # torch takes no tensor here
        foreach_mul_(params, keep)
    elif isinstance(keep, Tensor):
        for param, flag in zip(params, finite or (), strict=True):
            param.mul_(torch.where(flag, keep, 1))
    elif keep != 1:
        options["weight_decay"] = (1 - keep) / (lr * gain)
    if finite is None:
        _step(fours, age, options)
    else:
        _step_flagged(fours, finite, age, options)


def _step(fours: list[Four], age: int, options: dict[str, Any]) -> None:
    alike, others, plain = _by_layout(fours)
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


def _step_flagged(fours: list[Four], finite: Sequence[Tensor], age: int, options: dict[str, Any]) -> None:
    """Steps those whose flags are set: small ones of a shape as one stack, others by the kernel's own flag."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, (weight, *_) in enumerate(fours):
        key = weight.shape if weight.numel() <= MOST_STACKED else number
        alike.setdefault((key,), []).append(number)
    for numbers in alike.values():
        if len(numbers) == 1:
            four, flag = fours[numbers[0]], finite[numbers[0]]
            if four[0].device.type in fused_kernel_devices() and _by_layout([four])[0]:
                _fused([four], age, options, skip=flag.logical_not().float())
                continue
        flags = torch.stack([finite[number] for number in numbers])
        kinds = [torch.stack(kind) for kind in zip(*(fours[number] for number in numbers), strict=True)]
        flags = flags.view(-1, *[1] * (kinds[0].ndim - 1))
        old = [kinds[0].clone(), kinds[2].clone(), kinds[3].clone()]
        kinds[1] = torch.where(flags, kinds[1], 0)
        _step([tuple(kinds)], age, options)
        for before, after, place in zip(old, (kinds[0], kinds[2], kinds[3]), (0, 2, 3), strict=True):
            kept = torch.where(flags, after, before)
            foreach_copy_([fours[number][place] for number in numbers], kept.unbind())


# Elements of the largest parameters that are copied into a stack.
MOST_STACKED = 2**16


def _fused(fours: list[Four], age: int, options: dict[str, Any], skip: Tensor | None = None) -> None:
    weights, directions, firsts, seconds = (list(kind) for kind in zip(*fours, strict=True))
    # The kernel that torch.optim.AdamW ends in, without its sorting. It does not increment `step`.
    step = torch.full((), float(age), dtype=torch.float32, device=weights[0].device)
    fused_adamw_(weights, directions, firsts, seconds, [], [step] * len(weights), found_inf=skip, **options)


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
