"""Weights in float16, whose range ends at 65 504: below the scales of channels with small gradients."""

import pytest
import torch

from hf_lowrank.optim import ApolloAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW

OPTIMIZERS = {
    "galore": (GaLoreAdamW, {}),
    "fira": (FiraAdamW, {}),
    "apollo": (ApolloAdamW, {}),
    "apollo mini": (ApolloAdamW, {"scale_type": "tensor", "scale": 128.0}),
    "frugal": (FrugalAdamW, {}),
}


def trained(optimizer, options, dtype, size):
    """Three matrices after eight steps with gradients of about `size`, the same in every dtype."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 20), (12, 20), (20, 12)]
    weights = [(0.1 * torch.randn(shape, generator=generator)).half() for shape in shapes]
    params = [torch.nn.Parameter(weight.clone().to(dtype)) for weight in weights]
    group = {"params": params, "rank": 4, "update_proj_gap": 3, "state_dtype": "float32", **options}
    optimizer = optimizer([group], lr=0.02)
    for _ in range(8):
        for param in params:
            param.grad = (size * torch.randn(param.shape, generator=generator)).half().to(dtype)
        optimizer.step()
        assert not optimizer.skipped
    return params, weights


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float16_weights_move_as_wide_ones_do(name, size):
    narrow, before = trained(*OPTIMIZERS[name], torch.float16, size)
    wide, _ = trained(*OPTIMIZERS[name], torch.float64, size)
    for one, other, start in zip(narrow, wide, before, strict=True):
        assert torch.isfinite(one).all()
        moved = (other - start.double()).norm()
        # Each of eight steps rounds the weight to eleven bits.
        assert (one.double() - other).norm() <= 0.1 * moved
