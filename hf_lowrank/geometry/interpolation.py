"""The loss on the straight line between two models, and the barrier on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .directions import Difference
from .engine import Memory, sweep
from .losses import Loss
from .process_group import ProcessGroup, map_over


def path_grid(points: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Evenly spaced positions from `low` ≤ 0 to `high` ≥ 1, with exact 0 and 1, `points` of them strictly between."""
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
    replicas: ProcessGroup | None = None,
) -> Tensor:
    """Losses (P,) float64 at `(1−t) θ₀ + t θ₁` for positions `t`; values outside [0, 1] extrapolate.

    Args:
        model: θ₀, float32; every weight gets its original bits back.
        end: θ₁, a model or its parameters by name; tied parameters are named once, as `named_parameters` does.
        loss: `loss(model) -> float`.
        positions: `t`, in any order.
        ends: losses at 0 and 1 if they are known; they are not evaluated again.
        memory, progress: as for `line_curve`.
        replicas: processes with the same models, which split the positions; all of them call this function.

    Raises:
        ValueError: parameters of the two differ in name or shape; the message names one.
    """
    tensors = dict(end.named_parameters()) if isinstance(end, nn.Module) else end
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name not in tensors:
            raise ValueError(f"the models must have the same parameters; {name} is missing in the second")
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"the models must have the same parameters; {name} is {tuple(parameter.shape)} "
                f"in the first and {tuple(tensors[name].shape)} in the second"
            )
    if isinstance(end, nn.Module) and (extra := sorted(set(tensors) - set(parameters))):
        raise ValueError(f"the models must have the same parameters; {extra[0]} is missing in the first")
    difference = Difference({name: tensor.detach() for name, tensor in tensors.items()})
    known = {} if ends is None else {0.0: ends[0], 1.0: ends[1]}
    path = torch.as_tensor(positions, dtype=torch.float64).tolist()
    unknown = [t for t in dict.fromkeys(path) if t not in known]
    points = [[(difference, t)] if t else [] for t in unknown]
    with sweep(model, loss, memory=memory, progress=progress) as loss_at:
        known.update(zip(unknown, map_over(replicas, loss_at, points), strict=True))
    return torch.tensor([known[t] for t in path], dtype=torch.float64)


def loss_barrier(
    losses: Tensor | Sequence[float],
    positions: Tensor | Sequence[float] | None = None,
    *,
    reference: Literal["mean", "interpolated"] = "mean",
) -> float:
    """`max_{0<t<1} L(t) − ½(L(0) + L(1))`, in nats; there is no barrier where it is 0 or below.

    Args:
        losses: along the path, at least one strictly between the end points.
        positions: their `t`, with 0 and 1; None: evenly spaced from 0 to 1.
        reference: what is subtracted; `"interpolated"` is the chord between the end points' losses
            (arXiv 2110.06296) in place of their mean.

    Raises:
        ValueError: an end point or every inner point is missing.
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
