"""The same gradients through the official packages and through ours give the same weights."""

import warnings
from itertools import pairwise

import fira
import galore_torch
import pytest
import torch

from hf_lowrank.optim import FiraAdamW, GaLoreAdamW

SHAPES = {"tall": (24, 12), "wide": (12, 24), "square": (16, 16)}
STEPS, GAP, RANK = 50, 9, 4


def gradients(shape, seed=0, steps=STEPS):
    """Gradients with a drifting low-rank part and noise, as training has."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], 6, generator=generator)
    right = torch.randn(6, shape[1], generator=generator)
    result = []
    for _ in range(steps):
        left = 0.9 * left + 0.4 * torch.randn(left.shape, generator=generator)
        result.append(0.1 * (left @ right + 0.5 * torch.randn(shape, generator=generator)))
    return result


def run(optimizer_class, group, grads, weight_decay, **options):
    start = torch.Generator().manual_seed(1)
    target = torch.nn.Parameter(torch.randn(grads[0].shape, generator=start))
    plain = torch.nn.Parameter(torch.randn(7, generator=start))
    groups = [{"params": [plain]}, {"params": [target], **group}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        optimizer = optimizer_class(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=weight_decay, **options)
    path = []
    for step, grad in enumerate(grads):
        for options_of_group in optimizer.param_groups:  # a schedule
            options_of_group["lr"] = 0.01 / (1 + 0.05 * step)
        target.grad, plain.grad = grad.clone(), grad.flatten()[:7].clone()
        optimizer.step()
        path.append(torch.cat([target.detach().flatten(), plain.detach()]))
    return path


def assert_same_paths(ours, theirs):
    for step, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (own - other).norm() / other.norm() <= 1e-5, f"step {step}"
        assert (own - other).abs().max() / other.abs().max() <= 1e-5, f"step {step}"
    assert all(before.ne(after).any() for before, after in pairwise(ours))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_galore(shape, proj_type, weight_decay):
    grads = gradients(SHAPES[shape])
    group = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": proj_type}
    theirs = run(galore_torch.GaLoreAdamW, group, grads, weight_decay)
    ours = run(GaLoreAdamW, group, grads, weight_decay, subspace="svd")
    assert_same_paths(ours, theirs)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", [0.25, 1.0])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fira(shape, proj_type, scale, weight_decay):
    grads = gradients(SHAPES[shape])
    grads[20:] = [8 * grad for grad in grads[20:]]  # a jump that the limiter must hold
    group = {"rank": RANK, "update_proj_gap": GAP, "proj_type": proj_type}
    theirs = run(fira.FiraAdamW, {**group, "alpha": scale}, grads, weight_decay)
    ours = run(FiraAdamW, {**group, "scale": scale}, grads, weight_decay, subspace="svd")
    assert_same_paths(ours, theirs)
