"""The sharpness of the loss along one direction, as a request that lm-eval can pass to a model."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import nn

from hf_lowrank.errors import UserError
from hf_lowrank.geometry import Gaussian, TokenLoss, line_curve, symmetric_grid, weight_pca_directions, weight_scale
from hf_lowrank.geometry.landscape import sharpness_per_direction
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.measure_settings import resolve_settings

MARK = "hf_lowrank direction "


class Sharpness(float):
    """A model's answer to a `DirectionRequest`; other model classes answer it as text, with a float."""


@dataclass(frozen=True)
class DirectionRequest:
    """One seeded direction and the offsets along it, named like the settings of `measure`.

    Attributes:
        task: the task that makes the request.
        direction: "random" or "pca".
        draw: which draw, or which principal direction, from 0.
        radius, relative, steps, normalize, seed: the grid and the direction.
        sequences: how many held-out sequences, the first ones; None: all.
        batch_tokens: tokens per batch.
    """

    task: str
    direction: str
    draw: int
    radius: float
    relative: bool
    steps: int
    normalize: str
    seed: int
    sequences: int | None
    batch_tokens: int

    def to_text(self) -> str:
        return MARK + json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(**json.loads(text.removeprefix(MARK)))

    @staticmethod
    def is_one(text: str) -> bool:
        """Whether a text that lm-eval passes to a model is such a request."""
        return text.startswith(MARK)


def direction_requests(direction: str, preset: str = "fast") -> list[DirectionRequest]:
    """The directions that `measure` uses with `preset`, one request each.

    Raises:
        UserError: an unknown preset.
    """
    settings = resolve_settings(preset)
    chosen = {"relative": False, "seed": 0, "draws": 1, **getattr(settings, direction).model_dump()}
    request = {
        "task": "lowrank_random_sharpness" if direction == "random" else "lowrank_pca1_sharpness",
        "direction": direction,
        **{name: chosen[name] for name in ("radius", "relative", "steps", "normalize", "seed")},
        "sequences": settings.sequences,
        "batch_tokens": settings.batch_tokens,
    }
    return [DirectionRequest(draw=draw, **request) for draw in range(chosen["draws"])]


def sharpness_along(model: nn.Module, sequences: EvaluationSet, request: DirectionRequest) -> Sharpness:
    """Mean over offsets t > 0 of `½[L(θ+td) + L(θ−td)] − L(θ)` along the requested direction, in nats.

    Raises:
        UserError: the weights are not float32, or the loss at the model itself is not finite.
    """
    chosen = sequences.first(request.sequences)
    loss = TokenLoss(chosen.input_ids, chosen.attention_mask, batch_tokens=request.batch_tokens)
    radius = request.radius * (weight_scale(model) if request.relative else 1.0)
    normalize: Any = request.normalize
    if request.direction == "random":
        directions: list[Any] = [Gaussian(request.seed, request.draw, normalize)]
    else:
        directions = weight_pca_directions(model, request.draw + 1, normalize=normalize)[request.draw :]
    try:
        curve = line_curve(model, loss, directions, symmetric_grid(radius, request.steps))
    except ValueError as error:
        raise UserError(f"{request.task}: {error}") from None
    return Sharpness(float(sharpness_per_direction(curve.losses)[0]))
