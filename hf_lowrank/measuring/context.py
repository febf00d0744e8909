"""One checkpoint under measurement: what the metrics ask for, each thing read or computed once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.errors import UserError
from hf_lowrank.geometry import Estimate, TokenLoss
from hf_lowrank.measuring.settings import MeasureSettings
from hf_lowrank.processes.faults import UndefinedError
from hf_lowrank.processes.placement import OneDevice, parameters_of
from hf_lowrank.runs.evaluation_set import FILE_NAME, EvaluationSet
from hf_lowrank.runs.measurements import OWN_BASELINE
from hf_lowrank.runs.trajectory import Trajectory


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


@dataclass
class RunContext:
    """One run under measurement, and the run that it is compared with.

    Attributes:
        trajectory, baseline: the runs; `baseline` None where there is none.
        settings: how to measure.
        evaluation: the given held-out sequences; None: the run's own.
        placement: where models lie.
        no_baseline: why there is no baseline.
        tick: called once for each evaluation of a loss.
    """

    trajectory: Trajectory
    settings: MeasureSettings
    placement: OneDevice
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
        return self.token_loss(self.settings.batch_tokens)

    def token_loss(self, batch_tokens: int) -> TokenLoss:
        """The loss on the run's sequences, so many tokens at a time."""
        chosen = self.sequences
        return TokenLoss(chosen.input_ids, chosen.attention_mask, batch_tokens=batch_tokens, team=self.placement.team)

    def finite_loss(self, model: torch.nn.Module, where: str) -> float:
        """The model's loss.

        Raises:
            UserError: it is not finite; names `where`.
        """
        value = self.loss(model)
        self.tick()
        if not math.isfinite(value):
            raise UserError(f"{where}: the loss is {value}")
        return value

    @property
    def evaluated_on(self) -> dict[str, Any]:
        """What a measurement of a loss stores about its sequences."""
        return {"evaluation": self.sequences.fingerprint[:16], "sequences": len(self.sequences)}


def size_of(trajectory: Trajectory) -> str:
    """What two runs must share to be compared: the plain architecture's shape, as a string."""
    config = trajectory.config
    base = getattr(config, "base_config", None) or config
    fields = base if isinstance(base, dict) else base.to_dict()
    names = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    )
    return json.dumps({name: fields.get(name) for name in names}, sort_keys=True)


@lru_cache(maxsize=256)
def run_marks(trajectory: Trajectory) -> dict[str, str]:
    """Fingerprints of what comes with a run: its evaluation set and its tokenizer, where they are there."""
    marks = {}
    if trajectory.extra(FILE_NAME) is not None:
        marks["evaluation set"] = trajectory.evaluation_set().fingerprint
    tokenizer = trajectory.extra("tokenizer/tokenizer.json")
    if tokenizer is not None:
        marks["tokenizer"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    return marks


class StepContext:
    """One checkpoint of a run under measurement."""

    def __init__(self, run: RunContext, step: int, earlier: StepContext | None = None) -> None:
        self.run, self.step = run, step
        self.vectors_wanted = 0
        self._vectors: dict[str, tuple[Tensor, Tensor]] = {}
        steps = run.trajectory.steps
        position = steps.index(step)
        self.previous_step: Any = steps[position - 1] if position else None
        if earlier is not None and earlier.step == self.previous_step:
            if "center" in earlier.__dict__:
                self.__dict__["previous_center"] = earlier.center
            if earlier.kept_weights is not None:
                self.__dict__["previous_weights"] = earlier.kept_weights
        self.kept_weights: dict[str, Tensor] | None = None

    @property
    def trajectory(self) -> Trajectory:
        return self.run.trajectory

    @property
    def settings(self) -> MeasureSettings:
        return self.run.settings

    @cached_property
    def model(self) -> Any:
        """The checkpoint's model in its place, float32, eval."""
        return self.run.placement.model(self.trajectory, self.step)

    @cached_property
    def center(self) -> float:
        """The loss of the checkpoint."""
        return self.run.finite_loss(self.model, self.trajectory.where(self.step))

    @cached_property
    def previous_weights(self) -> dict[str, Tensor]:
        """The parameters of the checkpoint before, by name."""
        return self.run.placement.weights(self.trajectory, self.previous_step)

    @cached_property
    def previous_center(self) -> float:
        """The loss of the checkpoint before."""
        model = self.run.placement.model(self.trajectory, self.previous_step)
        return self.run.finite_loss(model, self.trajectory.where(self.previous_step))

    @cached_property
    def dense_model(self) -> Any:
        """The checkpoint as the plain architecture with dense weights, in its place."""
        if self.trajectory.dense_weight_kind != "exact":
            raise UndefinedError("the layers are not linear and have no dense weights to interpolate")
        return self.run.placement.dense_model(self.trajectory, self.step, self.model)

    def baseline_for_comparison(self) -> Trajectory:
        """The baseline, after what would make a comparison meaningless is ruled out.

        Raises:
            UndefinedError: the run is the baseline itself.
            UserError: there is no baseline, it has no checkpoint of this step, or its sequences, tokenizer or shape
                differ; names both.
        """
        ours, base = self.trajectory, self.run.baseline
        if base is None:
            raise UserError(self.run.no_baseline or "no baseline")
        if base is ours or base.path == ours.path:
            raise UndefinedError(OWN_BASELINE)
        if self.step not in base.steps:
            raise UserError(f"baseline {base.run.name} has no checkpoint of step {self.step}; it has {base.steps}")
        if size_of(base) != size_of(ours):
            raise UserError(f"{ours.run.name} and its baseline {base.run.name} have different architectures or sizes")
        marks = [run_marks(trajectory) for trajectory in (ours, base)]
        for name in ("evaluation set", "tokenizer"):
            one, other = (mark.get(name) for mark in marks)
            if one and other and one != other and not (name == "evaluation set" and self.run.evaluation is not None):
                raise UserError(
                    f"{ours.run.name} and its baseline {base.run.name} have different {name}s: "
                    f"{one[:12]} and {other[:12]}"
                )
        return base

    @cached_property
    def plain_baseline_model(self) -> Any:
        """The baseline's model of this step, in its place."""
        return self.run.placement.model(self.baseline_for_comparison(), self.step)

    @cached_property
    def baseline_model(self) -> Any:
        """The baseline's model of this step with dense weights, in its place."""
        base, model = self.baseline_for_comparison(), self.plain_baseline_model
        if base.dense_weight_kind != "exact":
            name = base.run.name
            raise UndefinedError(f"the baseline {name} has no dense weights to interpolate", baseline=name)
        return self.run.placement.dense_model(base, self.step, model)

    @cached_property
    def baseline_center(self) -> float:
        """The loss of the baseline at this step."""
        base = self.baseline_for_comparison()
        return self.run.finite_loss(self.plain_baseline_model, base.where(self.step))

    def forget_models(self) -> None:
        """Drops the models, so that they are loaded anew."""
        for name in ("model", "dense_model", "plain_baseline_model", "baseline_model"):
            self.__dict__.pop(name, None)
        self.run.placement.let_go()

    def release(self, *, keep_weights: bool = False) -> None:
        """Drops what only this checkpoint needed; the next one may still want its weights and loss."""
        if keep_weights and "model" in self.__dict__:
            self.kept_weights = parameters_of(self.model)
        for name in list(self.__dict__):
            if name not in ("run", "step", "previous_step", "center", "kept_weights", "vectors_wanted"):
                del self.__dict__[name]
        self.run.placement.let_go()

    @cached_property
    def target_values(self) -> dict[str, Tensor]:
        """Singular values of every target's dense weight, from the decomposition that the PCA directions use too."""
        from hf_lowrank.measuring.spectra import singular_values_of_targets, vectors_of_targets

        if not self.vectors_wanted:
            return singular_values_of_targets(self.trajectory, self.step, self.run.placement.for_all)
        vectors = vectors_of_targets(self.trajectory, self.step, self.vectors_wanted, self.run.placement.for_all)
        self._vectors = {name: (u.float(), v.float()) for name, (_, u, v) in vectors.items()}
        return {name: sigma for name, (sigma, _, _) in vectors.items()}

    def target_vectors(self, count: int) -> dict[str, tuple[Tensor, Tensor]] | None:
        """(u, v) of the targets' weights by parameter name, where they have been decomposed with vectors."""
        if not self._vectors or self.vectors_wanted < count:
            return None
        known = {}
        parameters = dict(self.model.named_parameters())
        for name, (u, v) in self._vectors.items():
            turned = tuple(parameters[f"{name}.weight"].shape) != (u.shape[0], v.shape[0])
            known[f"{name}.weight"] = (v, u) if turned else (u, v)
        return known
