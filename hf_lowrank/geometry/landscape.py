"""The loss along lines through a model's weights and between two models, and the metrics of its shape.

`loss` is any callable from the model to a number. Offsets `t` around a model are a symmetric grid with an exact 0; the
centre is evaluated once. Shapes: D draws or directions, G offsets.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from hf_lowrank.statistics import Estimate, student_t_quantile, t_interval

from .directions import Difference, Direction, Gaussian, Normalize, weight_pca_directions
from .engine import Memory, sweep
from .losses import Loss
from .sharding import ProcessGroup, full_norms, map_over


@dataclass(frozen=True)
class Curve:
    """Losses (D, G) float64 at `offsets` (G,) along D directions, in the unit of the loss."""

    offsets: Tensor
    losses: Tensor

    @property
    def center(self) -> float:
        """The loss at the model itself."""
        return float(self.losses[0, int((self.offsets == 0).nonzero()[0])])

    def mean(self) -> Tensor:
        """(G,) mean loss over the directions."""
        return self.losses.mean(0)

    def band(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper ends (G,) of the Student-t interval of the mean; NaN for a single direction."""
        count = self.losses.shape[0]
        if count < 2:
            return (torch.full_like(self.mean(), math.nan),) * 2
        half = student_t_quantile((1 + confidence) / 2, count - 1) * self.losses.std(0) / math.sqrt(count)
        return self.mean() - half, self.mean() + half


def symmetric_grid(radius: float, steps: int) -> Tensor:
    """(2·steps + 1,) offsets from −radius to radius, symmetric bit for bit, with 0 exactly in the middle.

    Raises:
        ValueError: the radius is not a positive number or steps is below 1.
    """
    if not (radius > 0 and math.isfinite(radius)) or steps < 1:
        raise ValueError(f"a grid needs a radius above 0 and steps of at least 1, got {radius} and {steps}")
    half = torch.arange(1, steps + 1, dtype=torch.float64) * (radius / steps)
    return torch.cat([-half.flip(0), half.new_zeros(1), half])


def weight_scale(model: nn.Module) -> float:
    """Root-mean-square entry of the parameters with two or more dimensions (all, if there are none)."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parameters = {name: p for name, p in parameters.items() if p.ndim >= 2} or parameters
    squares = sum(norm**2 for norm in full_norms(parameters).values())
    return math.sqrt(squares / sum(p.numel() for p in parameters.values()))


class SweepOptions(TypedDict, total=False):
    """Options of `line_curve` that the curves below pass on."""

    memory: Memory
    center: float | None
    progress: Callable[[], None] | None
    replicas: ProcessGroup | None


def line_curve(
    model: nn.Module,
    loss: Loss,
    directions: Iterable[Direction],
    offsets: Tensor | Sequence[float],
    *,
    memory: Memory = "copy",
    center: float | None = None,
    progress: Callable[[], None] | None = None,
    replicas: ProcessGroup | None = None,
) -> Curve:
    """Losses at `θ + t d` for every direction and offset; every weight gets its original bits back.

    Args:
        model: parameters in float32.
        directions: D of them, used one after another.
        offsets: symmetric, with 0 exactly.
        memory: `"copy"` or `"low"`, see `movable`.
        center: the loss at the model itself if it is known; it is not evaluated again.
        progress: called after each evaluation.
        replicas: processes with the same model, which split the directions; all of them call this function.

    Raises:
        ValueError: the grid is not symmetric around an exact 0, there is no direction, or the loss at `θ` itself is
            not finite.
    """
    grid = torch.as_tensor(offsets, dtype=torch.float64).sort().values
    if not bool((grid == -grid.flip(0)).all()) or not bool((grid == 0).any()):
        raise ValueError(f"offsets must be symmetric and hold 0, got {grid.tolist()}")
    with sweep(model, loss, memory=memory, progress=progress) as loss_at:
        center = loss_at(()) if center is None else center
        if not math.isfinite(center):
            raise ValueError(f"the loss at the weights themselves is {center}; nothing can be measured around it")

        def along(direction: Direction) -> list[float]:
            return [loss_at([(direction, t)]) if t else center for t in grid.tolist()]

        rows = map_over(replicas, along, directions)
    if not rows:
        raise ValueError("there must be at least one direction")
    return Curve(grid, torch.tensor(rows, dtype=torch.float64))


def random_curve(
    model: nn.Module,
    loss: Loss,
    *,
    offsets: Tensor | Sequence[float],
    draws: int,
    seed: int = 0,
    normalize: Normalize = "none",
    **options: Unpack[SweepOptions],
) -> Curve:
    """Losses along `draws` random directions `d ~ N(0, I)` over all parameters (arXiv 2605.13652).

    Each draw has its own generator, keyed by seed, draw and parameter name, so the numbers do not depend on the device
    or the number of draws. Offsets are in units of the weights (for `normalize="none"`, the standard deviation of the
    change of each weight). Other arguments and errors as for `line_curve`.
    """
    return line_curve(model, loss, (Gaussian(seed, draw, normalize) for draw in range(draws)), offsets, **options)


def pca_curve(
    model: nn.Module,
    loss: Loss,
    *,
    offsets: Tensor | Sequence[float],
    count: int = 1,
    normalize: Normalize = "none",
    directions: Sequence[Direction] | None = None,
    **options: Unpack[SweepOptions],
) -> Curve:
    """Losses along the top `count` PCA directions of the weights, or along `directions` if given.

    See `weight_pca_directions` and `trajectory_pca_directions`. Other arguments and errors as for `line_curve`.
    """
    chosen = weight_pca_directions(model, count, normalize=normalize) if directions is None else directions[:count]
    return line_curve(model, loss, chosen, offsets, **options)


def plane(
    model: nn.Module,
    loss: Loss,
    first: Direction,
    second: Direction,
    *,
    x_offsets: Tensor | Sequence[float],
    y_offsets: Tensor | Sequence[float],
    memory: Memory = "copy",
    progress: Callable[[], None] | None = None,
    replicas: ProcessGroup | None = None,
) -> Tensor:
    """Losses (Y, X) float64 at `θ + x d₁ + y d₂`, a two-dimensional landscape (arXiv 1712.09913).

    Other arguments as for `line_curve`; `replicas` split the points.
    """
    xs = torch.as_tensor(x_offsets, dtype=torch.float64).tolist()
    ys = torch.as_tensor(y_offsets, dtype=torch.float64).tolist()
    points = [((first, x), (second, y)) for y in ys for x in xs]
    with sweep(model, loss, memory=memory, progress=progress) as loss_at:
        losses = map_over(replicas, loss_at, points)
    return torch.tensor(losses, dtype=torch.float64).reshape(len(ys), len(xs))


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
        positions: `t`, in any order.
        ends: losses at 0 and 1 if they are known; they are not evaluated again.
        memory, progress, replicas: as for `line_curve`; `replicas` split the positions.

    Raises:
        ValueError: parameters of the two differ in name or shape, or `end` has others too; the message names them.
    """
    tensors = dict(end.named_parameters()) if isinstance(end, nn.Module) else end
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name not in tensors:
            raise ValueError(f"the models must have the same parameters; {name} is missing in the second")
        if tensors[name].shape != parameter.shape:
            shapes = f"{tuple(parameter.shape)} in the first and {tuple(tensors[name].shape)} in the second"
            raise ValueError(f"the models must have the same parameters; {name} is {shapes}")
    if extra := [name for name in tensors if name not in parameters]:
        raise ValueError(
            f"the models must have the same parameters; missing in the first: {', '.join(extra[:4])}"
            + (f" and {len(extra) - 4} more" if len(extra) > 4 else "")
        )
    difference = Difference({name: tensor.detach() for name, tensor in tensors.items()})
    known = {} if ends is None else {0.0: ends[0], 1.0: ends[1]}
    path = torch.as_tensor(positions, dtype=torch.float64).tolist()
    unknown = [t for t in dict.fromkeys(path) if t not in known]
    points = [[(difference, t)] if t else [] for t in unknown]
    with sweep(model, loss, memory=memory, progress=progress) as loss_at:
        known.update(zip(unknown, map_over(replicas, loss_at, points), strict=True))
    return torch.tensor([known[t] for t in path], dtype=torch.float64)


def expected_sharpness(losses: Tensor | Sequence[float]) -> float:
    """Mean over offsets `t > 0` of `½[L(θ+td) + L(θ−td)] − L(θ)`, from losses on a symmetric grid with its centre.

    Args:
        losses: (G,) or (D, G), G odd, at ascending offsets. Several directions are averaged.

    Returns:
        Nats (the unit of the loss). Higher is sharper; negative where the loss around the model is lower on average.
    """
    x = torch.as_tensor(losses, dtype=torch.float64)
    return float(sharpness_per_direction(x.reshape(-1, x.shape[-1])).mean())


def sharpness_per_direction(losses_DG: Tensor) -> Tensor:
    """(D,) the sharpness along each direction."""
    count = losses_DG.shape[-1]
    if count < 3 or count % 2 == 0:
        raise ValueError(f"losses must be on a symmetric grid with its centre, got {count} of them")
    center = losses_DG[..., count // 2, None]
    # The term of t = 0 is 0: the mean is over the (G − 1)/2 offsets above 0.
    return (losses_DG - center).sum(-1) / (count - 1)


def random_sharpness(curve: Curve) -> Estimate:
    """Metric `random_sharpness` with the Student-t interval over its draws."""
    return interval_of_draws(sharpness_per_direction(curve.losses))


def random_variance(curve: Curve) -> Estimate:
    """Metric `random_variance`: variance over draws of `L(θ+td)`, averaged over the whole grid (0 included).

    In squared units of the loss; the interval is a delete-one jackknife on the logarithm.
    """
    if curve.losses.shape[0] < 2:
        return Estimate(math.nan, math.nan, math.nan, curve.losses.shape[0])
    return jackknife_interval(lambda losses: float(losses.var(0).mean()), curve.losses)


def loss_barrier(losses: Tensor | Sequence[float], positions: Tensor | Sequence[float] | None = None) -> float:
    """`max_{0≤t≤1} L(t) − [(1−t) L(0) + t L(1)]`, the highest rise above the chord (arXiv 2110.06296).

    Args:
        losses: along the path, at least one strictly between the end points.
        positions: their `t`, with 0 and 1; None: evenly spaced from 0 to 1.

    Returns:
        Nats (the unit of the loss): 0 on a path without a hill, never negative; NaN or Inf if a loss on the path is.

    Raises:
        ValueError: an end point or every inner point is missing.
    """
    return float(_rises(*_on_path(losses, positions)).max())


def imib(losses: Tensor | Sequence[float], positions: Tensor | Sequence[float] | None = None) -> float:
    """`max_{0<t<1} L(t) − ½ (L(0) + L(1))`, what arXiv 2605.13652 calls a barrier.

    Often positive on a descent without a hill, and larger the closer an inner point is to the end with the higher
    loss: compare only equal grids. Arguments and errors as for `loss_barrier`.
    """
    y = _on_path(losses, positions)[1]
    return float(y[1:-1].max() - (y[0] + y[-1]) / 2)


def refined_path(
    losses_at: Callable[[Sequence[float]], Tensor], positions: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Positions and losses along a path, with up to four more positions around the highest rise above the chord.

    First the intervals next to the highest point are halved, or next to both ends where no inner point is above the
    chord. Then follows the vertex of the parabola through the highest point and its neighbours, or the ends are
    approached once more. For smooth hills that are at least two intervals wide the barrier is then exact to about
    0.1 %.

    Args:
        losses_at: (positions) -> losses; called up to three times, always with new positions.
        positions: ascending, with 0 and 1 and at least one between.

    Returns:
        Ascending positions and their losses, float64, `positions` among them.
    """
    t = torch.as_tensor(positions, dtype=torch.float64)
    y = torch.as_tensor(losses_at(t.tolist()), dtype=torch.float64)
    for choose in (_middles, _vertex):
        if more := choose(*_on_path(y, t)):
            t, order = torch.cat([t, t.new_tensor(more)]).sort()
            y = torch.cat([y, torch.as_tensor(losses_at(more)).to(y)])[order]
    return t, y


def _on_path(losses: Tensor | Sequence[float], positions: Tensor | Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Positions from 0 to 1, ascending, and their losses."""
    y = torch.as_tensor(losses, dtype=torch.float64)
    count = y.numel()
    t = torch.linspace(0, 1, count, dtype=torch.float64) if positions is None else torch.as_tensor(positions).double()
    if not bool((t == 0).any()) or not bool((t == 1).any()) or not bool(((t > 0) & (t < 1)).any()):
        raise ValueError("a barrier needs losses at 0, at 1 and at least at one position between")
    t, order = t.sort()
    inside = (t >= 0) & (t <= 1)
    return t[inside], y[order][inside]


def _rises(t: Tensor, y: Tensor) -> Tensor:
    """Losses above the chord; exactly 0 at both ends if the losses there are finite."""
    rises = y - ((1 - t) * y[0] + t * y[-1])
    rises[[0, -1]] = torch.where(y[[0, -1]].isfinite(), 0.0, math.nan).to(rises)
    return rises


def _middles(t: Tensor, y: Tensor) -> list[float]:
    """The middles of the intervals next to the highest point, or to both ends if no inner point is above the chord."""
    rises = _rises(t, y)
    if not bool(rises.isfinite().all()):
        return []
    top, last = int(rises.argmax()), len(t) - 1
    intervals = (top - 1, top) if 0 < top < last else sorted({0, last - 1})
    return [float(t[i] + t[i + 1]) / 2 for i in intervals]


def _vertex(t: Tensor, y: Tensor) -> list[float]:
    """The vertex of the parabola through the highest point and its neighbours; at an end, as `_middles`."""
    rises = _rises(t, y)
    top = int(rises.argmax())
    if not bool(rises.isfinite().all()) or not 0 < top < len(t) - 1:
        return _middles(t, y)
    (a, b, c), (low, high, right) = t[top - 1 : top + 2].tolist(), rises[top - 1 : top + 2].tolist()
    left, after = (b - a) * (high - right), (c - b) * (high - low)
    if not left + after > 0:
        return []
    found = round(b - ((b - a) * left - (c - b) * after) / (2 * (left + after)), 9)
    return [found] if a < found < c and found != b else []


def interval_of_draws(draws: Sequence[float] | Tensor) -> Estimate:
    """Mean of independent draws, summed by torch, with its interval of Student's t; one draw has no interval."""
    x = torch.as_tensor(draws, dtype=torch.float64).flatten()
    if x.numel() == 0:
        raise ValueError("draws must hold at least one value")
    mean = float(x.mean())
    if x.numel() == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    return t_interval(mean, float(x.std()) / math.sqrt(x.numel()), x.numel())


def jackknife_interval(statistic: Callable[[Tensor], float], draws_D: Tensor, confidence: float = 0.95) -> Estimate:
    """A positive statistic of D draws (first dimension) with a delete-one jackknife interval on its logarithm.

    The logarithm keeps the interval of a variance positive and near its nominal coverage. Fewer than three draws,
    or a statistic that is not positive, give no interval.
    """
    count = draws_D.shape[0]
    value = statistic(draws_D)
    if count < 3 or not value > 0 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, count)
    keep = ~torch.eye(count, dtype=torch.bool)
    return log_jackknife(value, [statistic(draws_D[rows]) for rows in keep], confidence)


def log_jackknife(value: float, left_out: Sequence[float], confidence: float = 0.95) -> Estimate:
    """`value` with the interval that its values without each draw give its logarithm; none unless all are positive."""
    without, count = torch.tensor(left_out, dtype=torch.float64), len(left_out)
    if not value > 0 or not bool((without > 0).all()):
        return Estimate(value, math.nan, math.nan, count)
    logs = without.log()
    error = math.sqrt((count - 1) / count * float((logs - logs.mean()).square().sum()))
    factor = math.exp(min(student_t_quantile((1 + confidence) / 2, count - 1) * error, 700.0))
    return Estimate(value, value / factor, value * factor, count)
