"""Each optimizer against the pages of `reference`, which are each method's step as its paper writes it, in float64."""

import functools
import itertools

import numpy as np
import pytest
import scipy.fft
import torch
from torch import nn

from hf_lowrank.optim import ApolloAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, MuonAdamW, reference
from hf_lowrank.optim.reference import Options, State
from hf_lowrank.optim.subspaces import gaussian_matrices

METHODS = {"galore": GaLoreAdamW, "fira": FiraAdamW, "apollo": ApolloAdamW, "frugal": FrugalAdamW}
GAP, STEPS, RANK = 4, 11, 3
# Two of a kind are stepped in one batch; the last is above what a CPU's batch stacks.
SHAPES = [(12, 7), (7, 12), (9, 9), (12, 7), (7, 12), (270, 250)]
SIDES = ("std", "reverse_std", "right", "left")
MOMENTS = ("keep", "rotate", "reset")
OWN = {
    "galore": [{}],
    "fira": [{"residual": "official"}, {"residual": "paper", "norm_growth_limit": 1.2}],
    "apollo": [{"scale_type": "channel"}, {"scale_type": "tensor", "scale": 128.0}],
    "frugal": [{"state_free_rule": "sign"}, {"state_free_rule": "sgd", "state_free_lr_ratio": 0.5}],
}
SUBSPACES = {
    "galore": ("svd", "randomized", "random", "columns", "dct", "gaussian", "seeded"),
    "fira": ("svd", "randomized", "random", "columns", "dct"),
    "apollo": ("svd", "randomized", "random", "columns", "gaussian", "seeded"),
    "frugal": ("svd", "randomized", "random", "columns", "dct"),
}


def cases():
    """Every side with every subspace, what a refresh does to the moments and Adam's variant taken in turn."""
    turn = itertools.cycle(itertools.product(MOMENTS, ("official", "torch")))
    for name in METHODS:
        sides = (*SIDES, "full") if name in ("galore", "frugal") else SIDES
        for side, subspace, own in itertools.product(sides, SUBSPACES[name], OWN[name]):
            if side != "full" or subspace in ("svd", "randomized", "random"):
                moments, variant = next(turn)
                yield name, side, subspace, moments, variant, own


def gradients(step):
    """With a jump that the limiter must hold."""
    generator = torch.Generator().manual_seed(step)
    size = 8.0 if step in (5, 6) else 1.0
    return [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def named(params):
    return [{"params": [(f"w{number}", param) for number, param in enumerate(params)]}]


def learning_rate(step):
    return 1e-2 / (1 + 0.1 * step)


def check_same(param, W):
    assert param.dtype == torch.float64
    assert (param - W).abs().max() <= 1e-6 * W.abs().max()


def bases_in_use(optimizer, param, number, options, subspace):
    """The bases that an optimizer has just drawn for a matrix, as (P, Q)."""
    state, (rows, columns) = optimizer.state[param], param.shape
    left, right = reference.projected_sides(rows, columns, options.proj_type)
    length = columns if right else rows
    if "basis" not in state:
        basis = gaussian_matrices(param, length, options.rank, [(0, number, state["refreshes"] - 1)])[0]
    elif state["basis"].is_floating_point():
        basis = state["basis"].clone()
    else:
        vectors = np.eye(length) if subspace == "columns" else scipy.fft.idct(np.eye(length), axis=0, norm="ortho")
        basis = torch.from_numpy(vectors)[:, state["basis"]]
    return (state["left_basis"].clone(), basis) if left and right else (basis, None) if left else (None, basis)


@pytest.mark.parametrize(("name", "side", "subspace", "moments", "variant", "own"), list(cases()), ids=str)
def test_projected_methods(name, side, subspace, moments, variant, own):
    shared = {
        "betas": (0.8, 0.97), "eps": 1e-5, "weight_decay": 0.3, "rank": RANK, "update_proj_gap": GAP, "scale": 0.25,
        "proj_type": side, "moments": moments, "adam_variant": variant, **own,
    }  # fmt: skip
    params = parameters()
    optimizer = METHODS[name](named(params), subspace=subspace, **shared)
    step_of = getattr(reference, name)
    pairs = [(param.detach().clone(), State()) for param in params]
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()
        for number, param in enumerate(params):
            options = Options(lr=learning_rate(step), **shared)
            if subspace != "svd":
                bases = bases_in_use(optimizer, param, number, options, subspace)
                options = Options(lr=learning_rate(step), **shared, choose_bases=lambda G, o, found=bases: found)
            pairs[number] = step_of(pairs[number][0], param.grad, pairs[number][1], options)
            check_same(param, pairs[number][0])


@pytest.mark.parametrize("name", METHODS)
def test_staggered_refreshes(name):
    params, shared = parameters(), {"rank": RANK, "update_proj_gap": GAP, "scale": 0.5}
    optimizer = METHODS[name](named(params), lr=1e-2, stagger=True, subspace="svd", moments="keep", **shared)
    pairs = [(param.detach().clone(), State()) for param in params]
    for step in range(STEPS):
        for number, (param, grad) in enumerate(zip(params, gradients(step), strict=True)):
            param.grad = grad
            options = Options(lr=1e-2, stagger_offset=GAP * number // len(params), **shared)
            pairs[number] = getattr(reference, name)(pairs[number][0], grad, pairs[number][1], options)
        optimizer.step()
        for param, (W, _) in zip(params, pairs, strict=True):
            check_same(param, W)


@pytest.mark.parametrize("name", ["galore", "fira", "frugal"])
def test_lazy_intervals(name):
    params, shared = parameters(), {"rank": RANK, "update_proj_gap": 1, "scale": 0.5, "lazy": True}
    optimizer = METHODS[name](named(params), lr=1e-2, subspace="svd", moments="keep", **shared)
    pairs = [(param.detach().clone(), State()) for param in params]
    steady = gradients(100)
    for step in range(40):
        for number, (param, grad) in enumerate(zip(params, gradients(step), strict=True)):
            steadiness = 8 if number % 2 else 0  # every other subspace settles
            param.grad = grad + steadiness * steady[number]
            pairs[number] = getattr(reference, name)(
                pairs[number][0], param.grad, pairs[number][1], Options(lr=1e-2, **shared)
            )
        optimizer.step()
        for param, (W, state) in zip(params, pairs, strict=True):
            check_same(param, W)
            assert optimizer.state[param]["interval"] == state.interval
    intervals = [optimizer.state[param]["interval"] for param in params]
    assert min(intervals[1::2]) >= 4
    assert intervals[0] < min(intervals[1::2])


@pytest.mark.parametrize("variant", ["official", "torch"])
@pytest.mark.parametrize("rule", ["sign", "sgd"])
def test_frugal_over_blocks(rule, variant):
    params = parameters()
    shared = {
        "lr": 1e-2, "weight_decay": 0.1, "rank": RANK, "update_proj_gap": GAP, "adam_variant": variant,
        "state_free_rule": rule, "state_free_lr_ratio": 0.5,
    }  # fmt: skip
    optimizer = FrugalAdamW(named(params), subspace="blocks", **shared)
    pairs = [(param.detach().clone(), State()) for param in params]
    chosen = set()
    for step in range(STEPS):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()
        for number, param in enumerate(params):
            has_moments = "exp_avg" in optimizer.state[param]
            chosen.add((number, has_moments))
            pairs[number] = reference.frugal_block(
                pairs[number][0], param.grad, pairs[number][1], Options(**shared), chosen=has_moments
            )
            check_same(param, pairs[number][0])
    assert {has_moments for _, has_moments in chosen} == {True, False}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float32"])
def test_muon(ns_dtype, adjust_lr_fn, nesterov):
    params = parameters()
    shared = {
        "lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 4,
        "adjust_lr_fn": adjust_lr_fn,
    }  # fmt: skip
    optimizer = MuonAdamW([{**group, "muon": True} for group in named(params)], ns_dtype=ns_dtype, **shared)
    options = Options(ns_dtype=torch.bfloat16 if ns_dtype == "bfloat16" else torch.float64, **shared)
    pairs = [(param.detach().clone(), State()) for param in params]
    for step in range(STEPS):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()
        for number, param in enumerate(params):
            pairs[number] = reference.muon(pairs[number][0], param.grad, pairs[number][1], options)
            check_same(param, pairs[number][0])


def test_frugal_is_its_formula():
    """In numpy: FRUGAL has no official package to compare with."""
    rng = np.random.default_rng(0)
    W, M, V = rng.normal(size=(8, 6)), np.zeros((8, 2)), np.zeros((8, 2))
    columns = [[1, 4], [0, 5]]
    ours, state = torch.from_numpy(W.copy()), State()
    for step in range(6):
        G, chosen = rng.normal(size=(8, 6)), columns[step // 3]
        age = step % 3 + 1
        if age == 1:
            M, V = np.zeros((8, 2)), np.zeros((8, 2))
        M, V = 0.9 * M + 0.1 * G[:, chosen], 0.999 * V + 0.001 * G[:, chosen] ** 2
        update = 0.3 * np.sign(G)
        update[:, chosen] = np.sqrt(1 - 0.999**age) / (1 - 0.9**age) * M / (np.sqrt(V) + 1e-6)
        W = (1 - 0.01 * 0.2) * (W - 0.01 * update)
        basis = torch.eye(6, dtype=torch.float64)[:, chosen]
        options = Options(
            lr=0.01, weight_decay=0.2, rank=2, update_proj_gap=3, moments="reset", state_free_lr_ratio=0.3,
            choose_bases=lambda G, o, found=basis: (None, found),
        )  # fmt: skip
        ours, state = reference.frugal(ours, torch.from_numpy(G), state, options)
        np.testing.assert_allclose(ours.numpy(), W, rtol=1e-12, atol=1e-12)


def test_a_full_rank_step_is_torchs_adamw():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    param, state = nn.Parameter(W.clone()), State()
    theirs = torch.optim.AdamW([param], lr=0.02, betas=(0.8, 0.97), eps=1e-5, weight_decay=0.3)
    options = Options(
        lr=0.02, betas=(0.8, 0.97), eps=1e-5, weight_decay=0.3, adam_variant="torch",
        choose_bases=lambda G, o: (None, torch.eye(5, dtype=torch.float64)),
    )  # fmt: skip
    for step in (functools.partial(step_of, options=options) for step_of in 6 * [reference.galore]):
        param.grad = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        theirs.step()
        W, state = step(W, param.grad, state)
        torch.testing.assert_close(W, param.detach(), rtol=1e-12, atol=1e-12)
