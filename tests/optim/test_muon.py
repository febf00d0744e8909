"""Newton–Schulz in float32: against the polynomial of the singular values, and against torch's in bfloat16."""

import numpy as np
import pytest
import torch

from hf_lowrank.errors import UserError
from hf_lowrank.optim.muon import MuonAdamW, orthogonalise
from tests.optim.test_conformance import loss_of, make, net, weights


def polynomial(matrix, steps):
    """What the iteration makes of the singular values, in float64."""
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return torch.from_numpy((left * values) @ right)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (1, 5)])
@pytest.mark.parametrize("steps", [1, 5])
def test_float32_is_the_polynomial_of_the_singular_values(shape, steps):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = polynomial(matrix, steps)
    found = orthogonalise(matrix, steps, "float32")
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=2e-6)
    assert torch.allclose(orthogonalise(matrix, steps).double(), expected, atol=0.1)


def test_what_is_near_stays_near_in_float32():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 22, generator=generator)
    near = matrix + 1e-5 * torch.randn(30, 22, generator=generator)
    apart = {dtype: (orthogonalise(matrix, 5, dtype) - orthogonalise(near, 5, dtype)).abs().max().item()
             for dtype in ("bfloat16", "float32")}  # fmt: skip
    assert 10 * apart["float32"] < apart["bfloat16"]


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
    with pytest.raises(UserError, match="ns_dtype of MuonAdamW must be one of bfloat16, float32, got"):
        MuonAdamW(net(), ns_dtype="float16")
