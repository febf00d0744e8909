"""Random draws that depend on their purpose, never on the order in which they are made."""

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


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
