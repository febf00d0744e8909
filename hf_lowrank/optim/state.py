"""The tensors that an optimizer keeps for its parameters: declared by a method; created, read and written here.

8-bit states are torchao's block-wise dynamic ones (arXiv 2110.02861), stored as two plain tensors, so that loading a
checkpoint needs no class.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from hf_lowrank.errors import UserError
from hf_lowrank.optim.layout import Layout
from hf_lowrank.optim.sharding import Sharding, local_part

# torchao's own choice: values that share a scale, and the size below which eight bits are not worth it.
BLOCK = 256
MIN_QUANTIZED_SIZE = 4096
# Blocks that are coded or decoded together, which bounds the temporaries to a few times 16 MiB.
BLOCKS_AT_ONCE = 2**14


@dataclass(frozen=True, kw_only=True)
class StateTensor:
    """A tensor that a method keeps for each matrix.

    Attributes:
        shape: of one matrix's tensor, `()` for a number; None for a tensor like the whole parameter, in its memory
            format. For a parameter that stacks several matrices the number of matrices comes first.
        dtype: `"moments"` for the type that the group's `state_dtype` gives, `"parameter"` for the parameter's,
            `"wide"` for float32, or float64 of such a parameter, or a type of its own.
        initial: the value of every element at the start; None if the method's refresh creates the tensor.
        quantized: how `state_dtype="8bit"` stores it: as `"signed"` or `"unsigned"` codes, or not as codes.
        sharded: whether a sharded parameter shards it along its first dimension too; a single number never is.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype | Literal["moments", "parameter", "wide"] = "moments"
    initial: float | None = 0.0
    quantized: Literal["signed", "unsigned"] | None = None
    sharded: bool = True

    def dtype_for(self, param: Tensor, state_dtype: str) -> torch.dtype:
        """The type in which the tensor is computed with."""
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        of_parameter = self.dtype != "wide" and "parameter" in {self.dtype, state_dtype}
        of_parameter |= param.dtype == torch.float64 or param.is_complex()
        return param.dtype if of_parameter else torch.float32

    def full_shape(self, param: Tensor, layout: Layout | None) -> tuple[int, ...]:
        """Shape of the tensor for all matrices of `param`."""
        if self.shape is None or layout is None:
            return tuple(param.shape)
        return (layout.count, *self.shape) if layout.stacked else self.shape

    def create(self, state: dict[str, Any], key: str, param: Tensor, layout: Layout | None, state_dtype: str) -> None:
        """Puts the tensor into `state` with its initial value, quantised if it is large enough."""
        dtype, shape = self.dtype_for(param, state_dtype), self.full_shape(param, layout)
        if self.shape is None or layout is None:
            tensor = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        elif layout.sharding is None or not shape or not self.sharded:
            tensor = torch.zeros(shape, dtype=dtype, device=param.device)
        else:
            tensor = layout.sharding.zeros(shape, param, dtype)
        if self.initial:
            local_part(tensor).fill_(self.initial)
        size = tensor.numel()
        is_coded = self.quantized and state_dtype == "8bit" and not dtype.is_complex
        if is_coded and size >= MIN_QUANTIZED_SIZE and size % BLOCK == 0:
            state[key], state[f"{key}_scale"] = quantize(tensor, signed=self.quantized == "signed")
        else:
            state[key] = tensor

    def is_coded(self, tensor: Tensor) -> bool:
        """Whether the tensor is stored as 8-bit codes."""
        return self.quantized is not None and tensor.dtype == torch.uint8

    def read(self, state: Mapping[str, Any], key: str) -> Tensor:
        """The tensor to compute with: this process's part of it, itself, or the values of its 8-bit codes."""
        held: Tensor = state[key]
        if self.is_coded(held):
            return dequantize(held, state[f"{key}_scale"], signed=self.quantized == "signed")
        return local_part(held)

    def write(self, state: dict[str, Any], key: str, value: Tensor) -> None:
        """Stores what was computed from `read`'s tensor; not needed if that was changed in place and is not coded."""
        if self.is_coded(state[key]):
            state[key], state[f"{key}_scale"] = quantize(value, signed=self.quantized == "signed")
            return
        held = local_part(state[key])
        if value is not held:
            held.copy_(value)


def adam_moments(*shape: int, whole: bool = False) -> dict[str, StateTensor]:
    """Adam's two moments of matrices of `shape`, or of `whole` parameters."""
    return {
        "exp_avg": StateTensor(shape=None if whole else shape, quantized="signed"),
        "exp_avg_sq": StateTensor(shape=None if whole else shape, quantized="unsigned"),
    }


# Eight bits


def check_8bit_available() -> None:
    """Raises UserError if torchao is missing."""
    try:
        import torchao.optim  # noqa: F401
    except ImportError:
        raise UserError(
            "state_dtype='8bit' needs torchao, which is not installed; "
            "run `pip install 'hf-lowrank[8bit]'` or use 'float32'"
        ) from None


@lru_cache(maxsize=8)
def quantization_levels(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The 256 values that codes stand for; where each of their ranges ends, the last one at infinity; and the code of
    the smallest float32 with given upper 16 bits, by these."""
    from torchao.optim.quant_utils import create_dynamic_map

    values = torch.tensor(create_dynamic_map(signed=signed), dtype=torch.float32)
    ends = torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor([torch.inf])])
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    smallest = torch.minimum(upper.view(torch.float32), (upper | 0xFFFF).view(torch.float32))
    return (
        values.to(device),
        ends.to(device),
        torch.bucketize(smallest, ends[:-1], out_int32=True, right=True).to(device),
    )


def _codes(values: Tensor, signed: bool) -> Tensor:
    """The code (int32) of each float32 from -1 to 1."""
    _, ends, first = quantization_levels(signed, values.device)
    if values.device.type != "cpu":
        return torch.bucketize(values, ends[:-1], out_int32=True, right=True)
    # A CPU searches slowly. Values with the same upper 16 bits have one of two codes: no two ends lie that close.
    codes = first.index_select(0, (values.reshape(-1).view(torch.int32) >> 16).add_(2**15))
    return codes.add_(values.reshape(-1) >= ends.index_select(0, codes)).view_as(values)


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, of `values`' shape) and one scale (float32) per block of 256."""
    blocks = values.reshape(-1, BLOCK)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    scales = torch.empty(len(blocks), dtype=torch.float32, device=values.device)
    parts = (blocks, codes.view(-1, BLOCK), scales)
    for some, own_codes, own_scales in zip(*(part.split(BLOCKS_AT_ONCE) for part in parts), strict=True):
        wide = some.float()
        own_scales.copy_(wide.abs().amax(-1).clamp(min=1e-12))
        own_codes.copy_(_codes(wide / own_scales[:, None], signed))
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The values that `quantize` kept, in float32."""
    levels = quantization_levels(signed, codes.device)[0]
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    parts = (values.view(-1, BLOCK), codes.view(-1, BLOCK), scales)
    for some, own_codes, own_scales in zip(*(part.split(BLOCKS_AT_ONCE) for part in parts), strict=True):
        some.copy_(levels.index_select(0, own_codes.reshape(-1).int()).view_as(some)).mul_(own_scales[:, None])
    return values


# Weights in sixteen bits


def round_stochastically_(
    target: Tensor, values: Tensor, generator: torch.Generator, rows: tuple[Sharding, int] | None = None
) -> None:
    """Writes float32 `values` into bfloat16 `target`, rounded up or down at random such that the mean is exact.

    A bfloat16 is the upper half of a float32: adding 16 random bits below it and truncating rounds up with exactly
    the probability of the truncated part.

    Args:
        rows: for `values` that are a process's share of a sharded tensor: its sharding and its number of rows. The
            random bits are then those of the unsharded tensor.
    """
    bits = values.contiguous().view(torch.int32)
    shape = bits.shape if rows is None else (rows[1], *bits.shape[1:])
    noise = torch.randint(0, 1 << 16, shape, generator=generator, device=bits.device, dtype=torch.int32)
    if rows is not None:
        noise = rows[0].part(noise)
    target.copy_(noise.add_(bits).bitwise_and_(-65536).view(torch.float32))
