"""Small matrices of every orientation in float64, and seeded gradients, for steps that are checked by formulas."""

import torch
from torch import nn

SHAPES = [(12, 7), (7, 12), (9, 9), (12, 7), (7, 12), (9, 9), (40, 3), (1, 5)]


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def parameters():
    generator = torch.Generator().manual_seed(100)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]
