"""LDAdam and COSMOS, whose bases move at each step: against `reference`, and against their formulas in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_lowrank.errors import UserError
from hf_lowrank.optim import CosmosAdamW, LDAdamW, reference
from hf_lowrank.optim.orthogonal import orthonormal_columns
from hf_lowrank.optim.reference import Options, State
from tests.optim.matrices import gradients, parameters

# Tall, wide, square; two of a kind are stepped in one batch. The rank of the last two is that of the whole matrix.
STEPS, RANK = 12, 3
CASES = [
    ("ldadam", {"error_feedback": True}),
    ("ldadam", {"error_feedback": False, "rho": 0.5}),
    ("cosmos", {"lr_ratio": 0.2, "gamma": 0.2}),
    ("cosmos", {"lr_ratio": 0.1, "gamma": 0.7, "nesterov": False}),
]


def made(name, params, **options):
    groups = [
        {"params": [(f"w{number}", param)], "rank": min(RANK, *param.shape)} for number, param in enumerate(params)
    ]
    if name == "ldadam":
        return LDAdamW(together(groups), **options)
    return CosmosAdamW([group | {"muon": True} for group in together(groups)], **options)


def together(groups):
    """One group of all targets of a rank."""
    ranks = sorted({group["rank"] for group in groups})
    return [{"params": [g["params"][0] for g in groups if g["rank"] == rank], "rank": rank} for rank in ranks]


# -- the formulas, in numpy


class LDAdamInNumpy:
    """One matrix with its basis on the right, (columns, r); of a matrix that is not tall, its transpose."""

    def __init__(self, W, *, lr, betas, weight_decay, error_feedback, rho=0.908):
        self.tall = W.shape[0] > W.shape[1]
        self.W = W if self.tall else W.T
        self.lr, self.betas, self.decay, self.rho, self.feedback = lr, betas, weight_decay, rho, error_feedback
        self.E, self.Q, self.t = 0.0, None, 0

    def step(self, G):
        (b1, b2), self.t = self.betas, self.t + 1
        A = (G if self.tall else G.T) + self.E
        if self.t == 1:
            Q = np.linalg.svd(A)[2][: min(RANK, *A.shape)].T
            self.m = self.v = np.zeros((len(A), Q.shape[1]))
            lost = 0.0
        else:
            k = self.t - 1
            mean = self.m / (1 - b1**k)
            B = self.rho * mean @ self.Q.T + (1 - self.rho) * A
            Q, _ = np.linalg.qr(B.T @ B @ self.Q)
            turn = self.Q.T @ Q
            turned = self.m @ turn
            variances = (self.v / (1 - b2**k) - mean**2) @ turn**2 + (mean @ turn) ** 2
            lost = b1 / (1 - b1) * (self.m @ self.Q.T - turned @ Q.T)
            self.m, self.v = turned, np.abs(variances) * (1 - b2**k)
        a = A @ Q
        if self.feedback:
            self.E = A - a @ Q.T + lost
        self.m, self.v = b1 * self.m + (1 - b1) * a, b2 * self.v + (1 - b2) * a**2
        direction = self.m / (1 - b1**self.t) / (np.sqrt(self.v / (1 - b2**self.t)) + 1e-8)
        self.W = (1 - self.lr * self.decay) * self.W - self.lr * direction @ Q.T
        self.Q = Q

    @property
    def weight(self):
        return self.W if self.tall else self.W.T


class CosmosInNumpy:
    """One matrix; the polynomial of the orthogonalisation acts on singular values."""

    def __init__(self, W, *, lr, betas, weight_decay, lr_ratio, gamma, nesterov=True):
        self.weight, self.lr, self.betas, self.decay = W, lr, betas, weight_decay
        self.ratio, self.gamma, self.nesterov = lr_ratio, gamma, nesterov
        self.M, self.v, self.t = np.zeros_like(W), 0.0, 0

    def step(self, G):
        (b1, b2), self.t = self.betas, self.t + 1
        self.M = b1 * self.M + G
        kappa = sum(b1**power for power in range(self.t))
        if self.t == 1:
            P = np.linalg.svd(G)[2][: min(RANK, *G.shape)].T
            before = 0.0
        else:
            # Without S: the covariance whose part in the old basis S is.
            covariance = b2 * self.P @ self.S @ self.P.T + (1 - b2) * G.T @ G
            P, _ = np.linalg.qr(covariance @ self.P)
            before = P.T @ (self.P @ self.S @ self.P.T) @ P
        self.S = b2 * before + (1 - b2) * P.T @ G.T @ G @ P
        self.v = b2 * self.v + (1 - b2) * (G @ P) ** 2
        H = (G + b1 * self.M) / (1 + b1 * kappa) if self.nesterov else self.M / kappa
        D = H @ P / (np.sqrt(self.v) / np.sqrt(1 - b2**self.t) + 1e-8) @ P.T
        outside = H - H @ P @ P.T
        if np.linalg.norm(outside) > 1e-12 * np.linalg.norm(H):
            left, values, right = np.linalg.svd(outside, full_matrices=False)
            values = values / np.linalg.norm(values)
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            C = (left * values) @ right
            D = D + self.gamma * C * G.size**0.5 / np.linalg.norm(C)
        move = self.ratio * G.size**0.5 * D / (np.linalg.norm(D) + 1e-8)
        self.weight, self.P = (1 - self.lr * self.decay) * self.weight - self.lr * move, P


FORMULAS = {"ldadam": LDAdamInNumpy, "cosmos": CosmosInNumpy}


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("name", "own"), CASES, ids=str)
def test_optimizer_reference_and_formulas_agree(name, own, weight_decay):
    shared = {"lr": 1e-2, "betas": (0.908, 0.95), "weight_decay": weight_decay, **own}
    params = parameters()
    vector = nn.Parameter(torch.ones(5, dtype=torch.float64))
    theirs = nn.Parameter(vector.detach().clone())
    optimizer = made(name, params, **shared, **({} if name == "ldadam" else {"ns_dtype": "float32"}))
    optimizer.add_param_group({"params": [("vector", vector)], **({"rank": None} if name == "ldadam" else {})})
    adam = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.908, 0.95), weight_decay=weight_decay)
    starts = [param.detach().clone() for param in params]
    references = [(W, State()) for W in starts]
    formulas = [FORMULAS[name](W.numpy().copy(), **shared) for W in starts]
    for step in range(STEPS):
        grads = gradients(step)
        for param, grad in zip([*params, vector, theirs], [*grads, grads[2][0, :5], grads[2][0, :5]], strict=True):
            param.grad = grad.clone()
        optimizer.step()
        adam.step()
        for number, (param, grad) in enumerate(zip(params, grads, strict=True)):
            assert torch.equal(param.grad, grad)
            options = Options(eps=1e-8, rank=min(RANK, *grad.shape), ns_dtype=torch.float64, **shared)
            W, state = references[number]
            references[number] = getattr(reference, name)(W, grad, state, options)
            formulas[number].step(grad.numpy())
            torch.testing.assert_close(param.detach(), references[number][0], rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(param.detach().numpy(), formulas[number].weight, rtol=1e-9, atol=1e-9)
            if name == "ldadam" and own["error_feedback"]:
                error = references[number][1].E
                error = error.mT if grad.shape[0] > grad.shape[1] else error
                torch.testing.assert_close(optimizer.state[param]["error"], error, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(vector, theirs, rtol=1e-12, atol=1e-12)


def test_the_error_is_state_and_no_gradient():
    """Clearing gradients, freeing them and clipping the next ones leave the error as it is."""
    ends = []
    for disturbed in (False, True):
        params = parameters()
        optimizer = made("ldadam", params)
        for step in range(6):
            for param, grad in zip(params, gradients(step), strict=True):
                param.grad = grad.clone() * 100
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            if disturbed:
                errors = [optimizer.state[param]["error"].clone() for param in params]
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                for param, error in zip(params, errors, strict=True):
                    assert torch.equal(optimizer.state[param]["error"], error)
        ends.append([param.detach() for param in params])
    assert all(map(torch.equal, *ends))
    assert all(optimizer.state[param]["error"].any() for param in params[:6])


def test_without_momentum_nothing_of_the_gradients_is_lost():
    """The sum of the gradients is that of their projections and the error."""
    param = nn.Parameter(torch.zeros(12, 7, dtype=torch.float64))
    optimizer = LDAdamW([{"params": [("w", param)], "rank": 2}], betas=(0.0, 0.9))
    total = projected = torch.zeros(12, 7, dtype=torch.float64)
    for step in range(8):
        param.grad = gradients(step)[0]
        optimizer.step()
        state = optimizer.state[param]
        total = total + param.grad
        projected = projected + state["exp_avg"] @ state["basis"].mT  # the momentum is the projected gradient
        torch.testing.assert_close(total, projected + state["error"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ldadam", "cosmos"])
def test_gradients_of_lower_rank_leave_a_basis(name):
    params = parameters()[:3]
    optimizer = made(name, params)
    for step in range(8):
        for param, grad in zip(params, gradients(step), strict=False):
            param.grad = grad[:, :1] @ grad[:1] if step > 2 else grad[:, :2] @ grad[:2]
        if step == 5:
            params[0].grad.zero_()
        optimizer.step()
        for param in params:
            basis = optimizer.state[param]["basis"]
            torch.testing.assert_close(basis.mT @ basis, torch.eye(RANK, dtype=basis.dtype), rtol=0, atol=1e-9)
            assert param.isfinite().all()


def test_orthonormal_columns_go_on_where_there_are_none():
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    toward = torch.linalg.qr(torch.randn(2, 9, 4, generator=generator, dtype=torch.float64))[0]
    exact, upper = torch.linalg.qr(tall)
    exact = exact * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    torch.testing.assert_close(orthonormal_columns(tall, toward=toward), exact, rtol=1e-12, atol=1e-12)
    # A positive semidefinite matrix of rank two, times the columns.
    low = torch.linalg.qr(tall)[0][..., :2]
    found = orthonormal_columns(low @ (low.mT @ toward), toward=toward)
    torch.testing.assert_close(found.mT @ found, torch.eye(4, dtype=found.dtype).expand(2, 4, 4), rtol=0, atol=1e-12)
    assert torch.linalg.matrix_norm(low - found @ (found.mT @ low)).max() < 1e-9
    kept = orthonormal_columns(torch.zeros_like(tall), toward=toward)
    torch.testing.assert_close(kept, toward, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(20, 12), (12, 20), (12, 12)])
def test_state_has_the_size_that_the_pages_say(rows, columns, dtype):
    rank, size = 3, torch.empty((), dtype=dtype).element_size()
    longer, shorter = max(rows, columns), min(rows, columns)
    expected = {
        "ldadam": rows * columns + 2 * longer * rank + shorter * rank,
        "without": 2 * longer * rank + shorter * rank,
        "cosmos": rows * columns + rows * rank + columns * rank + rank**2,
    }
    for name, values in expected.items():
        param = nn.Parameter(torch.zeros(rows, columns, dtype=dtype))
        optimizer = made("cosmos" if name == "cosmos" else "ldadam", [param],
                         **({"error_feedback": False} if name == "without" else {}))  # fmt: skip
        param.grad = torch.ones_like(param)
        optimizer.step()
        held = [value for value in optimizer.state[param].values() if torch.is_tensor(value)]
        assert sum(value.numel() * value.element_size() for value in held) == values * size


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ldadam", {"rho": 2}, r"rho of LDAdamW must be a number in \[0, 1\], got 2"),
        ("ldadam", {"error_feedback": "yes"}, "error_feedback of LDAdamW must be True or False, got 'yes'"),
        ("ldadam", {"subspace": "columns"}, "subspace of LDAdamW must be one of svd, randomized, got 'columns'"),
        ("ldadam", {"betas": (0.9, 1.0)}, "betas of LDAdamW must be two numbers from 0 to below 1"),
        ("cosmos", {"lr_ratio": 0.0}, "lr_ratio of CosmosAdamW must be a number above 0, got 0.0"),
        ("cosmos", {"gamma": -1.0}, "gamma of CosmosAdamW must be a number of at least 0, got -1.0"),
        ("cosmos", {"ns_steps": 0}, "ns_steps of CosmosAdamW must be an integer of at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(name, options, said):
    with pytest.raises(UserError, match=said):
        made(name, parameters(), **options)


def test_a_rank_too_large_is_refused_by_name():
    for made_by in (
        lambda params: LDAdamW([{"params": params, "rank": 6}]),
        lambda params: CosmosAdamW([{"params": params, "rank": 6, "muon": True}]),
    ):
        with pytest.raises(UserError, match=r"rank must be from 1 to 5 for w of shape \(5, 7\), got 6"):
            made_by([("w", nn.Parameter(torch.zeros(5, 7)))])


def test_both_start_from_the_randomized_subspace_too():
    """It is nearly that of the singular vectors, and both then follow the same gradients."""
    for name in ("ldadam", "cosmos"):
        ends = []
        for subspace in ("svd", "randomized"):
            params = parameters()[:3]
            optimizer = made(name, params, subspace=subspace)
            generator = torch.Generator().manual_seed(0)
            for param in params:
                size = min(param.shape)
                left, right = (torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64))[0]
                               for n in param.shape)  # fmt: skip
                param.grad = left * 0.1 ** torch.arange(size, dtype=torch.float64) @ right.mT
            optimizer.step()
            ends.append([optimizer.state[param]["basis"] for param in params])
        for exact, near in zip(*ends, strict=True):
            torch.testing.assert_close(exact @ exact.mT, near @ near.mT, rtol=0, atol=1e-6)
