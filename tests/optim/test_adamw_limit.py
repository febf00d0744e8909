"""With the identity as a full-rank basis and scale 1, the core is torch's AdamW."""

import pytest
import torch

from hf_lowrank.optim import FiraAdamW, GaLoreAdamW
from hf_lowrank.optim.subspaces import SUBSPACES


def unit_columns(request):
    return torch.eye(request.columns)[:, : request.rank].expand(len(request.grads), -1, -1)


ADAM = {"lr": 0.02, "betas": (0.8, 0.97), "eps": 1e-5, "weight_decay": 0.3}


@pytest.mark.parametrize("optimizer_class", [GaLoreAdamW, FiraAdamW])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_identity_basis_is_adamw(monkeypatch, optimizer_class, shape):
    monkeypatch.setitem(SUBSPACES, "svd", unit_columns)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs, plain = (torch.nn.Parameter(start.clone()) for _ in range(3))
    projected = optimizer_class(
        [{"params": [ours], "rank": min(shape)}, {"params": [plain], "rank": None}],
        scale=1.0, adam_variant="torch", subspace="svd", update_proj_gap=7, **ADAM,
    )  # fmt: skip
    reference = torch.optim.AdamW([theirs], **ADAM)
    for _ in range(40):
        grad = torch.randn(shape, generator=generator)
        for param in (ours, theirs, plain):
            param.grad = grad.clone()
        projected.step()
        reference.step()
        for param in (ours, plain):
            assert (param - theirs).norm() / theirs.norm() <= 1e-6
