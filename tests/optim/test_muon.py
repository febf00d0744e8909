"""The core of Muon, NorMuon, Dion and Dion2: orthogonal factors, stacks of equal matrices, torch's own Muon."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_lowrank.errors import UserError
from hf_lowrank.optim import Dion2AdamW, DionAdamW, MuonAdamW, NorMuonAdamW
from hf_lowrank.optim.muon import muon_groups
from hf_lowrank.optim.orthogonal import orthogonalise, orthonormal_columns
from tests.optim.test_conformance import ORTHOGONAL, loss_of, make, net, of_targets, weights

every_method = pytest.mark.parametrize("name", ORTHOGONAL)


# -- orthogonal factors


def polynomial(matrix, steps):
    """What Newton–Schulz makes of the singular values, in float64."""
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return torch.from_numpy((left * values) @ right)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (1, 5)])
@pytest.mark.parametrize("steps", [1, 5])
def test_float32_is_the_polynomial_of_the_singular_values(shape, steps):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrices, steps)
    assert found.dtype == torch.float32
    for matrix, one in zip(matrices, found, strict=True):
        assert torch.allclose(one.double(), polynomial(matrix, steps), atol=2e-6)
        assert torch.allclose(orthogonalise(matrix, steps), one, atol=1e-6)
        assert torch.allclose(orthogonalise(matrix.bfloat16(), steps).double(), polynomial(matrix, steps), atol=0.1)


def test_polar_express_brings_singular_values_closer_to_one():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, 40, 60, generator=generator, dtype=torch.float64)
    away = {
        rule: (torch.linalg.svdvals(orthogonalise(matrices, 5, rule)) - 1).abs().amax().item()
        for rule in ("newton_schulz", "polar_express")
    }
    assert away["polar_express"] < 0.15 < away["newton_schulz"] < 0.4
    # The last polynomial is repeated, which converges.
    assert (torch.linalg.svdvals(orthogonalise(matrices, 9, "polar_express")) - 1).abs().amax() < 0.15
    assert not orthogonalise(torch.zeros(2, 3, 4), 5, "polar_express").any()


def test_what_is_near_stays_near_in_float32():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 22, generator=generator)
    near = matrix + 1e-5 * torch.randn(30, 22, generator=generator)
    apart = {dtype: (orthogonalise(matrix.to(dtype)) - orthogonalise(near.to(dtype))).abs().max().item()
             for dtype in (torch.bfloat16, torch.float32)}  # fmt: skip
    assert 10 * apart[torch.float32] < apart[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal_columns_are_the_q_factor(dtype):
    matrices = torch.randn(3, 30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, upper = np.linalg.qr(matrices.numpy())
    expected = expected * np.sign(np.einsum("kii->ki", upper))[:, None]
    found = orthonormal_columns(matrices.to(dtype))
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("spectrum", ["decay over 12 orders", "rank 10", "equal", "scaled columns", "1e-30", "1e30"])
def test_orthonormal_columns_of_ill_conditioned_matrices(spectrum):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(80, 30, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))[0]
    values = torch.ones(30, dtype=torch.float64)
    if spectrum == "decay over 12 orders":
        values = torch.logspace(0, -12, 30, dtype=torch.float64)
    elif spectrum == "rank 10":
        values[10:] = 0
    matrix = (left * values) @ right
    if spectrum == "scaled columns":
        matrix = matrix * torch.logspace(0, -20, 30, dtype=torch.float64)
    elif spectrum.startswith("1e"):
        matrix = matrix * float(spectrum)
    found = orthonormal_columns(matrix[None].float())[0].double()
    assert found.isfinite().all()
    assert (found.mT @ found - torch.eye(30, dtype=torch.float64)).abs().max() < 1e-5
    span = left[:, values > 1e-5]
    assert torch.linalg.svdvals(span.mT @ found).min() > 1 - 1e-3  # keeps the span
    assert not orthonormal_columns(torch.zeros(1, 8, 3)).any()


# -- torch's Muon


@pytest.mark.parametrize(
    ("iterations", "nesterov", "adjust_lr_fn"),
    [
        ("bfloat16", True, "match_rms_adamw"),
        ("float64", True, "match_rms_adamw"),
        ("float64", False, "match_rms_adamw"),
        ("float64", True, "original"),
        ("float64", False, "original"),
    ],
)
def test_muon_is_torchs_muon(iterations, nesterov, adjust_lr_fn, monkeypatch):
    """Also in float64, where torch's cast to bfloat16 is undone."""
    dtype = torch.float32 if iterations == "bfloat16" else torch.float64
    if iterations == "float64":
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, theirs = net(dtype), net(dtype)
    shared = {"weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn, "momentum": 0.9, "ns_steps": 4}
    optimizer = make("muon", ours, ns_dtype="bfloat16" if iterations == "bfloat16" else "float32", **shared)
    groups = muon_groups(theirs, weight_decay=0.1)
    matrices = [param for group in groups if group["muon"] for _, param in group["params"]]
    muon = torch.optim.Muon(matrices, lr=1e-2, **shared)
    rest = [{**group, "params": [p for _, p in group["params"]]} for group in groups if not group["muon"]]
    adam = torch.optim.AdamW(rest, lr=1e-2, eps=1e-8)
    for step in range(12):
        for model in (ours, theirs):
            model.zero_grad()
            loss_of(model, step).backward()
        for each in (optimizer, muon, adam):
            each.step()
    bounds = {"rtol": 1e-5, "atol": 1e-7} if iterations == "bfloat16" else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(weights(ours), weights(theirs), **bounds)
    for group in groups:
        for name, param in group["params"] if group["muon"] else []:
            mine = dict(ours.named_parameters())[name]
            torch.testing.assert_close(
                optimizer.state[mine]["momentum_buffer"], muon.state[param]["momentum_buffer"], **bounds
            )


def test_the_dtype_reaches_the_step_and_survives_a_checkpoint():
    models = {dtype: net() for dtype in ("bfloat16", "float32")}
    for dtype, model in models.items():
        optimizer = make("muon", model, ns_dtype=dtype)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        other = make("muon", net(), ns_dtype=dtype)
        other.load_state_dict(optimizer.state_dict())
        assert all(group["ns_dtype"] == dtype for group in other.param_groups)
    difference = (weights(models["bfloat16"]) - weights(models["float32"])).abs().max()
    assert 0 < difference < 0.05


# -- stacks


@every_method
def test_batching_changes_nothing(name):
    """Matrices of one shape in one batch, and each in its own group."""
    ends = []
    for apart in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(10, 6)) for _ in range(3)]
        named, own = [(f"w{i}", param) for i, param in enumerate(params)], of_targets(name, 3)
        groups = [{"params": [pair], **own} for pair in named] if apart else [{"params": named, **own}]
        optimizer = make(name, groups, **({} if name == "dion" else {"ns_dtype": "float32"}))
        for _ in range(6):
            for param in params:
                param.grad = torch.randn(10, 6)
            optimizer.step()
        ends.append(torch.stack([param.detach() for param in params]))
    assert torch.allclose(ends[0], ends[1], rtol=1e-4, atol=1e-5)


@every_method
@pytest.mark.parametrize("state_dtype", ["parameter", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_state_has_the_size_of_the_formulas(name, shape, dtype, state_dtype):
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = make(name, [{"params": [("weight", weight)], **of_targets(name, 3)}], state_dtype=state_dtype)
    weight.grad = torch.randn(shape).to(dtype)
    optimizer.step()
    held = {
        key: value.numel() * value.element_size()
        for key, value in optimizer.state[weight].items()
        if isinstance(value, torch.Tensor)
    }
    size = weight.element_size()
    moment = 4 if state_dtype == "float32" and size == 2 else size
    asked = {"momentum_buffer": 20 * 12 * moment}
    if name == "normuon":
        asked["row_squares"] = shape[0] * moment
    if name == "dion":
        asked["basis"] = 12 * 3 * size
    if name == "cosmos":
        asked |= {"basis": shape[1] * 3 * size, "exp_avg_sq": shape[0] * 3 * moment, "gram": 3 * 3 * moment}
    assert held == asked


@every_method
def test_momenta_in_eight_bits_take_a_quarter_and_train_alike(name):
    pytest.importorskip("torchao")
    ends, sizes = {}, {}
    for kind in ("float32", "8bit"):
        torch.manual_seed(0)
        matrix, goal = nn.Parameter(torch.randn(128, 64)), torch.randn(128, 64)
        optimizer = make(name, [{"params": [matrix], **of_targets(name, 16)}], state_dtype=kind)
        for _ in range(40):
            optimizer.zero_grad()
            (matrix - goal).square().mean().backward()
            optimizer.step()
        ends[kind] = matrix.detach()
        state = optimizer.state[matrix].items()
        sizes[kind] = sum(value.numel() * value.element_size() for key, value in state if key.startswith("momentum"))
    assert sizes["8bit"] == sizes["float32"] / 4 * (1 + 4 / 256)
    assert (ends["8bit"] - ends["float32"]).norm() < 0.05 * ends["float32"].norm()


# -- zero gradients, options, refusals


@every_method
def test_a_matrix_without_gradient_at_first_starts_as_if_new(name):
    """A direction that has not been seen is kept, not lost to a division of zero by zero."""
    ends = []
    for idle in (0, 3):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(8, 6, dtype=torch.float64))
        own = {} if name == "dion" else {"ns_dtype": "float32"}
        optimizer = make(name, [{"params": [weight], **of_targets(name, 3)}], weight_decay=0.0, **own)
        for _ in range(idle):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            weight.grad = torch.randn(8, 6, generator=generator, dtype=torch.float64)
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_row_without_gradient_stays_where_it_is(dtype):
    """Whose factor is 1e8, above what float16 holds."""
    weight = nn.Parameter(torch.ones(6, 8, dtype=dtype))
    optimizer = make("normuon", [{"params": [weight], "muon": True}], weight_decay=0.0)
    for step in range(3):
        weight.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
        weight.grad[2] = 0
        optimizer.step()
    assert weight.isfinite().all()
    assert (weight[2] == 1).all()
    assert (weight[0] != 1).any()


def test_gradients_of_a_rank_below_dions():
    weight = nn.Parameter(torch.zeros(12, 8))
    optimizer = make("dion", [{"params": [weight], "muon": True, "rank": 5}], weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(2, 8, generator=generator)
    for _ in range(30):
        weight.grad = torch.randn(12, 2, generator=generator) @ right
        optimizer.step()
        assert weight.isfinite().all()
        assert optimizer.state[weight]["basis"].isfinite().all()
    outside = torch.eye(8) - torch.linalg.pinv(right) @ right
    assert (weight.detach() @ outside).norm() < 0.05 * weight.norm()


@every_method
def test_matrices_may_have_a_learning_rate_of_their_own(name):
    model = net()
    optimizer = make(name, model, lr=0.05, matrix_lr_scale=10.0)
    for group in optimizer.param_groups:
        assert group["lr"] == (0.5 if group["muon"] else 0.05)
        assert "matrix_lr_scale" not in group
    assert not optimizer.param_groups[0]["muon"]  # whose rate Trainer logs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loss_of(model, 0).backward()
    optimizer.step()
    schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.025, 0.25}


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (MuonAdamW, {"ns_dtype": "float16"}, "ns_dtype of MuonAdamW must be one of bfloat16, float32, got"),
        (MuonAdamW, {"orthogonaliser": "svd"}, "orthogonaliser of MuonAdamW must be one of newton_schulz, polar_exp"),
        (NorMuonAdamW, {"muon_beta2": 1.0}, r"muon_beta2 of NorMuonAdamW must be a number in \[0, 1\), got 1.0"),
        (NorMuonAdamW, {"adjust_lr_fn": "rms"}, "adjust_lr_fn of NorMuonAdamW must be one of original, match_rms_ada"),
        (Dion2AdamW, {"fraction": 0.0}, r"fraction of Dion2AdamW must be a number in \(0, 1\], got 0.0"),
        (DionAdamW, {"momentum": 1.5}, r"momentum of DionAdamW must be a number in \[0, 1\), got 1.5"),
        (DionAdamW, {"rank": 7}, r"rank must be from 1 to 6 for layers\.3\.weight of shape \(6, 8\), got 7"),
        (DionAdamW, {"rank": 0}, r"rank must be from 1 to 8 for layers\.0\.weight of shape \(8, 12\), got 0"),
    ],
)
def test_what_is_not_allowed_is_named(cls, options, message):
    with pytest.raises(UserError, match=message) as caught:
        cls(net(), **options)
    assert "\n" not in str(caught.value)


@every_method
def test_what_is_not_a_matrix_is_named(name):
    for shape in ((4,), (2, 3, 4)):
        with pytest.raises(UserError, match=r"w of shape .* is not a matrix; put it into a group without muon"):
            make(name, [{"params": [("w", nn.Parameter(torch.zeros(shape)))], **of_targets(name, 1)}])
    with pytest.raises(UserError, match="needs at least one group with muon=True; pass the model itself"):
        make(name, [nn.Parameter(torch.zeros(4, 4))])
    with pytest.raises(TypeError, match="has no option 'state_dtipe'; did you mean 'state_dtype'"):
        make(name, net(), state_dtipe="float32")
