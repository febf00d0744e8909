"""How bases are chosen, and what a refresh does to the moments."""

import copy

import numpy as np
import pytest
import scipy.fft
import torch
from torch import nn

from hf_lowrank.errors import UserError
from hf_lowrank.optim import FiraAdamW, GaLoreAdamW, subspaces
from hf_lowrank.optim.subspaces import (
    SUBSPACES,
    Request,
    captured_energy,
    exact_bases,
    gaussian_matrices,
    subspace_overlap,
)


def falling_spectrum(rows, columns, seed, decay=0.05):
    """A matrix whose singular values are exp(-decay · i)."""
    generator = torch.Generator().manual_seed(seed)
    least = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, least, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, least, generator=generator))[0]
    return left * torch.exp(-decay * torch.arange(least)) @ right.mT


def request(grad, rank=16, previous=None, key=(0, 0, 0), transposed=False, turns=False):
    previous = None if previous is None else previous[None]
    return Request(grads=grad[None], rank=rank, transposed=transposed, previous=previous, keys=[key], turns=turns)


def chosen(subspace, grad, **options):
    """The choice for one gradient."""
    return SUBSPACES[subspace](request(grad, **options))[0]


@pytest.mark.parametrize("transposed", [False, True])
def test_exact_bases_are_numpys(transposed):
    grad = falling_spectrum(40, 24, 0)
    oriented = grad.mT if transposed else grad
    right, left = (bases[0] for bases in exact_bases(request(oriented, rank=5, transposed=transposed)))
    u, _, vh = np.linalg.svd(oriented.double().numpy(), full_matrices=False)
    assert np.allclose(np.abs(right.numpy().T @ vh[:5].T), np.eye(5), atol=1e-4)
    assert np.allclose(np.abs(left.numpy().T @ u[:, :5]), np.eye(5), atol=1e-4)


@pytest.mark.parametrize(("decay", "share"), [(0.0, 0.99), (0.01, 0.98), (0.05, 0.99), (0.3, 0.99)])
@pytest.mark.parametrize("shape", [(96, 64), (64, 64), (64, 96)])
def test_randomized_basis_captures_the_energy_of_the_exact_one(shape, decay, share):
    """From scratch, and from the basis of another gradient after a few refreshes, for flat and steep spectra."""
    previous = None
    for seed in range(4):
        grad = falling_spectrum(*shape, seed, decay)
        exact, shares = captured_energy(grad, chosen("svd", grad)), []
        for _ in range(1 if previous is None else 4):
            previous = chosen("randomized", grad, previous=previous, key=(0, 0, seed))
            assert torch.allclose(previous.mT @ previous, torch.eye(16), atol=1e-5)
            shares.append(captured_energy(grad, previous) / exact)
        assert shares[0] >= 0.85
        assert shares[-1] >= share


def test_one_refresh_follows_a_gradient_that_has_changed():
    common = falling_spectrum(96, 64, 0)
    for seed in range(1, 6):
        basis = chosen("randomized", common)
        grad = 2 * common + falling_spectrum(96, 64, seed)
        basis = chosen("randomized", grad, previous=basis)
        assert captured_energy(grad, basis) >= 0.99 * captured_energy(grad, chosen("svd", grad))


def hard_gradients(dtype=torch.float32):
    """(k, 48, 32) of spectra that are hard to make orthonormal bases of, with what each is."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(48, 32, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))[0]
    number = torch.arange(32, dtype=torch.float64)
    spectra = {
        "twelve orders": 10.0 ** (-12 * number / 31),
        "rank 3": (number < 3).double(),
        "rank 1": (number < 1).double(),
        "repeated": torch.where(number < 8, 2.0, 1.0),
        "all equal": torch.ones(32, dtype=torch.float64),
        "a cliff": torch.where(number < 5, 1.0, 1e-9),
        "tiny": 1e-20 * torch.exp(-number / 9),
        "huge": 1e15 * torch.exp(-number / 9),
    }
    grads = [left * spectrum @ right.mT for spectrum in spectra.values()]
    spectra["equal columns"] = spectra["few columns"] = None
    grads.append(torch.ones(48, 32, dtype=torch.float64))
    grads.append(torch.where(number < 4, grads[3], 0.0))
    return list(spectra), torch.stack(grads).to(dtype)


@pytest.fixture(params=["householder", "cholesky"])
def way(request, monkeypatch):
    """Both ways to orthonormal columns, whatever the device."""
    monkeypatch.setattr(subspaces, "by_householder", lambda columns: request.param == "householder")
    return request.param


@pytest.mark.parametrize("rank", [6, 16, 32])
@pytest.mark.parametrize("turns", [False, True])
def test_bases_of_hard_spectra_are_orthonormal(way, rank, turns):
    names, grads = hard_gradients()
    exact = SUBSPACES["svd"](many(grads, rank))
    basis = None
    for refresh in range(4):
        basis = SUBSPACES["randomized"](many(grads, rank, basis, turns))
        for name, grad, own, best in zip(names, grads, basis, exact, strict=True):
            assert (own.double().mT @ own.double() - torch.eye(rank)).abs().max() <= 1e-5, (name, refresh)
            assert captured_energy(grad, own) >= 0.99 * captured_energy(grad, best), (name, refresh)
    grads = grads.flip(0)  # each from the basis of another
    basis = SUBSPACES["randomized"](many(grads, rank, basis, turns))
    assert (basis.mT @ basis - torch.eye(rank)).abs().max() <= 1e-5


def many(grads, rank, previous=None, turns=False):
    keys = [(0, number, 0) for number in range(len(grads))]
    return Request(grads=grads, rank=rank, transposed=False, previous=previous, keys=keys, turns=turns)


def test_both_ways_to_orthonormal_columns_agree(monkeypatch):
    _, grads = hard_gradients(torch.float64)
    grads = grads[[0, 3, 6, 7]]
    found = []
    for householder in (True, False):
        monkeypatch.setattr(subspaces, "by_householder", lambda columns, on=householder: on)
        first = SUBSPACES["randomized"](many(grads, 6))
        found.append(
            (first, SUBSPACES["randomized"](many(grads, 6, first, True)), SUBSPACES["random"](many(grads, 6)))
        )
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-7)


def test_a_gradient_without_directions_disturbs_no_other(way):
    _, grads = hard_gradients()
    spoilt = grads.clone()
    spoilt[1], spoilt[4, 3, 2], spoilt[6, 0, 0] = 0.0, torch.nan, torch.inf
    for subspace in ("randomized", "svd"):
        clean = SUBSPACES[subspace](many(grads, 6))
        other = SUBSPACES[subspace](many(spoilt, 6))
        for number in (0, 2, 3, 5, 7, 8, 9):
            assert torch.equal(clean[number], other[number]), (subspace, number)


def test_randomized_basis_is_constant_for_a_constant_gradient():
    grad = falling_spectrum(48, 32, 0, decay=0.3)
    first = chosen("randomized", grad, rank=6)
    again = chosen("randomized", grad, rank=6, previous=-first)
    assert torch.allclose(again, -first, atol=1e-3)  # signs are kept, since moments are


@pytest.mark.parametrize("in_bfloat16", [True, False])
def test_bases_of_large_gradients_are_as_good_in_bfloat16(way, in_bfloat16, monkeypatch):
    monkeypatch.setattr(subspaces, "fast_bfloat16", lambda device: in_bfloat16)
    grads = [falling_spectrum(320, 256, seed, decay=0.35) for seed in (0, 1)]
    assert (subspaces.rounded(torch.stack(grads)).dtype == torch.bfloat16) == in_bfloat16
    exact = SUBSPACES["svd"](many(torch.stack(grads), 6))
    first = SUBSPACES["randomized"](many(torch.stack(grads), 6))
    same = SUBSPACES["randomized"](many(torch.stack(grads), 6, -first))
    assert (same + first).abs().max() < (5e-3 if in_bfloat16 else 1e-3)
    other = SUBSPACES["randomized"](many(torch.stack(grads), 6, first.flip(0)))  # each from the basis of the other
    for basis, least in ((first, 0.999), (same, 0.999), (other, 0.9)):
        assert (basis.mT @ basis - torch.eye(6)).abs().max() < 1e-5
        for grad, own, best in zip(grads, basis, exact, strict=True):
            assert captured_energy(grad, own) > least * captured_energy(grad, best)


def test_random_subspaces():
    grad = torch.zeros(30, 20)
    columns = chosen("columns", grad, rank=7)
    assert len(set(columns.tolist())) == 7
    assert columns.max() < 20
    basis = chosen("random", grad, rank=7)
    assert torch.allclose(basis.mT @ basis, torch.eye(7), atol=1e-5)
    many = gaussian_matrices(grad, 20, 4, [(0, 0, i) for i in range(400)])
    assert many.mean().abs() < 0.01
    assert many.var() == pytest.approx(1 / 4, rel=0.02)
    assert torch.equal(many[3], gaussian_matrices(grad, 20, 4, [(0, 0, 3)])[0])


def test_cosine_columns_are_those_of_the_largest_l1_norm():
    grads = torch.randn(3, 30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = np.abs(scipy.fft.dct(grads.numpy(), axis=-1, norm="ortho")).sum(1)
    first = SUBSPACES["dct"](many(grads, 7))
    for own, expected in zip(first, sizes, strict=True):
        assert own.tolist() == sorted(np.argsort(expected)[-7:])
    basis = subspaces.cosines(20, torch.float64, torch.device("cpu"))
    np.testing.assert_allclose(basis.numpy(), scipy.fft.dct(np.eye(20), axis=0, norm="ortho"), atol=1e-12)
    again = SUBSPACES["dct"](many(grads.flip(0), 7, first))
    for own, last, expected in zip(again.tolist(), first.tolist(), sizes[::-1], strict=True):
        assert sorted(own) == sorted(np.argsort(expected)[-7:])
        for old, new in zip(last, own, strict=True):  # what stays keeps its place
            assert new == old or old not in own
    assert not torch.equal(again, first)


def test_moments_follow_their_columns_exactly():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(9, 12))
    optimizer = GaLoreAdamW([param], rank=5, update_proj_gap=3, subspace="dct", moments="rotate")
    moved = 0
    for step in range(9):
        param.grad = torch.randn(9, 12)
        if step in (3, 6):
            before = {key: optimizer.state[param][key].clone() for key in ("basis", "exp_avg", "exp_avg_sq")}
            for group in optimizer.param_groups:
                group["betas"] = (1 - 1e-12, 1 - 1e-12)  # the step after the refresh adds nothing
        optimizer.step()
        if step in (3, 6):
            old = before["basis"].tolist()
            for place, column in enumerate(optimizer.state[param]["basis"].tolist()):
                for key in ("exp_avg", "exp_avg_sq"):
                    expected = before[key][:, old.index(column)] if column in old else torch.zeros(12)
                    assert torch.allclose(optimizer.state[param][key][:, place], expected, rtol=0, atol=1e-9)
                moved += column in old
    assert 0 < moved < 10


def test_overlap_and_energy():
    eye = torch.eye(8)
    assert subspace_overlap(eye[:, :2], eye[:, :2]) == 1
    assert subspace_overlap(eye[:, :2], eye[:, 1:3]) == 0.5
    assert captured_energy(torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2)[:, 1:]) == pytest.approx(16 / 25)
    assert captured_energy(torch.zeros(3, 3), torch.eye(3)[:, :1]) == 1


def steps_that_refresh(stagger):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(9, 6)) for _ in range(4)]
    optimizer = GaLoreAdamW(params, rank=2, update_proj_gap=8, stagger=stagger, subspace="random")
    found = {}
    for step in range(24):
        for param in params:
            param.grad = torch.randn(9, 6)
        before = [optimizer.state[param].get("refreshes", 0) for param in params]
        optimizer.step()
        for number, param in enumerate(params):
            if optimizer.state[param]["refreshes"] > before[number]:
                found.setdefault(step, []).append(number)
    return found


def test_refreshes_can_be_staggered():
    assert steps_that_refresh(False) == {step: [0, 1, 2, 3] for step in (0, 8, 16)}
    staggered = steps_that_refresh(True)
    assert staggered.pop(0) == [0, 1, 2, 3]
    assert staggered == {2: [3], 4: [2], 6: [1], 8: [0], 10: [3], 12: [2], 14: [1], 16: [0], 18: [3], 20: [2], 22: [1]}


@pytest.mark.parametrize("proj_type", ["right", "left", "full"])
def test_rotated_moments_are_the_same_matrix_in_the_new_basis(proj_type):
    """With a full-rank basis rotation loses nothing: the lifted first moment is unchanged."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(6, 6))
    optimizer = GaLoreAdamW(
        [param], lr=0.0, rank=6, update_proj_gap=1, proj_type=proj_type, moments="rotate", subspace="svd"
    )
    expected = torch.zeros(6, 6)
    for _ in range(5):
        param.grad = torch.randn(6, 6)
        optimizer.step()
        expected = 0.9 * expected + 0.1 * param.grad
        state = optimizer.state[param]
        lifted = state["exp_avg"] @ state["basis"].mT
        if proj_type == "full":
            lifted = state["left_basis"] @ lifted
        assert torch.allclose(lifted.mT if proj_type == "left" else lifted, expected, atol=1e-5)
        assert (state["exp_avg_sq"] >= 0).all()


def test_reset_moments_restart():
    torch.manual_seed(0)
    old, new = nn.Parameter(torch.zeros(8, 5)), nn.Parameter(torch.zeros(8, 5))
    options = {"rank": 3, "update_proj_gap": 4, "moments": "reset", "subspace": "svd"}
    optimizer, fresh = GaLoreAdamW([old], **options), GaLoreAdamW([new], **options)
    for step in range(7):
        if step == 4:
            new.data.copy_(old.data)
        old.grad = torch.randn(8, 5)
        optimizer.step()
        if step >= 4:
            new.grad = old.grad.clone()
            fresh.step()
            assert torch.equal(old, new)


def test_a_resume_keeps_lengthened_intervals():
    def trained(stop=None):
        torch.manual_seed(0)
        steady = torch.randn(9, 6)
        param = nn.Parameter(torch.randn(9, 6))
        optimizer = GaLoreAdamW([param], rank=2, update_proj_gap=1, lazy=True)
        for step in range(30):
            if step == stop:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = GaLoreAdamW([param], rank=2, update_proj_gap=1, lazy=True)
                optimizer.load_state_dict(saved)
            param.grad = 5 * steady + torch.randn(9, 6, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return param.detach(), optimizer.state[param]["interval"]

    (whole, interval), (resumed, again) = trained(), trained(17)
    assert torch.equal(whole, resumed)
    assert interval == again == 16


def test_options_that_a_method_cannot_use_are_refused():
    param = nn.Parameter(torch.zeros(8, 5))
    with pytest.raises(UserError, match="subspace of FiraAdamW must be one of svd, randomized, random, columns"):
        FiraAdamW([param], rank=2, subspace="gaussian")
    with pytest.raises(UserError, match="must be one of svd, randomized, random with proj_type='full', got 'columns'"):
        GaLoreAdamW([param], rank=2, proj_type="full", subspace="columns")
    with pytest.raises(
        UserError, match=r"subspace of GaLoreAdamW must be one of svd, .* with lazy=True, got 'random'"
    ):
        GaLoreAdamW([param], rank=2, subspace="random", lazy=True)
    with pytest.raises(UserError, match="update_proj_gap of GaLoreAdamW must be an integer of at least 1, got 0"):
        GaLoreAdamW([param], rank=2, update_proj_gap=0)
    with pytest.raises(UserError, match="matrix='stack' needs three dimensions"):
        GaLoreAdamW([param], rank=2, matrix="stack")
    assert GaLoreAdamW([nn.Parameter(torch.zeros(4, 3, 2))], rank=4, matrix="flatten").param_groups
