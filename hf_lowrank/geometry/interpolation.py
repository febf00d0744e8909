"""The loss on the straight line between two models, and the barrier on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .directions import Difference
from .engine import Memory, movable
from .losses import Loss
from .team import Team, each


def path_grid(points: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Positions from `low` ≤ 0 to `high` ≥ 1 that hold 0 and 1 exactly, `points` of them strictly between 0 and 1."""
    if points < 1 or low > 0 or high < 1:
        raise ValueError(f"a path needs points ≥ 1, low ≤ 0 and high ≥ 1, got {points}, {low} and {high}")
    step = 1 / (points + 1)
    inside = torch.arange(0, points + 2, dtype=torch.float64) / (points + 1)
    below = -torch.arange(1, int(round(-low / step, 6)) + 1, dtype=torch.float64).flip(0) * step
    above = 1 + torch.arange(1, int(round((high - 1) / step, 6)) + 1, dtype=torch.float64) * step
    return torch.cat([below, inside, above])


def interpolation_curve(
    model: nn.Module,
    end: nn.Module | Mapping[str, Tensor],
    loss: Loss,
    *,
    positions: Tensor | Sequence[float],
    ends: tuple[float, float] | None = None,
    memory: Memory = "copy",
    progress: Callable[[], None] | None = None,
    replicas: Team | None = None,
) -> Tensor:
    """Losses (P,) float64 at `(1−t) θ₀ + t θ₁` for positions `t`; values outside [0, 1] extrapolate.

    Args:
        model: θ₀, float32; comes back bit-equal.
        end: θ₁, a model or its parameters by name; tied parameters are named once, as `named_parameters` does.
        loss: `loss(model) -> float`.
        positions: `t`, any order.
        ends: losses at 0 and 1 if known already; they are not evaluated again.
        memory, progress: as for `line_curve`.
        replicas: processes with the same models, which divide the positions among them; all call this.

    Raises:
        ValueError: parameters of the two differ in name or shape; the message names one.
    """
    tensors = dict(end.named_parameters()) if isinstance(end, nn.Module) else end
    here = dict(model.named_parameters())
    for name, parameter in here.items():
        if name not in tensors:
            raise ValueError(f"the models must have the same parameters; {name} is missing in the second")
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"the models must have the same parameters; {name} is {tuple(parameter.shape)} "
                f"in the first and {tuple(tensors[name].shape)} in the second"
            )
    if isinstance(end, nn.Module) and (extra := sorted(set(tensors) - set(here))):
        raise ValueError(f"the models must have the same parameters; {extra[0]} is missing in the first")
    difference = Difference({name: tensor.detach() for name, tensor in tensors.items()})
    known = {} if ends is None else {0.0: ends[0], 1.0: ends[1]}
    path = torch.as_tensor(positions, dtype=torch.float64).tolist()
    with movable(model, memory=memory) as move:

        def at(t: float) -> float:
            move([(difference, t)] if t else ())
            value = float(loss(model))
            if progress:
                progress()
            return value

        unknown = [t for t in dict.fromkeys(path) if t not in known]
        known.update(zip(unknown, each(at, unknown, replicas), strict=True))
    return torch.tensor([known[t] for t in path], dtype=torch.float64)


def loss_barrier(
    losses: Tensor | Sequence[float],
    positions: Tensor | Sequence[float] | None = None,
    *,
    reference: Literal["mean", "interpolated"] = "mean",
) -> float:
    """`max_{0<t<1} L(t) − ½(L(0) + L(1))`, in nats; 0 or below: no barrier.

    Args:
        losses: along the path, at least one strictly between the end points.
        positions: their `t`, which must hold 0 and 1; None: evenly spaced from 0 to 1.
        reference: `"interpolated"` measures against the line between the end points' losses (arXiv 2110.06296).

    Raises:
        ValueError: an end point or the inside is missing.
    """
    y = torch.as_tensor(losses, dtype=torch.float64)
    count = y.numel()
    t = torch.linspace(0, 1, count, dtype=torch.float64) if positions is None else torch.as_tensor(positions).double()
    inside = (t > 0) & (t < 1)
    if not bool((t == 0).any()) or not bool((t == 1).any()) or not bool(inside.any()):
        raise ValueError("a barrier needs losses at 0, at 1 and at least at one position between")
    start, end = y[t == 0][0], y[t == 1][0]
    expected = (start + end) / 2 if reference == "mean" else (1 - t[inside]) * start + t[inside] * end
    return float((y[inside] - expected).max())
