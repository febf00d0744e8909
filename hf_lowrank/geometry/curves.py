"""Curved paths of low loss between two solutions (arXiv 1802.10026)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bezier:
    """The quadratic Bézier curve `(1−t)² θ₀ + 2t(1−t) θ_m + t² θ₁`, over named tensors."""

    start: Tensors
    middle: Tensors
    end: Tensors

    def at(self, t: float, name: str) -> Tensor:
        """One tensor at the position `t` in [0, 1]; the end points are returned exactly."""
        if t in (0.0, 1.0):
            return self.start[name] if t == 0.0 else self.end[name]
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t * t
        return a * self.start[name] + b * self.middle[name] + c * self.end[name]


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
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    last = {name: end[name].detach().to(start[name]) for name in start}
    middle = {name: (start[name] + last[name]) / 2 for name in start}
    curve = Bezier(start, middle, last)
    generator = torch.Generator().manual_seed(seed)
    training, kept = model.training, {name: (p.grad, p.requires_grad) for name, p in parameters.items()}
    model.eval()
    optimizer = torch.optim.Adam(list(middle.values()), lr=lr, betas=betas)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for step in range(steps):
            t = float(torch.rand((), generator=generator, dtype=torch.float64))
            _move(parameters, curve, t)
            for parameter in parameters.values():
                parameter.grad = None
            with torch.enable_grad():
                loss = batch_loss(model, step)
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss on the curve became {float(loss)} at step {step}; lower its learning rate")
            loss.backward()
            for name, parameter in parameters.items():
                grad = parameter.grad
                middle[name].grad = torch.zeros_like(middle[name]) if grad is None else 2 * t * (1 - t) * grad
            optimizer.step()
            schedule.step()
    finally:
        _move(parameters, curve, 0.0)
        for name, parameter in parameters.items():
            parameter.grad, requires_grad = kept[name]
            parameter.requires_grad_(requires_grad)
        model.train(training)
    for tensor in middle.values():
        tensor.grad = None
    return curve


@torch.no_grad()
def bezier_losses(
    model: nn.Module, curve: Bezier, loss: Callable[[nn.Module], float], positions: Sequence[float]
) -> Tensor:
    """Losses (P,) float64 along the curve; the model gets its weights back, bit for bit."""
    parameters = dict(model.named_parameters())
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    training = model.training
    model.eval()
    losses = []
    try:
        for t in positions:
            _move(parameters, curve, float(t))
            losses.append(float(loss(model)))
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(originals[name])
        model.train(training)
    return torch.tensor(losses, dtype=torch.float64)


@torch.no_grad()
def _move(parameters: Mapping[str, Tensor], curve: Bezier, t: float) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(curve.at(t, name))
