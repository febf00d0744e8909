"""Muon, NorMuon, Dion and Dion2 against `reference`, and `reference` against their formulas in numpy, in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_lowrank.optim import Dion2AdamW, DionAdamW, MuonAdamW, NorMuonAdamW, reference
from hf_lowrank.optim.reference import Options, State
from hf_lowrank.optim.subspaces import draw_generator
from tests.optim.matrices import gradients, parameters

METHODS = {"muon": MuonAdamW, "normuon": NorMuonAdamW, "dion": DionAdamW, "dion2": Dion2AdamW}
# Tall, wide, square; two of a kind are stepped in one batch.
STEPS, RANK = 12, 3
OWN = {
    "muon": [
        {"nesterov": False, "adjust_lr_fn": "original", "orthogonaliser": "newton_schulz"},
        {"nesterov": True, "adjust_lr_fn": "match_rms_adamw", "orthogonaliser": "polar_express"},
    ],
    "normuon": [
        {"nesterov": False, "muon_beta2": 0.9, "adjust_lr_fn": "spectral", "orthogonaliser": "polar_express"},
        {"nesterov": True, "adjust_lr_fn": "match_rms_adamw", "orthogonaliser": "newton_schulz"},
    ],
    "dion": [{"adjust_lr_fn": "spectral"}],
    "dion2": [
        {"fraction": 0.25, "adjust_lr_fn": "spectral", "orthogonaliser": "polar_express"},
        {"fraction": 0.6, "adjust_lr_fn": "original", "orthogonaliser": "newton_schulz"},
        {"fraction": 1.0, "adjust_lr_fn": "match_rms_adamw", "orthogonaliser": "polar_express"},
    ],
}
CASES = [(name, own) for name, options in OWN.items() for own in options]
# Typed from the paper (arXiv 2505.16932), not read from the package.
COEFFICIENTS = {
    "newton_schulz": [(3.4445, -4.7750, 2.0315)] * 5,
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
}


def rank_of(shape):
    return min(RANK, *shape)


def drawn(number, shape):
    """Dion's first basis."""
    generator = draw_generator(torch.device("cpu"), 0, number)
    return torch.randn(min(shape), rank_of(shape), generator=generator).double()


def made(name, params, **options):
    groups = [
        {"params": [(f"w{number}", param)], "muon": True, **({"rank": rank_of(param.shape)} if name == "dion" else {})}
        for number, param in enumerate(params)
    ]
    if name != "dion":
        groups = [{"params": [pair for group in groups for pair in group["params"]], "muon": True}]
    return METHODS[name](groups, **options)


# -- the formulas, in numpy


def by_singular_values(X, rule):
    """The polynomials applied to the singular values."""
    left, values, right = np.linalg.svd(X, full_matrices=False)
    values = values / (np.linalg.norm(values) * (1.02 if rule == "polar_express" else 1))
    for a, b, c in COEFFICIENTS[rule]:
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


def factor(rows, columns, rule):
    return {
        "original": max(1, rows / columns) ** 0.5,
        "spectral": (rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
    }[rule]


class InNumpy:
    """One matrix under one method, as the papers write it."""

    def __init__(self, name, W, basis=None, *, lr, weight_decay, momentum, adjust_lr_fn, **own):
        self.name, self.W, self.M, self.V, self.Q = name, W, np.zeros_like(W), 0.0, basis
        self.lr, self.decay, self.mu, self.own = lr, weight_decay, momentum, own
        self.rate = lr * factor(*W.shape, adjust_lr_fn)

    def step(self, G):
        self.W = (1 - self.lr * self.decay) * self.W - self.rate * getattr(self, self.name)(G)

    def muon(self, G):
        self.M = self.mu * self.M + (1 - self.mu) * G
        update = self.mu * self.M + (1 - self.mu) * G if self.own["nesterov"] else self.M
        return by_singular_values(update, self.own["orthogonaliser"])

    def normuon(self, G):
        self.M = self.mu * self.M + G
        U = by_singular_values(self.mu * self.M + G if self.own["nesterov"] else self.M, self.own["orthogonaliser"])
        beta = self.own.get("muon_beta2", 0.95)
        self.V = beta * self.V + (1 - beta) * (U**2).mean(1, keepdims=True)
        row_wise = U / (np.sqrt(self.V) + 1e-8)
        return row_wise * np.linalg.norm(U) / np.linalg.norm(row_wise)

    def dion(self, G):
        wide = G.shape[0] < G.shape[1]
        self.M = self.M + G
        M = self.M.T if wide else self.M
        P, _ = np.linalg.qr(M @ self.Q)
        R = M.T @ P
        M = M - (1 - self.mu) * P @ R.T
        self.M = M.T if wide else M
        self.Q = R / np.linalg.norm(R, axis=0, keepdims=True)
        return self.Q @ P.T if wide else P @ self.Q.T

    def dion2(self, G):
        by_rows = G.shape[0] <= G.shape[1]
        self.M = self.M + G
        M = self.M if by_rows else self.M.T  # a view
        chosen = np.argsort(-np.abs(M).sum(1))[: math.ceil(self.own["fraction"] * len(M))]
        moved = np.zeros_like(M)
        moved[chosen] = by_singular_values(M[chosen], self.own["orthogonaliser"])
        M[chosen] *= self.mu
        return moved if by_rows else moved.T


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("name", "own"), CASES, ids=str)
def test_optimizer_reference_and_formulas_agree(name, own, weight_decay):
    shared = {"lr": 1e-2, "weight_decay": weight_decay, "momentum": 0.9, **own}
    params = parameters()
    vector = nn.Parameter(torch.ones(5, dtype=torch.float64))
    theirs = nn.Parameter(vector.detach().clone())
    optimizer = made(name, params, **({} if name == "dion" else {"ns_dtype": "float32"}), **shared)
    optimizer.add_param_group({"params": [("vector", vector)]})
    adam = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=weight_decay)
    starts = [param.detach().clone() for param in params]
    bases = [drawn(number, W.shape) if name == "dion" else None for number, W in enumerate(starts)]
    references = [(W, State(Q=Q)) for W, Q in zip(starts, bases, strict=True)]
    formulas = [
        InNumpy(name, W.numpy(), None if Q is None else Q.numpy(), **shared)
        for W, Q in zip(starts, bases, strict=True)
    ]
    for step in range(STEPS):
        grads = gradients(step)
        for param, grad in zip([*params, vector, theirs], [*grads, grads[2][0, :5], grads[2][0, :5]], strict=True):
            param.grad = grad.clone()
        optimizer.step()
        adam.step()
        for number, (param, grad) in enumerate(zip(params, grads, strict=True)):
            options = Options(ns_dtype=torch.float64, **shared)
            W, state = references[number]
            references[number] = getattr(reference, name)(W, grad, state, options)
            formulas[number].step(grad.numpy())
            torch.testing.assert_close(param.detach(), references[number][0], rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(param.detach().numpy(), formulas[number].W, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(vector, theirs, rtol=1e-12, atol=1e-12)
