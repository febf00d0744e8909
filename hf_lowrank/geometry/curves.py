"""Curved paths of low loss between two solutions (arXiv 1802.10026)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .directions import Difference
from .engine import Memory, Point, movable, sweep
from .losses import Loss
from .sharding import ProcessGroup, map_over

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bezier:
    """The curve `(1−t)² θ₀ + 2t(1−t) θ_m + t² θ₁` from a model's weights θ₀, over parameters by name."""

    middle: Tensors
    end: Tensors

    def point(self, t: float) -> Point:
        """Where the model moves for the position `t` in [0, 1]."""
        return [(Difference(self.middle), 2 * t * (1 - t)), (Difference(self.end), t * t)]


def train_bezier(
    model: nn.Module,
    end: Tensors,
    batch_loss: Callable[[nn.Module, int], Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    betas: tuple[float, float] = (0.9, 0.99),
) -> Bezier:
    """Trains the middle point of a curve from the model's weights to `end`, by Adam on the loss at random positions.

    The middle point starts halfway between the ends, where the curve is the straight line. Each step draws `t`
    uniformly from (0, 1), moves the model there, and uses `dL/dθ_m = 2t(1−t) · dL/dθ(t)`.

    Args:
        model: θ₀; its weights, gradients and mode are restored, bit for bit, also after an error.
        end: θ₁ by parameter name, with the model's shapes.
        batch_loss: `(model, step) -> scalar`, the differentiable training loss of one step's batch.
        steps: Adam steps; 0 gives the straight line.
        lr: peak learning rate; it decays to 0 along a cosine.
        seed: of the positions.

    Raises:
        ValueError: `end` does not have the model's parameters, or a training loss is NaN or Inf.
    """
    parameters = dict(model.named_parameters())
    differing = parameters.keys() ^ end.keys() or {n for n, p in parameters.items() if p.shape != end[n].shape}
    if differing:
        raise ValueError(f"the models must have the same parameters; {min(differing)} differs")
    last = {name: end[name].detach().to(parameter) for name, parameter in parameters.items()}
    middle = {name: (parameter.detach() + last[name]) / 2 for name, parameter in parameters.items()}
    curve = Bezier(middle, last)
    optimizer = torch.optim.Adam(middle.values(), lr=lr, betas=betas)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    generator = torch.Generator().manual_seed(seed)
    kept = {name: (parameter.grad, parameter.requires_grad) for name, parameter in parameters.items()}
    try:
        with movable(model) as move:
            for step in range(steps):
                t = float(torch.rand((), generator=generator, dtype=torch.float64))
                move(curve.point(t))
                for parameter in parameters.values():
                    parameter.requires_grad_(True).grad = None
                with torch.enable_grad():
                    loss = batch_loss(model, step)
                    if not bool(torch.isfinite(loss)):
                        raise ValueError(f"the curve's loss is {loss.item()} at step {step}; lower its learning rate")
                    loss.backward()
                for name, parameter in parameters.items():
                    middle[name].grad = None if parameter.grad is None else 2 * t * (1 - t) * parameter.grad
                optimizer.step()
                schedule.step()
    finally:
        for name, parameter in parameters.items():
            parameter.grad, requires_grad = kept[name]
            parameter.requires_grad_(requires_grad)
    return curve


def bezier_losses(
    model: nn.Module,
    curve: Bezier,
    loss: Loss,
    positions: Sequence[float],
    *,
    memory: Memory = "copy",
    progress: Callable[[], None] | None = None,
    replicas: ProcessGroup | None = None,
) -> Tensor:
    """Losses (P,) float64 along the curve; the model gets its weights back, bit for bit.

    Args:
        positions: `t` in [0, 1].
        memory, progress, replicas: as for `interpolation_curve`.
    """
    with sweep(model, loss, memory=memory, progress=progress) as loss_at:
        points = [curve.point(float(t)) for t in positions]
        return torch.tensor(map_over(replicas, loss_at, points), dtype=torch.float64)
