"""Tensors as codes of a few bits, in groups of 256 values that share a scale and a zero point (arXiv 2407.08296).

A value is `scale · (code − zero)`. Groups follow the row-major order of each tensor, whose last group may be shorter.
The zero point is not clipped to the range of the codes, so that groups of one sign keep their values.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 256
# The range of values below which a group is taken for constant.
LEAST_RANGE = 1e-5


class Codes(NamedTuple):
    """k tensors of n values each.

    Attributes:
        codes: uint8, (k, bytes): one value a byte, or two of four bits, the first in the lower half.
        scale, zero: one per group, (k, groups), in the type of the values; a zero point is an integer.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def group_count(size: int) -> int:
    """Number of groups of a tensor of `size` values."""
    return -(-size // GROUP)


def byte_count(size: int, bits: int) -> int:
    """Bytes of the codes of `size` values, of 4 or 8 bits each."""
    return -(-size * bits // 8)


def encode(values: Tensor, bits: int) -> Codes:
    """The codes of k tensors, (k, …), each rounded to the nearest: scale and zero point from a group's extremes."""
    flat = values.flatten(1)
    size = flat.shape[1]
    missing = -size % GROUP
    if missing:  # repeating the last value changes no extremes
        flat = torch.cat([flat, flat.narrow(1, size - 1, 1).expand(-1, missing)], 1)
    groups = flat.view(len(flat), -1, GROUP)
    least, most = groups.aminmax(dim=-1, keepdim=True)
    largest = 2**bits - 1
    scale = (most - least).clamp_(min=LEAST_RANGE).div_(largest)
    zero = (-least / scale).round_()
    codes = (groups / scale).round_().add_(zero).clamp_(0, largest).to(torch.uint8).flatten(1)
    if bits == 4:
        pairs = codes.view(len(codes), -1, 2)
        codes = pairs.select(-1, 1) * 16 + pairs.select(-1, 0)
    return Codes(codes.narrow(1, 0, byte_count(size, bits)).contiguous(), scale.squeeze(-1), zero.squeeze(-1))


def decode(stored: Codes, shape: Sequence[int], bits: int) -> Tensor:
    """The values of k tensors of `shape`, (k, *shape), in the type of the scales."""
    codes, scale, zero = stored
    size = math.prod(shape)
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    missing = group_count(size) * GROUP - codes.shape[1]
    if missing > 0:
        codes = torch.cat([codes, codes.new_zeros(len(codes), missing)], 1)
    groups = codes.narrow(1, 0, group_count(size) * GROUP).view(len(codes), -1, GROUP)
    values = groups.to(scale.dtype).sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
    return values.flatten(1).narrow(1, 0, size).reshape(len(codes), *shape)
