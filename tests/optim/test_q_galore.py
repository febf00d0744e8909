"""Q-GaLore: its quantiser against numpy, and its step against `reference` and its formulas in numpy, in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchao.optim.quant_utils import create_dynamic_map, dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

from hf_lowrank.errors import UserError
from hf_lowrank.optim import ApolloAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, QGaLoreAdamW, reference
from hf_lowrank.optim.reference import Options, State
from hf_lowrank.storage.codes import Codes, decode, encode

# Tall, wide, square; two of a kind are stepped in one batch. Bases of 24 to 480 values: short groups and full ones.
SHAPES = [(12, 7), (7, 12), (9, 9), (12, 7), (70, 40), (40, 70), (48, 48)]
STEPS = 12


def rank_of(shape):
    return 3 if min(shape) < 10 else 12


# -- the quantiser, in numpy


def groups_in_numpy(values, bits):
    """Codes, scales and zero points of one tensor, group by group."""
    codes, scales, zeros = [], [], []
    for start in range(0, values.size, 256):
        group = values.reshape(-1)[start : start + 256]
        scale = max(group.max() - group.min(), 1e-5) / (2**bits - 1)
        zero = np.round(-group.min() / scale)
        codes.append(np.clip(np.round(group / scale) + zero, 0, 2**bits - 1))
        scales.append(scale)
        zeros.append(zero)
    return np.concatenate(codes).astype(int), np.array(scales), np.array(zeros)


def rounded_in_numpy(values, bits=4):
    codes, scales, zeros = groups_in_numpy(values, bits)
    return (np.repeat(scales, 256)[: codes.size] * (codes - np.repeat(zeros, 256)[: codes.size])).reshape(values.shape)


def packed(codes, bits):
    """As Python integers would be packed."""
    if bits == 8:
        return list(codes)
    codes = [*codes, 0] if len(codes) % 2 else list(codes)
    return [codes[i] + 16 * codes[i + 1] for i in range(0, len(codes), 2)]


def tensors():
    generator = np.random.default_rng(0)
    normal = generator.normal(size=(3, 40, 16))
    return {
        "three groups, the last of 128": normal,
        "one short group": normal[:, :5, :7],
        "an odd number": normal[:, :7, :1],
        "one value": normal[:, :1, :1],
        "exactly one group": normal[:, :16],
        "positive": np.abs(normal) + 0.5,
        "negative": -np.abs(normal) - 3.0,
        "constant": np.full((2, 20, 20), 0.7),
        "zero": np.zeros((2, 20, 20)),
        "constant in one group": np.concatenate([np.full((1, 256), -0.3), normal[:1].reshape(1, -1)], 1),
        "ranges below the least": 0.25 + 1e-7 * normal,
        "twelve orders": normal * 10.0 ** -np.linspace(0, 12, 40)[:, None],
        "large": 1e6 * normal,
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", tensors())
def test_codes_are_numpys(name, bits):
    values = tensors()[name]
    stored = encode(torch.from_numpy(values), bits)
    back = decode(stored, values.shape[1:], bits).numpy()
    count = values[0].size
    for number, own in enumerate(values):
        codes, scales, zeros = groups_in_numpy(own, bits)
        assert stored.codes.dtype == torch.uint8
        assert stored.codes[number].tolist()[: count * bits // 8] == packed(codes, bits)[: count * bits // 8]
        np.testing.assert_array_equal(stored.scale[number].numpy(), scales)
        np.testing.assert_array_equal(stored.zero[number].numpy(), zeros)
        np.testing.assert_array_equal(back[number], rounded_in_numpy(own, bits))
    assert stored.codes.shape == (len(values), -(-count * bits // 8))
    steps = np.repeat(stored.scale.numpy(), 256, axis=1)[:, :count].reshape(values.shape)
    # The highest value of a group is cut off by up to half a step where rounding the zero point moves the grid.
    assert (np.abs(back - values) <= steps * (1 + 1e-9)).all()
    assert np.median(np.abs(back - values) / steps) <= 0.5


def test_groups_of_one_sign_keep_their_values():
    """Clipping the zero point to the codes' range would bring them all to the end nearest to zero."""
    values = np.linspace(2.0, 2.15, 256)[None]
    back = decode(encode(torch.from_numpy(values), 4), (256,), 4).numpy()
    assert np.abs(back - values).max() <= 0.011
    assert len(np.unique(back)) == 16


def test_float32_and_bfloat16_values():
    values = torch.randn(2, 30, 11, generator=torch.Generator().manual_seed(0))
    wide, narrow = encode(values.double(), 4), encode(values, 4)
    assert narrow.scale.dtype == torch.float32
    assert (wide.codes != narrow.codes).float().mean() < 0.01
    assert torch.allclose(decode(wide, (30, 11), 4).float(), decode(narrow, (30, 11), 4), atol=0.01)


# -- the step


def gradients(step):
    """The first directions of every other matrix's gradients hardly change: these subspaces settle."""
    found = []
    for number, shape in enumerate(SHAPES):
        own, steady = (
            torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in (100 * step + number, 10_000 + number)
        )
        found.append(own + (20 * steady if number % 2 else 0))
    return found


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def groups_of(params):
    return [{"params": [(f"w{n}", param)], "rank": rank_of(param.shape)} for n, param in enumerate(params)]


class InNumpy:
    """One matrix under Q-GaLore, as the paper writes it. Signs of singular vectors are arbitrary: they are given."""

    def __init__(self, W, *, lr, betas, eps, weight_decay, scale, update_proj_gap):
        self.W, self.lr, self.betas, self.eps, self.decay, self.scale = W, lr, betas, eps, weight_decay, scale
        self.gap, self.interval, self.queue, self.t = update_proj_gap, 1, [], 0
        self.left, self.rank = W.shape[0] < W.shape[1], rank_of(W.shape)
        self.basis, self.M, self.V = None, 0.0, 0.0

    def step(self, G, like):
        if self.t % (self.gap * self.interval) == 0:
            U, _, Vt = np.linalg.svd(G, full_matrices=False)
            exact = (U if self.left else Vt.T)[:, : self.rank]
            new = rounded_in_numpy(exact * np.sign((exact * like).sum(0)))
            if self.basis is not None:
                old, first = self.basis[:, 0], new[:, 0]
                self.queue.append(abs(old @ first) / np.linalg.norm(old) / np.linalg.norm(first))
                self.queue = self.queue[-5:]
                if len(self.queue) == 5 and np.mean(self.queue) >= 0.4:
                    self.interval *= 2
            self.basis = new
        R = self.basis.T @ G if self.left else G @ self.basis
        self.t += 1
        b1, b2 = self.betas
        self.M, self.V = b1 * self.M + (1 - b1) * R, b2 * self.V + (1 - b2) * R**2
        N = self.M / (np.sqrt(self.V) + self.eps)
        rate = self.lr * np.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        self.W = self.W - rate * self.scale * (self.basis @ N if self.left else N @ self.basis.T)
        self.W = self.W - self.lr * self.decay * self.W  # after the update


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_optimizer_reference_and_formulas_agree(weight_decay):
    shared = {
        "lr": 1e-2, "betas": (0.8, 0.97), "eps": 1e-5, "weight_decay": weight_decay, "scale": 0.25,
        "update_proj_gap": 1,
    }  # fmt: skip
    params = parameters()
    vector = nn.Parameter(torch.ones(5, dtype=torch.float64))
    theirs = nn.Parameter(vector.detach().clone())
    optimizer = QGaLoreAdamW(
        [*groups_of(params), {"params": [("vector", vector)], "rank": None, "adam_variant": "torch"}],
        subspace="svd", state_dtype="parameter", **shared,
    )  # fmt: skip
    adam = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.8, 0.97), eps=1e-5, weight_decay=weight_decay)
    references = [(param.detach().clone(), State()) for param in params]
    formulas = [InNumpy(param.detach().numpy().copy(), **shared) for param in params]
    for step in range(STEPS):
        grads = gradients(step)
        for param, grad in zip([*params, vector, theirs], [*grads, grads[2][0, :5], grads[2][0, :5]], strict=True):
            param.grad = grad.clone()
        optimizer.step()
        adam.step()
        for number, (param, grad) in enumerate(zip(params, grads, strict=True)):
            W, state = references[number]
            references[number] = reference.q_galore(W, grad, state, Options(rank=rank_of(W.shape), **shared))
            state, held = references[number][1], optimizer.state[param]
            basis = state.Q if state.P is None else state.P
            stored = Codes(held["basis"][None], held["basis_scale"][None], held["basis_zero"][None])
            torch.testing.assert_close(decode(stored, basis.shape, 4)[0], basis, rtol=1e-9, atol=1e-12)
            formulas[number].step(grad.numpy(), basis.numpy())
            torch.testing.assert_close(param.detach(), references[number][0], rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(param.detach().numpy(), formulas[number].W, rtol=1e-9, atol=1e-9)
            assert held["interval"] == state.interval == formulas[number].interval
        torch.testing.assert_close(vector, theirs, rtol=1e-12, atol=1e-12)
    intervals = [optimizer.state[param]["interval"] for param in params]
    assert set(intervals[1::2]) == {8}
    assert 1 in intervals[::2]


FOUR = {"galore": GaLoreAdamW, "fira": FiraAdamW, "apollo": ApolloAdamW, "frugal": FrugalAdamW}
OWN = {"fira": [{"residual": "official"}, {"residual": "paper"}], "frugal": [{"state_free_rule": "sgd"}]}


@pytest.mark.parametrize(
    ("name", "side", "subspace", "own"),
    [
        (name, side, subspace, own)
        for name in FOUR
        for side, subspace in (
            ("std", "svd"),
            ("reverse_std", "randomized"),
            ("left", "random"),
            ("right", "gaussian"),
        )
        if subspace != "gaussian" or name in ("galore", "apollo")
        for own in OWN.get(name, [{}])
    ]
    + [("galore", "full", "randomized", {}), ("frugal", "full", "svd", {})],
)
def test_every_method_takes_bases_in_four_bits(name, side, subspace, own):
    """Fira's norms need no orthonormal basis. The bases in use are read from the state, and rounding them again with
    the reference's quantiser changes nothing but the last digits."""
    shared = {
        "lr": 1e-2, "eps": 1e-5, "weight_decay": 0.1, "update_proj_gap": 4, "scale": 0.5, "proj_type": side,
        "moments": "rotate", "projection_bits": 4, **own,
    }  # fmt: skip
    params = parameters()
    bound = 1e-7 if name in ("fira", "apollo") else 1e-9  # the limiter keeps its norms in float32
    optimizer = FOUR[name](groups_of(params), subspace=subspace, **shared)
    pairs = [(param.detach().clone(), State()) for param in params]
    for step in range(9):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()
        for number, param in enumerate(params):
            bases = bases_in_use(optimizer.state[param], param.shape, side)
            options = Options(rank=rank_of(param.shape), choose_bases=lambda G, o, found=bases: found, **shared)
            pairs[number] = getattr(reference, name)(pairs[number][0], param.grad, pairs[number][1], options)
            assert (param - pairs[number][0]).abs().max() <= bound * param.abs().max()


def bases_in_use(state, shape, side):
    left, right = reference.projected_sides(*shape, side)
    found = []
    for is_used, key, length in (
        (left, "left_basis" if left and right else "basis", shape[0]),
        (right, "basis", shape[1]),
    ):
        if is_used:
            stored = Codes(*(state[name][None] for name in (key, f"{key}_scale", f"{key}_zero")))
            found.append(decode(stored, (length, rank_of(shape)), 4)[0])
        else:
            found.append(None)
    return tuple(found)


def test_moments_in_eight_bits_are_torchaos():
    """A step in float32 whose moments are decoded before and encoded after it by torchao's own functions."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(256, 96))
    W = param.detach().clone()
    optimizer = QGaLoreAdamW([("w", param)], lr=1e-2, rank=16, subspace="svd", update_proj_gap=100)
    levels = {signed: torch.tensor(create_dynamic_map(signed=signed)) for signed in (True, False)}
    held = {}

    def through_codes(key, values, signed):
        scaled, scales = scale_tensor(values, 256)
        held[key] = quantize_8bit_with_qmap(scaled, levels[signed]), levels[signed], scales

    through_codes("M", torch.zeros(256, 16), True)
    through_codes("V", torch.zeros(256, 16), False)
    for step in range(1, 7):
        param.grad = torch.randn(256, 96)
        optimizer.step()
        state = optimizer.state[param]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == state["basis"].dtype == torch.uint8
        stored = Codes(state["basis"][None], state["basis_scale"][None], state["basis_zero"][None])
        Q = decode(stored, (96, 16), 4)[0]
        R = param.grad @ Q
        M = 0.9 * dequant_with_qmap(*held["M"]) + 0.1 * R
        V = 0.999 * dequant_with_qmap(*held["V"]) + 0.001 * R.square()
        rate = 1e-2 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        W -= rate * 0.25 * (M / (V.sqrt() + 1e-6)) @ Q.mT
        through_codes("M", M, True)
        through_codes("V", V, False)
        # A moment at the border between two codes may fall to either side.
        assert (state["exp_avg"] != held["M"][0]).float().mean() < 2e-3
        assert (param.detach() - W).abs().mean() < 1e-6


def test_state_has_the_bytes_of_the_formulas():
    rows, columns, rank = 200, 96, 32
    param = nn.Parameter(torch.zeros(rows, columns, dtype=torch.bfloat16))
    optimizer = QGaLoreAdamW([("w", param)], rank=rank)
    param.grad = torch.randn(rows, columns).bfloat16()
    optimizer.step()
    held = {k: v.numel() * v.element_size() for k, v in optimizer.state[param].items() if isinstance(v, torch.Tensor)}
    basis, moments = columns * rank, rows * rank
    assert held == {
        "basis": basis // 2, "basis_scale": 4 * basis // 256, "basis_zero": 4 * basis // 256,
        "exp_avg": moments, "exp_avg_scale": 4 * moments // 256,
        "exp_avg_sq": moments, "exp_avg_sq_scale": 4 * moments // 256, "cosines": 5 * 4,
    }  # fmt: skip


def test_a_resume_in_the_middle_of_a_lazy_interval_is_exact():
    def trained(stop=None):
        params = parameters(torch.float32)
        optimizer = QGaLoreAdamW(groups_of(params), lr=1e-2, update_proj_gap=1)
        for step in range(30):
            if step == stop:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = QGaLoreAdamW(groups_of(params), lr=1e-2, update_proj_gap=1)
                optimizer.load_state_dict(saved)
            for param, grad in zip(params, gradients(step), strict=True):
                param.grad = grad.float()
            optimizer.step()
        return params, [optimizer.state[param]["interval"] for param in params]

    (whole, intervals), (resumed, again) = trained(), trained(19)
    assert all(map(torch.equal, whole, resumed))
    assert intervals == again
    assert max(intervals) >= 8  # step 19 is between two refreshes


def test_a_state_without_these_options_is_continued():
    """As an earlier version saved it: the options have their defaults."""
    params = parameters(torch.float32)
    optimizer = GaLoreAdamW(groups_of(params))
    for param, grad in zip(params, gradients(0), strict=True):
        param.grad = grad.float()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["projection_bits"], group["lazy"]
    other = GaLoreAdamW(groups_of(params))
    other.load_state_dict(saved)
    other.step()
    assert {group["projection_bits"] for group in other.param_groups} == {None}


def test_diagnostics_are_of_the_spanned_subspace():
    """A share of energy stays below one, though rounded columns are not orthonormal."""
    param = nn.Parameter(torch.zeros(60, 40))
    optimizer = QGaLoreAdamW([("w", param)], rank=8, update_proj_gap=1, diagnostics=True)
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(60, 8, generator=generator) @ torch.randn(8, 40, generator=generator)
    for _ in range(4):
        param.grad = low + 1e-3 * torch.randn(60, 40, generator=generator)
        optimizer.step()
    found = optimizer.diagnostics["w"]
    assert 0.97 < found["captured_energy"] <= 1 + 1e-6
    assert 0.9 < found["subspace_overlap"] <= 1 + 1e-6


def test_what_it_cannot_do_is_refused():
    param = nn.Parameter(torch.zeros(8, 5))
    with pytest.raises(UserError, match=r"projection_bits of QGaLoreAdamW must be 4 or None, got 3$"):
        QGaLoreAdamW([param], rank=2, projection_bits=3)
    for subspace in ("columns", "dct", "seeded"):
        with pytest.raises(
            UserError,
            match=rf"subspace of GaLoreAdamW must be one of svd, randomized, random, gaussian with projection_bits=4, "
            rf"got '{subspace}'$",
        ):
            GaLoreAdamW([param], rank=2, subspace=subspace, projection_bits=4)
    with pytest.raises(UserError, match=r"projection_bits=4, got 'blocks'$"):
        FrugalAdamW([param], rank=2, subspace="blocks", projection_bits=4)
    damaged = GaLoreAdamW([("w", param)], rank=2, projection_bits=4)
    param.grad = torch.randn(8, 5)
    damaged.step()
    saved = copy.deepcopy(damaged.state_dict())
    saved["state"][0]["basis"] = saved["state"][0]["basis"][:-1]
    with pytest.raises(UserError, match=r"basis of w must have shape \(5,\), got \(4,\)"):
        damaged.load_state_dict(saved)
