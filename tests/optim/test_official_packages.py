"""The same gradients through the official packages and through ours give the same weights."""

import warnings
from itertools import pairwise

import pytest
import torch
from official import official

from hf_lowrank.optim import ApolloAdamW, FiraAdamW, GaLoreAdamW, core, subspaces

apollo_torch, fira, galore_torch = map(official, ("apollo_torch", "fira", "galore_torch"))

SHAPES = {"tall": (24, 12), "wide": (12, 24), "square": (16, 16)}
STEPS, GAP, RANK = 60, 9, 4


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


def run(optimizer_class, group, grads, weight_decay, watch=None, **options):
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
        if watch is not None:
            watch(optimizer.state[target])
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


# The package fails on channel scales of any side but the standard one.
CHANNELWISE = [(shape, "std", "channel", 4, *more) for shape in SHAPES for more in ((1.0, False), (4.0, True))]
CHANNELWISE += [("tall", "right", "channel", 4, 1.0, False), ("wide", "left", "channel", 4, 1.0, False)]
TENSORWISE = [
    (shape, side, "tensor", *more)
    for shape in SHAPES
    for side in ("std", "reverse_std", "right", "left")
    for more in ((1, 128.0, True), (4, 9.0, False))
]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "proj_type", "scale_type", "rank", "scale", "scale_front"), CHANNELWISE + TENSORWISE
)
def test_apollo(monkeypatch, shape, proj_type, scale_type, rank, scale, scale_front, weight_decay):
    grads = gradients(SHAPES[shape])
    grads[20:] = [8 * grad for grad in grads[20:]]
    group = {"rank": rank, "update_proj_gap": GAP, "proj_type": proj_type, "scale_type": scale_type, "scale": scale}
    matrices = []

    def watch(state):
        matrix = state["projector"].ortho_matrix.clone()
        matrices.append(matrix.mT if matrix.shape[0] == rank else matrix)

    theirs = run(
        apollo_torch.APOLLOAdamW, {**group, "proj": "random"}, grads, weight_decay, watch, scale_front=scale_front
    )
    assert len({float(matrix.norm()) for matrix in matrices}) == -(-STEPS // GAP)

    def drawn(like, columns, rank, keys):
        return torch.stack([matrices[GAP * key[-1]] for key in keys])

    for module in (core, subspaces):
        monkeypatch.setattr(module, "gaussian_matrices", drawn)
    for subspace in ("gaussian", "seeded"):
        ours = run(ApolloAdamW, group, grads, weight_decay, subspace=subspace)
        assert_same_paths(ours, theirs)
