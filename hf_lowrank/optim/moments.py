"""How moments are held between steps: in the parameter's type, in float32, or in eight bits.

Eight-bit states are torchao's block-wise dynamic ones (arXiv 2110.02861), kept as two plain tensors, so that a
checkpoint of them needs no class to load.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.errors import UserError
from hf_lowrank.optim.sharding import Sharding, local_part

STATE_DTYPES = ("parameter", "float32", "8bit")
# torchao's own choice: values that share a scale, and the size below which eight bits are not worth it.
BLOCK = 256
SMALLEST = 4096


def check_8bit_available() -> None:
    """Raises UserError where torchao is missing."""
    try:
        import torchao.optim  # noqa: F401
    except ImportError:
        raise UserError(
            "state_dtype='8bit' needs torchao, which is not installed; "
            "run `pip install 'hf-lowrank[8bit]'` or use 'float32'"
        ) from None


@lru_cache(maxsize=8)
def _levels(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values of a code, and the bounds between them."""
    from torchao.optim.quant_utils import create_dynamic_map

    values = torch.tensor(create_dynamic_map(signed=signed), dtype=torch.float32)
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, of `values`' shape) and one scale (float32) for each block of 256."""
    blocks = values.float().reshape(-1, BLOCK)
    scales = blocks.abs().amax(-1).clamp(min=1e-12)
    bounds = _levels(signed, values.device)[1]
    codes = torch.bucketize(blocks / scales[:, None], bounds, out_int32=True, right=True)
    return codes.to(torch.uint8).view(values.shape), scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """What `quantize` kept, float32."""
    levels = _levels(signed, codes.device)[0]
    return levels[codes.view(-1, BLOCK).int()].mul_(scales[:, None]).view(codes.shape)


def moment_dtype(state_dtype: str, param: Tensor) -> torch.dtype:
    """The type in which a parameter's moments are computed with."""
    return param.dtype if state_dtype == "parameter" or param.dtype == torch.float64 else torch.float32


def zero_moment(state_dtype: str, param: Tensor) -> Tensor:
    """A moment of a whole parameter, which lies in memory, and on processes, as it does."""
    dtype = moment_dtype(state_dtype, param)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def init_moments(state: dict[str, Any], zeros: Tensor, state_dtype: str) -> None:
    """Puts two moments into `state` that begin as `zeros`."""
    in_codes = state_dtype == "8bit" and zeros.numel() >= SMALLEST and zeros.numel() % BLOCK == 0
    for key in ("exp_avg", "exp_avg_sq"):
        if in_codes:
            state[key], state[f"{key}_scale"] = quantize(zeros, signed=key == "exp_avg")
        else:
            state[key] = zeros.clone()


def read_moments(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Both moments to compute with: what this process holds of them, itself, or what eight bits stand for."""
    if "exp_avg_scale" not in state:
        return local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])
    return (
        dequantize(state["exp_avg"], state["exp_avg_scale"], signed=True),
        dequantize(state["exp_avg_sq"], state["exp_avg_sq_scale"], signed=False),
    )


def write_moments(state: dict[str, Any], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Keeps what was computed."""
    if "exp_avg_scale" in state:
        state["exp_avg"], state["exp_avg_scale"] = quantize(exp_avg, signed=True)
        state["exp_avg_sq"], state["exp_avg_sq_scale"] = quantize(exp_avg_sq, signed=False)
    elif exp_avg is not local_part(state["exp_avg"]):
        local_part(state["exp_avg"]).copy_(exp_avg)
        local_part(state["exp_avg_sq"]).copy_(exp_avg_sq)


def round_stochastically_(
    target: Tensor, values: Tensor, generator: torch.Generator, rows: tuple[Sharding, int] | None = None
) -> None:
    """Writes float32 `values` into bfloat16 `target`, up or down at random such that the mean is exact.

    Where `values` are a process's part of several rows, `rows` says how those are divided, and how many there are: the
    draws are those of the whole.

    A bfloat16 is the upper half of a float32: adding 16 random bits below it and cutting them off rounds up with
    just the probability of the part that is cut.
    """
    bits = values.contiguous().view(torch.int32)
    shape = bits.shape if rows is None else (rows[1], *bits.shape[1:])
    noise = torch.randint(0, 1 << 16, shape, generator=generator, device=bits.device, dtype=torch.int32)
    if rows is not None:
        noise = rows[0].part(noise)
    target.copy_(noise.add_(bits).bitwise_and_(-65536).view(torch.float32))
