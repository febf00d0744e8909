"""One checkpoint under measurement: what the metrics ask for, each thing read or computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.checkpoints import Trajectory
from hf_lowrank.errors import UserError
from hf_lowrank.evaluation_set import EvaluationSet
from hf_lowrank.geometry import Estimate, TokenLoss
from hf_lowrank.measuring.settings import MeasureSettings

UNDEFINED = "undefined: "


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement before it knows its run and step."""

    metric: str
    scope: str = "model"
    value: float = math.nan
    ci_low: float = math.nan
    ci_high: float = math.nan
    n: int | None = None
    baseline: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None

    @classmethod
    def of(cls, metric: str, estimate: Estimate, **rest: Any) -> Row:
        """A row of a random estimate."""
        value, low, high, draws = estimate
        return cls(metric=metric, value=value, ci_low=low, ci_high=high, n=draws, **rest)


class UndefinedError(UserError):
    """The quantity has no meaning for this run; the message says why, and trying again will not help."""


@dataclass
class RunContext:
    """One run under measurement, and the run that it is compared with.

    Attributes:
        trajectory, baseline: the runs; `baseline` None where there is none.
        settings: how to measure.
        evaluation: the given held-out sequences; None: the run's own.
        device: where models are evaluated.
        no_baseline: why there is no baseline.
        tick: called once for each evaluation of a loss.
    """

    trajectory: Trajectory
    settings: MeasureSettings
    device: torch.device
    evaluation: EvaluationSet | None = None
    baseline: Trajectory | None = None
    no_baseline: str | None = None
    tick: Callable[[], None] = lambda: None

    @cached_property
    def sequences(self) -> EvaluationSet:
        """The held-out sequences that losses are measured on."""
        chosen = self.evaluation or self.trajectory.evaluation_set()
        vocabulary = getattr(self.trajectory.config.get_text_config(), "vocab_size", None)
        largest = int(chosen.input_ids.max())
        if vocabulary is not None and largest >= vocabulary:
            raise UserError(
                f"{self.trajectory.path}: the evaluation sequences hold token {largest}, the model has a vocabulary "
                f"of {vocabulary}; they were made with another tokenizer"
            )
        return chosen.first(self.settings.sequences)

    @cached_property
    def loss(self) -> TokenLoss:
        """The loss of the run."""
        chosen = self.sequences
        return TokenLoss(chosen.input_ids, chosen.attention_mask, batch_tokens=self.settings.batch_tokens)

    @property
    def evaluated_on(self) -> dict[str, Any]:
        """What a measurement of a loss stores about its sequences."""
        return {"evaluation": self.sequences.fingerprint[:16], "sequences": len(self.sequences)}


class StepContext:
    """One checkpoint of a run under measurement."""

    def __init__(self, run: RunContext, step: int, earlier: StepContext | None = None) -> None:
        self.run, self.step = run, step
        steps = run.trajectory.steps
        position = steps.index(step)
        self.previous_step = steps[position - 1] if position else None
        if earlier is not None and earlier.step == self.previous_step:
            for name in ("weights", "center"):
                if name in earlier.__dict__:
                    self.__dict__[f"previous_{name}"] = earlier.__dict__[name]

    @property
    def trajectory(self) -> Trajectory:
        return self.run.trajectory

    @property
    def settings(self) -> MeasureSettings:
        return self.run.settings

    @cached_property
    def model(self) -> Any:
        """The checkpoint's model on the device, float32, eval."""
        model: torch.nn.Module = self.trajectory.model(self.step)
        return model.to(self.run.device)

    @cached_property
    def center(self) -> float:
        """The loss of the checkpoint."""
        value = self.run.loss(self.model)
        self.run.tick()
        if not math.isfinite(value):
            raise UserError(f"{self.trajectory.where(self.step)}: the loss is {value}")
        return value

    def release(self) -> None:
        """Drops what only this checkpoint needed; the next one may still want its weights and loss."""
        for name in ("model", "target_values", "previous_weights"):
            self.__dict__.pop(name, None)

    @cached_property
    def target_values(self) -> dict[str, Tensor]:
        """Singular values of every target's dense weight."""
        from hf_lowrank.measuring.spectra import singular_values_of_targets

        return singular_values_of_targets(self.trajectory, self.step)
