"""Tensors as codes of a few bits, in groups of 256 values that share a scale and a zero point (arXiv 2407.08296).

A value is `scale · (code − zero)`. Groups follow the row-major order of each tensor, whose last group may be shorter.
The zero point is not clipped to the range of the codes, so that groups of one sign keep their values.

A weight that its layer keeps as codes is a parameter without values: it has the weight's shape, type and gradient, and
says which layer has the codes (`coded_layer`). Optimizers read and write them there.
"""

import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

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


def encode(values: Tensor, bits: int, noise: Tensor | None = None) -> Codes:
    """The codes of k tensors, (k, …): scale and zero point from each group's extremes.

    Args:
        noise: of the values' shape, uniform from 0 to below 1: rounds each value up or down at random such that the
            mean is exact. The zero point is then no integer, so that the extremes are exact too, and it and the scale
            are float32. Without: rounds to the nearest.
    """
    groups = _grouped(values)
    least, most = groups.aminmax(dim=-1, keepdim=True)
    largest = 2**bits - 1
    scale = (most - least).clamp_(min=LEAST_RANGE).div_(largest)
    if noise is None:
        zero = (-least / scale).round_()
        codes = (groups / scale).round_().add_(zero)
    else:
        scale = scale.float()
        zero = (-least / scale.to(least.dtype)).float()
        codes = (groups / scale.to(groups.dtype)).add_(zero).add_(_grouped(noise)).floor_()
    codes = codes.clamp_(0, largest).to(torch.uint8).flatten(1)
    size = math.prod(values.shape[1:])
    if bits == 4:
        pairs = codes.view(len(codes), -1, 2)
        codes = pairs.select(-1, 1) * 16 + pairs.select(-1, 0)
    held = codes.narrow(1, 0, byte_count(size, bits)).clone(memory_format=torch.contiguous_format)
    return Codes(held, scale.squeeze(-1), zero.squeeze(-1))


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


def _grouped(values: Tensor) -> Tensor:
    """(k, …) -> (k, groups, 256); the last value is repeated to fill the last group, which changes no extremes."""
    flat = values.flatten(1)
    size = flat.shape[1]
    missing = -size % GROUP
    if missing:
        flat = torch.cat([flat, flat.narrow(1, size - 1, 1).expand(-1, missing)], 1)
    return flat.view(len(flat), -1, GROUP)


class CodedLayer(Protocol):
    """A layer that keeps its weight as codes."""

    def read_weight(self) -> Tensor:
        """The weight's values, in float32, or float64 for such a layer."""

    def write_weight(self, values: Tensor, noise: Tensor | None = None, changed: Tensor | None = None) -> None:
        """Stores values, see `encode`; with `changed`, a flag, only where it is set."""


def without_values(like: Tensor, shape: Sequence[int], layer: CodedLayer) -> nn.Parameter:
    """The parameter of `shape`, and of the type and device of `like`, that stands for the weight of `layer`."""
    parameter = nn.Parameter(like.new_zeros(1).expand(*shape))
    parameter.coded_by = weakref.ref(layer)  # type: ignore[attr-defined]
    return parameter


def coded_layer(parameter: Tensor) -> CodedLayer | None:
    """The layer that keeps the values of a parameter as codes; None for any other parameter."""
    reference = getattr(parameter, "coded_by", None)
    return None if reference is None else reference()
