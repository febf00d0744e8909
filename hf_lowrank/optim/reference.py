"""Each method's step of one matrix, in the order of its paper: to read next to it, and the reference of the tests.

No sharding, no batches, no speed. A step takes a weight W (m × n), its gradient G (not zero) and the state that the
last step returned, and returns the new weight and state; it changes nothing in place and works in any float type.

    P (m × r), Q (n × r)   bases of the left and the right side; None for a side that is not projected
    R = Pᵀ G Q             the projected gradient, with moments M and V of its shape
    N = M / (√V + ε)       Adam's direction without bias correction, which is part of η_t
    S                      what APOLLO, or Fira outside the subspace, makes of the gradient
    U                      orthogonalised momentum; Dion's P and Q are bases of the momentum, V of NorMuon is per row
    A, E                   LDAdam's gradient with the error of the last step, and that error
    H, S                   COSMOS's averaged momentum, and the second moment of the gradients inside its basis
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lowrank.optim.orthogonal import NEWTON_SCHULZ, POLAR_EXPRESS

Bases = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class State:
    """What a matrix's steps so far leave behind.

    Attributes:
        step: number of steps made.
        age: number of Adam steps since the moments were zero.
        norm: ‖S‖ of the last step, after the limiter.
        interval: what multiplies the number of steps between refreshes, if it is lazy.
        cosines: of the first vectors of successive bases, absolute, at the last refreshes.
    """

    step: int = 0
    age: int = 0
    P: Tensor | None = None
    Q: Tensor | None = None
    M: Tensor | None = None
    V: Tensor | None = None
    E: Tensor | None = None
    S: Tensor | None = None
    norm: float = math.inf
    interval: int = 1
    cosines: tuple[float, ...] = ()


def leading_singular_vectors(G: Tensor, options: Options) -> Bases:
    """The top r left and right singular vectors of the gradient, for the sides that are projected."""
    left, _, right = torch.linalg.svd(G, full_matrices=False)
    projects_left, projects_right = projected_sides(G.shape[0], G.shape[1], options.proj_type)
    return (
        left[:, : options.rank] if projects_left else None,
        right[: options.rank].mT if projects_right else None,
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of all methods, under the names of the optimizers' arguments.

    Attributes:
        choose_bases: gives the bases at a refresh; the exact ones, or those that an optimizer has drawn.
        stagger_offset: number of steps by which the matrix's refreshes, after the first, come early.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    adam_variant: str = "official"
    rank: int = 128
    update_proj_gap: int = 200
    proj_type: str = "std"
    scale: float = 1.0
    moments: str = "keep"
    choose_bases: Callable[[Tensor, Options], Bases] = leading_singular_vectors
    stagger_offset: int = 0
    lazy: bool = False
    projection_bits: int | None = None
    residual: str = "official"
    norm_growth_limit: float = 1.01
    scale_type: str = "channel"
    state_free_rule: str = "sign"
    state_free_lr_ratio: float = 1.0
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_dtype: torch.dtype = torch.bfloat16
    adjust_lr_fn: str = "match_rms_adamw"
    orthogonaliser: str = "newton_schulz"
    muon_beta2: float = 0.95
    fraction: float = 0.25
    rho: float = 0.908
    error_feedback: bool = True
    lr_ratio: float = 0.1
    gamma: float = 0.2


# The methods


def galore(W: Tensor, G: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """GaLore (arXiv 2403.03507): `W ← W − η_t · scale · lift(N)`."""
    state = refresh(G, state, options)
    R = project(G, state)
    N, lr, state = adam(R, state, options)
    return apply(W, lr * options.scale * lift(N, state), options), state


def q_galore(W: Tensor, G: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """Q-GaLore (arXiv 2407.08296): GaLore with bases in four bits, refreshed at a lazy interval."""
    return galore(W, G, state, replace(options, projection_bits=4, lazy=True))


def fira(W: Tensor, G: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """Fira (arXiv 2410.01623): `W ← W − η_t (scale · lift(N) + S)`, `S = (G − G_sub) · φ`."""
    state = refresh(G, state, options)
    R = project(G, state)
    N, lr, state = adam(R, state, options)
    G_sub = lift(R, state) * (options.scale if options.residual == "official" else 1.0)
    S, state = limit_growth((G - G_sub) * channel_scales(N, R, state), state, options)
    return apply(W, lr * (options.scale * lift(N, state) + S), options), state


def apollo(W: Tensor, G: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """APOLLO (arXiv 2412.05270): `W ← W − η_t S`, `S = √scale · φ G`; APOLLO-Mini has one φ per matrix."""
    state = refresh(G, state, options)
    R = project(G, state)
    N, lr, state = adam(R, state, options)
    per_tensor = options.scale_type == "tensor"
    phi = N.norm() / (R.norm() + 1e-8) if per_tensor else channel_scales(N, R, state)
    S, state = limit_growth(math.sqrt(options.scale) * phi * G, state, options)
    return apply(W, lr * S, options), state


def frugal(W: Tensor, G: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """FRUGAL (arXiv 2411.07837): `W ← W − η_t · scale · lift(N) − η · ratio · rule(G − lift(R))`."""
    state = refresh(G, state, options)
    R = project(G, state)
    N, lr, state = adam(R, state, options)
    outside = options.lr * options.state_free_lr_ratio * state_free_rule(G - lift(R, state), options)
    return apply(W, lr * options.scale * lift(N, state) + outside, options), state


def frugal_block(W: Tensor, G: Tensor, state: State, options: Options, *, chosen: bool) -> tuple[Tensor, State]:
    """FRUGAL with `subspace="blocks"`: until the next refresh a chosen parameter gets Adam, another only the rule."""
    if is_due(state, options):
        state = replace(state, age=0, M=torch.zeros_like(G), V=torch.zeros_like(G))
    if chosen:
        N, lr, state = adam(G, state, options)
        return apply(W, lr * N, options), state
    outside = options.lr * options.state_free_lr_ratio * state_free_rule(G, options)
    return apply(W, outside, options), replace(state, step=state.step + 1)


def muon(W: Tensor, G: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """Muon as in `torch.optim.Muon` (arXiv 2502.16982): `W ← (1 − η·wd) W − η_adjusted · orthogonalise(M)`."""
    M = torch.lerp(torch.zeros_like(G) if state.M is None else state.M, G, 1 - options.momentum)
    update = torch.lerp(G, M, options.momentum) if options.nesterov else M
    return move(W, orthogonalise(update, options), options), replace(state, step=state.step + 1, M=M)


def normuon(W: Tensor, G: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """NorMuon (arXiv 2510.05491): U' = U / (√V + 1e-8), rescaled to ‖U‖, with V the mean squares of U's rows."""
    M = G if state.M is None else options.momentum * state.M + G
    U = orthogonalise(G + options.momentum * M if options.nesterov else M, options)
    squares = U.square().mean(dim=1, keepdim=True)
    V = (1 - options.muon_beta2) * squares + (0.0 if state.V is None else options.muon_beta2 * state.V)
    normalised = U / (V.sqrt() + 1e-8)
    W = move(W, normalised * (U.norm() / normalised.norm()), options)
    return W, replace(state, step=state.step + 1, M=M, V=V)


def dion(W: Tensor, G: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """Dion (arXiv 2504.05295), of the transpose of a matrix with fewer rows than columns; Q₀ comes with the state."""
    assert state.Q is not None
    wide = G.shape[0] < G.shape[1]
    M = (0.0 if state.M is None else state.M) + (G.mT if wide else G)
    P = torch.linalg.qr(M @ state.Q)[0]
    R = M.mT @ P
    M = M - (1 - options.momentum) * P @ R.mT
    Q = R / R.norm(dim=0)
    U = P @ Q.mT
    return move(W, U.mT if wide else U, options), replace(state, step=state.step + 1, M=M, Q=Q)


def dion2(W: Tensor, G: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """Dion2 (arXiv 2512.16928): the largest rows move, or columns of a matrix that has fewer of them."""
    M = (torch.zeros_like(G) if state.M is None else state.M) + G
    dim = 0 if G.shape[0] <= G.shape[1] else 1
    count = math.ceil(options.fraction * G.shape[dim])
    chosen = M.abs().sum(dim=1 - dim).topk(count).indices
    selected = M.index_select(dim, chosen)
    U = torch.zeros_like(G).index_copy(dim, chosen, orthogonalise(selected, options))
    M = M.index_copy(dim, chosen, options.momentum * selected)
    return move(W, U, options), replace(state, step=state.step + 1, M=M)


def ldadam(W: Tensor, G: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """LDAdam (arXiv 2410.16103), of the transpose of a matrix with more rows than columns."""
    tall = G.shape[0] > G.shape[1]
    A = (G.mT if tall else G) + (0.0 if state.E is None else state.E)
    (beta1, beta2), rho, t = options.betas, options.rho, state.step + 1
    if state.P is None or state.M is None or state.V is None:
        P = torch.linalg.svd(A, full_matrices=False)[0][:, : options.rank]
        M, V, drift = torch.zeros_like(P.mT @ A), torch.zeros_like(P.mT @ A), torch.zeros_like(A)
    else:
        B = rho * state.P @ state.M / (1 - beta1 ** (t - 1)) + (1 - rho) * A
        P = torch.linalg.qr(B @ (B.mT @ state.P))[0]
        M, V = rotate(state.M, state.V, P.mT @ state.P, None, t - 1, options)
        drift = state.P @ state.M - P @ M
    R = P.mT @ A
    E = A - P @ R + beta1 / (1 - beta1) * drift if options.error_feedback else None
    M, V = beta1 * M + (1 - beta1) * R, beta2 * V + (1 - beta2) * R.square()
    update = P @ (M / (1 - beta1**t) / ((V / (1 - beta2**t)).sqrt() + options.eps))
    W = (1 - options.lr * options.weight_decay) * W - options.lr * (update.mT if tall else update)
    return W, replace(state, step=t, P=P, M=M, V=V, E=E)


def cosmos(W: Tensor, G: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """COSMOS (arXiv 2502.17410): Adam inside a basis P of the columns' side, orthogonalised momentum outside it."""
    (beta1, beta2), t = options.betas, state.step + 1
    M = G if state.M is None else beta1 * state.M + G
    if state.P is None or state.S is None or state.V is None:
        P = torch.linalg.svd(G, full_matrices=False)[2][: options.rank].mT
        S, V = (1 - beta2) * (G @ P).mT @ (G @ P), (1 - beta2) * (G @ P).square()
    else:
        P = torch.linalg.qr(beta2 * state.P @ state.S + (1 - beta2) * G.mT @ (G @ state.P))[0]
        turn = state.P.mT @ P
        S = beta2 * turn.mT @ state.S @ turn + (1 - beta2) * (G @ P).mT @ (G @ P)
        V = beta2 * state.V + (1 - beta2) * (G @ P).square()
    kappa = (1 - beta1**t) / (1 - beta1)
    H = (G + beta1 * M) / (1 + beta1 * kappa) if options.nesterov else M / kappa
    A = H @ P / ((V / (1 - beta2**t)).sqrt() + options.eps) @ P.mT
    outside, size = H - H @ P @ P.mT, math.sqrt(W.numel())
    D = A
    if outside.norm() > 64 * torch.finfo(H.dtype).eps * H.norm():  # more than rounding error
        U = orthogonalise(outside, options)
        D = A + options.gamma * size * U / U.norm()
    keep = 1 - options.lr * options.weight_decay
    W = keep * W - options.lr * options.lr_ratio * size * D / (D.norm() + options.eps)
    return W, replace(state, step=t, P=P, M=M, V=V, S=S)


# What they share


def projected_sides(rows: int, columns: int, proj_type: str) -> tuple[bool, bool]:
    """Whether the left side and whether the right side of a matrix is projected."""
    left = {"std": rows < columns, "reverse_std": rows >= columns, "left": True, "right": False}
    return (True, True) if proj_type == "full" else (left[proj_type], not left[proj_type])


def is_due(state: State, options: Options) -> bool:
    """Whether a refresh comes before this step."""
    return state.step == 0 or (state.step + options.stagger_offset) % (options.update_proj_gap * state.interval) == 0


def refresh(G: Tensor, state: State, options: Options) -> State:
    """New bases every T steps; the moments are kept, rotated into the new bases, or reset."""
    if not is_due(state, options):
        return state
    P, Q = (in_few_bits(basis, options.projection_bits) for basis in options.choose_bases(G, options))
    M, V, age = state.M, state.V, state.age
    if M is None or V is None or options.moments == "reset":
        M, V, age = torch.zeros_like(project(G, State(P=P, Q=Q))), torch.zeros_like(project(G, State(P=P, Q=Q))), 0
    elif options.moments == "rotate":
        left = None if P is None or state.P is None else P.mT @ state.P
        right = None if Q is None or state.Q is None else state.Q.mT @ Q
        M, V = rotate(M, V, left, right, age, options)
    interval, cosines = settling(state, P, Q) if options.lazy else (1, ())
    return replace(state, P=P, Q=Q, M=M, V=V, age=age, interval=interval, cosines=cosines)


def in_few_bits(basis: Tensor | None, bits: int | None) -> Tensor | None:
    """A basis as Q-GaLore stores it: row-major groups of 256 values `scale · (code − zero)`, zero not clipped."""
    if basis is None or bits is None:
        return basis
    groups, most = [], 2**bits - 1
    for group in basis.flatten().split(256):
        scale = max(float(group.max() - group.min()), 1e-5) / most
        zero = torch.round(-group.min() / scale)
        codes = (torch.round(group / scale) + zero).clamp(0, most)
        groups.append(scale * (codes - zero))
    return torch.cat(groups).view(basis.shape)


def in_eight_bits(W: Tensor, noise: Tensor) -> Tensor:
    """A weight as Q-GaLore stores it: groups of 256 values with float32 scales, each rounded up or down at random.

    Args:
        noise: of W's shape, uniform from 0 to below 1.
    """
    groups = []
    for group, drawn in zip(W.flatten().split(256), noise.flatten().split(256), strict=True):
        scale = torch.tensor(max(float(group.max() - group.min()), 1e-5) / 255, dtype=torch.float32).to(group.dtype)
        zero = (-group.min() / scale).float().to(group.dtype)
        codes = torch.floor(group / scale + zero + drawn).clamp(0, 255)
        groups.append(scale * (codes - zero))
    return torch.cat(groups).view(W.shape)


def settling(state: State, P: Tensor | None, Q: Tensor | None) -> tuple[int, tuple[float, ...]]:
    """Q-GaLore's lazy interval (arXiv 2407.08296): doubled while the last five cosines average at least 0.4."""
    old, new = (state.P, P) if Q is None else (state.Q, Q)
    if old is None or new is None:
        return 1, ()
    cosine = old[:, 0] @ new[:, 0] / (old[:, 0].norm() * new[:, 0].norm())
    cosines = (*state.cosines, abs(float(cosine)))[-5:]
    settled = len(cosines) == 5 and sum(cosines) / 5 >= 0.4
    return state.interval * (2 if settled else 1), cosines


def rotate(
    M: Tensor, V: Tensor, left: Tensor | None, right: Tensor | None, age: int, options: Options
) -> tuple[Tensor, Tensor]:
    """The moments in a new basis by LDAdam's rule (arXiv 2410.16103): variances turn with the squared rotation."""
    seen, seen_squares = (1 - beta**age for beta in options.betas)
    means, variances = M / seen, V / seen_squares - (M / seen).square()
    if left is not None:
        means, variances = left @ means, left.square() @ variances
    if right is not None:
        means, variances = means @ right, variances @ right.square()
    return seen * means, seen_squares * (variances + means.square()).abs()


def project(G: Tensor, state: State) -> Tensor:
    """`R = Pᵀ G Q`."""
    G = G if state.P is None else state.P.mT @ G
    return G if state.Q is None else G @ state.Q


def lift(R: Tensor, state: State) -> Tensor:
    """`P R Qᵀ`."""
    R = R if state.P is None else state.P @ R
    return R if state.Q is None else R @ state.Q.mT


def adam(R: Tensor, state: State, options: Options) -> tuple[Tensor, float, State]:
    """N, the bias-corrected learning rate η_t, and the state with the new moments.

    The official packages add ε before the bias correction; `torch.optim.AdamW` adds it after.
    """
    assert state.M is not None
    assert state.V is not None
    (beta1, beta2), t = options.betas, state.age + 1
    M = beta1 * state.M + (1 - beta1) * R
    V = beta2 * state.V + (1 - beta2) * R.square()
    eps = options.eps * (1.0 if options.adam_variant == "official" else math.sqrt(1 - beta2**t))
    N = M / (V.sqrt() + eps)
    lr = options.lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
    return N, lr, replace(state, step=state.step + 1, age=t, M=M, V=V)


def apply(W: Tensor, update: Tensor, options: Options) -> Tensor:
    """`W − update` with decoupled weight decay: of the updated weight in the official packages, before it in torch."""
    keep = 1 - options.lr * options.weight_decay
    return keep * (W - update) if options.adam_variant == "official" else keep * W - update


def channel_scales(N: Tensor, R: Tensor, state: State) -> Tensor:
    """`φ_i = ‖N_i‖ / (‖R_i‖ + 1e-8)`, per row of W if its right side is projected, else per column."""
    dim = 1 if state.P is None else 0
    return N.norm(dim=dim, keepdim=True) / (R.norm(dim=dim, keepdim=True) + 1e-8)


def limit_growth(S: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """Fira's norm-growth limiter: rescales S so that its norm is at most γ times that of the last step.

    A last norm of zero limits nothing (the published rule grows from 1e-8 by one percent per step).
    """
    norm = float(S.norm())
    limit = options.norm_growth_limit * (state.norm + 1e-8) if state.norm else math.inf
    S = S if norm <= limit else S * (limit / norm)
    return S, replace(state, norm=min(norm, limit))


def state_free_rule(G: Tensor, options: Options) -> Tensor:
    """signSGD or SGD."""
    return G.sign() if options.state_free_rule == "sign" else G


def orthogonalise(G: Tensor, options: Options) -> Tensor:
    """G with its singular values brought close to one, by a polynomial of degree five applied `ns_steps` times."""
    polynomials = NEWTON_SCHULZ if options.orthogonaliser == "newton_schulz" else POLAR_EXPRESS
    X = G.to(options.ns_dtype)
    X = X.mT if G.shape[0] > G.shape[1] else X
    X = X / (X.norm().clamp(min=1e-7) * (1.0 if options.orthogonaliser == "newton_schulz" else 1.02))
    for step in range(options.ns_steps):
        a, b, c = polynomials[min(step, len(polynomials) - 1)]
        A = X @ X.mT
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if G.shape[0] > G.shape[1] else X).to(G.dtype)


def move(W: Tensor, U: Tensor, options: Options) -> Tensor:
    """`W ← (1 − η·wd) W − η_adjusted · U`."""
    rows, columns = W.shape
    if options.adjust_lr_fn == "original":
        factor = math.sqrt(max(1, rows / columns))
    elif options.adjust_lr_fn == "spectral":
        factor = math.sqrt(rows / columns)
    else:
        factor = 0.2 * math.sqrt(max(rows, columns))
    return (1 - options.lr * options.weight_decay) * W - options.lr * factor * U
