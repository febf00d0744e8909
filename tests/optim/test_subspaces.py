"""How bases are chosen, and what a refresh does to the moments."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_lowrank.errors import UserError
from hf_lowrank.optim import FiraAdamW, GaLoreAdamW
from hf_lowrank.optim.subspaces import (
    SUBSPACES,
    Request,
    captured_energy,
    exact_bases,
    gaussian_matrix,
    subspace_overlap,
)


def falling_spectrum(rows, columns, seed, decay=0.05):
    """A matrix whose singular values are exp(-decay · i)."""
    generator = torch.Generator().manual_seed(seed)
    least = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, least, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, least, generator=generator))[0]
    return left * torch.exp(-decay * torch.arange(least)) @ right.mT


def request(grad, rank=16, previous=None, key=(0, 0, 0), transposed=False):
    return Request(grad=grad, rank=rank, transposed=transposed, previous=previous, key=key)


@pytest.mark.parametrize("transposed", [False, True])
def test_exact_bases_are_numpys(transposed):
    grad = falling_spectrum(40, 24, 0)
    oriented = grad.mT if transposed else grad
    right, left = exact_bases(request(oriented, rank=5, transposed=transposed))
    u, _, vh = np.linalg.svd(oriented.double().numpy(), full_matrices=False)
    assert np.allclose(np.abs(right.numpy().T @ vh[:5].T), np.eye(5), atol=1e-4)
    assert np.allclose(np.abs(left.numpy().T @ u[:, :5]), np.eye(5), atol=1e-4)


@pytest.mark.parametrize(("decay", "share"), [(0.0, 0.99), (0.01, 0.98), (0.05, 0.99), (0.3, 0.99)])
@pytest.mark.parametrize("shape", [(96, 64), (64, 64), (64, 96)])
def test_randomized_basis_captures_the_energy_of_the_exact_one(shape, decay, share):
    """From scratch and from the basis of another gradient, for flat and steep spectra."""
    previous = None
    for seed in range(4):
        grad = falling_spectrum(*shape, seed, decay)
        basis = SUBSPACES["randomized"](request(grad, previous=previous, key=(0, 0, seed)))
        assert torch.allclose(basis.mT @ basis, torch.eye(16), atol=1e-5)
        exact = captured_energy(grad, exact_bases(request(grad))[0])
        assert captured_energy(grad, basis) >= share * exact
        previous = basis


def test_randomized_basis_is_constant_for_a_constant_gradient():
    grad = falling_spectrum(48, 32, 0, decay=0.3)
    first = SUBSPACES["randomized"](request(grad, rank=6))
    again = SUBSPACES["randomized"](request(grad, rank=6, previous=-first))
    assert torch.allclose(again, -first, atol=1e-3)  # signs are kept, since moments are


def test_random_subspaces():
    grad = torch.zeros(30, 20)
    columns = SUBSPACES["columns"](request(grad, rank=7))
    assert len(set(columns.tolist())) == 7
    assert columns.max() < 20
    basis = SUBSPACES["random"](request(grad, rank=7))
    assert torch.allclose(basis.mT @ basis, torch.eye(7), atol=1e-5)
    many = torch.stack([gaussian_matrix(grad, 4, (0, 0, i)) for i in range(400)])
    assert many.mean().abs() < 0.01
    assert many.var() == pytest.approx(1 / 4, rel=0.02)
    assert torch.equal(many[3], gaussian_matrix(grad, 4, (0, 0, 3)))


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


def test_options_that_a_method_cannot_use_are_refused():
    param = nn.Parameter(torch.zeros(8, 5))
    with pytest.raises(UserError, match="subspace of FiraAdamW must be one of svd, randomized, random, columns"):
        FiraAdamW([param], rank=2, subspace="gaussian")
    with pytest.raises(UserError, match="must be one of svd, randomized, random with proj_type='full', got 'columns'"):
        GaLoreAdamW([param], rank=2, proj_type="full", subspace="columns")
    with pytest.raises(UserError, match="update_proj_gap of GaLoreAdamW must be an integer of at least 1, got 0"):
        GaLoreAdamW([param], rank=2, update_proj_gap=0)
    with pytest.raises(UserError, match="matrix='stack' needs three dimensions"):
        GaLoreAdamW([param], rank=2, matrix="stack")
    assert GaLoreAdamW([nn.Parameter(torch.zeros(4, 3, 2))], rank=4, matrix="flatten").param_groups
