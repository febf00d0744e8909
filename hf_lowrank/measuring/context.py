"""One checkpoint under measurement: what metrics need of it, read or computed once, and the rows that they give."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_lowrank.errors import UserError
from hf_lowrank.geometry import Estimate, TokenLoss, product_singular_values, singular_values
from hf_lowrank.geometry.spectra import principal_vectors
from hf_lowrank.processes.placement import Placement, parameters_of
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.layout import EVALUATION_SET, TOKENIZER
from hf_lowrank.runs.measure_settings import MeasureSettings, Space
from hf_lowrank.runs.measurements import OWN_BASELINE, UNDEFINED
from hf_lowrank.runs.selection import size_of
from hf_lowrank.runs.trajectory import Trajectory

R = TypeVar("R")


class UndefinedError(UserError):
    """The metric has no meaning for this run; the message says why, and measuring again would not help.

    Attributes:
        baseline: the name of the baseline compared with which it has no meaning; None where it has none at all.
    """

    def __init__(self, reason: str, *, baseline: str | None = None) -> None:
        super().__init__(UNDEFINED + reason)
        self.baseline = baseline


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement without its run and step; see `Measurement`."""

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
    def of(cls, metric: str, estimate: Estimate, **rest: Any) -> Self:
        """A row of a random estimate."""
        value, low, high, draws = estimate
        return cls(metric=metric, value=value, ci_low=low, ci_high=high, n=draws, **rest)


def scope_rows(
    metric: str,
    values: Mapping[str, float],
    *,
    kind: str,
    undefined: str,
    remark: str | None = None,
    **rest: Any,
) -> list[Row]:
    """A row for each scope (a target matrix or a layer), then one for the model: the mean of the defined values.

    Args:
        values: by scope; NaN where undefined.
        kind: what a scope is called in remarks.
        undefined: why a scope has no value.
        remark: added to the reason of every row.
        rest: `settings` and `baseline` of the rows.
    """
    finite = [value for value in values.values() if math.isfinite(value)]
    rows = []
    for scope, value in [*values.items(), ("model", sum(finite) / len(finite) if finite else math.nan)]:
        reason = None
        if not math.isfinite(value):
            reason = UNDEFINED + undefined + (f" in every {kind}" if scope == "model" else "")
        elif scope == "model" and len(finite) < len(values):
            reason = f"mean over the {len(finite)} of {len(values)} {kind}s that have a value"
        remarks = "; ".join(text for text in (reason, remark) if text) or None
        rows.append(Row(metric=metric, scope=scope, value=value, reason=remarks, **rest))
    return rows


def first_checkpoint_rows(metrics: Iterable[str]) -> list[Row]:
    """Null rows of metrics that compare with the previous checkpoint, at the first one."""
    reason = UNDEFINED + "the first checkpoint has none before it"
    return [Row(metric=metric, settings={"from_step": None}, reason=reason) for metric in sorted(metrics)]


@dataclass
class RunContext:
    """One run under measurement, and the run that it is compared with.

    Attributes:
        trajectory, baseline: the runs; `baseline` is None where there is none.
        settings: how to measure.
        placement: where models are placed.
        evaluation: the given held-out sequences; None: the run's own.
        no_baseline: why there is no baseline.
        tick: called after each evaluation of a loss.
    """

    trajectory: Trajectory
    settings: MeasureSettings
    placement: Placement
    evaluation: EvaluationSet | None = None
    baseline: Trajectory | None = None
    no_baseline: str | None = None
    tick: Callable[[], None] = lambda: None

    @cached_property
    def _all_sequences(self) -> EvaluationSet:
        chosen = self.evaluation or self.trajectory.evaluation_set()
        vocabulary = getattr(self.trajectory.config.get_text_config(), "vocab_size", None)
        largest = int(chosen.input_ids.max())
        if vocabulary is not None and largest >= vocabulary:
            raise UserError(
                f"{self.trajectory.path}: the evaluation sequences hold token {largest}, the model has a vocabulary "
                f"of {vocabulary}; they were made with another tokenizer"
            )
        return chosen

    @cached_property
    def sequences(self) -> EvaluationSet:
        """The held-out sequences on which losses are measured."""
        return self._all_sequences.first(self.settings.sequences)

    @cached_property
    def other_sequences(self) -> EvaluationSet:
        """The held-out sequences on which no loss is measured."""
        every, count = self._all_sequences, len(self.sequences)
        return EvaluationSet(every.input_ids[count:], every.attention_mask[count:])

    @cached_property
    def loss(self) -> TokenLoss:
        """The loss on the run's sequences."""
        return self.token_loss(self.settings.batch_tokens)

    def token_loss(self, batch_tokens: int) -> TokenLoss:
        """`loss`, with batches of about so many tokens."""
        ids, mask = self.sequences.input_ids, self.sequences.attention_mask
        return TokenLoss(ids, mask, batch_tokens=batch_tokens, shards=self.placement.shards)

    def finite_loss(self, model: torch.nn.Module, checkpoint: str) -> float:
        """The model's loss.

        Raises:
            UserError: it is not finite; the message names the checkpoint.
        """
        value = self.loss(model)
        self.tick()
        if not math.isfinite(value):
            raise UserError(f"{checkpoint}: the loss is {value}")
        return value

    @property
    def evaluated_on(self) -> dict[str, Any]:
        """What rows about a loss record of its sequences."""
        return {"evaluation": self.sequences.fingerprint[:16], "sequences": len(self.sequences)}

    @cached_property
    def space(self) -> Space:
        """Whose weights are moved: the dense ones, or those of the model as it is stored. A plain model is dense."""
        wanted = "dense" if self.trajectory.in_eight_bits else self.settings.space  # codes cannot be moved
        exact = wanted == "dense" and self.trajectory.dense_weight_kind == "exact"
        return "dense" if exact or not self.trajectory.adapted else "parameters"

    def settings_of(self, block: str, space: Space | None = None) -> dict[str, Any]:
        """What rows record of a block of settings, of the space of the weights (None: the run's), and of the
        sequences."""
        return {**getattr(self.settings, block).request(), "space": space or self.space, **self.evaluated_on}

    @property
    def sweep(self) -> dict[str, Any]:
        """Options of every function that evaluates the loss at perturbed weights."""
        return {"memory": self.settings.memory, "progress": self.tick, "replicas": self.placement.replicas}


@lru_cache(maxsize=256)
def _comparable_files(trajectory: Trajectory) -> dict[str, str | None]:
    """Fingerprints of the run's evaluation set and tokenizer, None where it has none."""
    sequences, tokenizer = trajectory.extra(EVALUATION_SET), trajectory.extra(f"{TOKENIZER}/tokenizer.json")
    return {
        "evaluation set": None if sequences is None else trajectory.evaluation_set().fingerprint,
        "tokenizer": None if tokenizer is None else hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
    }


class StepContext:
    """One checkpoint of a run under measurement.

    Args:
        earlier: the checkpoint measured before this one; its weights and loss are reused if it is the previous one.
        vectors_wanted: how many singular vectors of every target to keep with its singular values.
    """

    def __init__(self, run: RunContext, step: int, earlier: Self | None = None, *, vectors_wanted: int = 0) -> None:
        self.run, self.step, self.vectors_wanted = run, step, vectors_wanted
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
        """The checkpoint's model in the space of the run, placed, in float32 and eval mode."""
        return self._model_of(self.step)

    def _model_of(self, step: int) -> Any:
        return self.run.placement.model(self.trajectory, step, dense=self.run.space == "dense")

    def weights_of(self, step: int) -> dict[str, Tensor]:
        """The parameters of another checkpoint in the space of the run, by name."""
        return self.run.placement.weights(self.trajectory, step, dense=self.run.space == "dense")

    @cached_property
    def center(self) -> float:
        return self.run.finite_loss(self.model, self.trajectory.where(self.step))

    @cached_property
    def previous_weights(self) -> dict[str, Tensor]:
        return self.weights_of(self.previous_step)

    @cached_property
    def previous_center(self) -> float:
        return self.run.finite_loss(self._model_of(self.previous_step), self.trajectory.where(self.previous_step))

    def check_dense(self) -> None:
        """Raises UndefinedError where the layers have no dense weights that compute the same."""
        if self.trajectory.dense_weight_kind != "exact":
            raise UndefinedError("the layers are not linear and have no dense weights to interpolate")

    @cached_property
    def dense_model(self) -> Any:
        """The checkpoint as the plain architecture with dense weights, placed."""
        self.check_dense()
        if self.run.space == "dense":
            return self.model
        return self.run.placement.model(self.trajectory, self.step, dense=True)

    def baseline_for_comparison(self) -> Trajectory:
        """The baseline, once a comparison with it is known to be meaningful.

        Raises:
            UndefinedError: the run is the baseline itself.
            UserError: there is no baseline, it has no checkpoint of this step, or its sequences, tokenizer or shape
                differ; the message names both.
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
        fingerprints = [_comparable_files(trajectory) for trajectory in (ours, base)]
        # With sequences given by the user, those of the runs do not matter.
        for name in ("evaluation set", "tokenizer") if self.run.evaluation is None else ("tokenizer",):
            one, other = (known[name] for known in fingerprints)
            if one and other and one != other:
                raise UserError(
                    f"{ours.run.name} and its baseline {base.run.name} have different {name}s: "
                    f"{one[:12]} and {other[:12]}"
                )
        return base

    @cached_property
    def baseline_model(self) -> Any:
        """The baseline's model of this step, placed; with dense weights where it has them."""
        base = self.baseline_for_comparison()
        return self.run.placement.model(base, self.step, dense=base.dense_weight_kind == "exact")

    @property
    def dense_baseline_model(self) -> Any:
        """`baseline_model`, which must have dense weights."""
        base = self.baseline_for_comparison()
        if base.dense_weight_kind != "exact":
            name = base.run.name
            raise UndefinedError(f"the baseline {name} has no dense weights to interpolate", baseline=name)
        return self.baseline_model

    @cached_property
    def baseline_center(self) -> float:
        base = self.baseline_for_comparison()
        return self.run.finite_loss(self.baseline_model, base.where(self.step))

    def forget_models(self) -> None:
        """Drops the models, so that they are loaded anew."""
        for name in ("model", "dense_model", "baseline_model"):
            self.__dict__.pop(name, None)
        self.run.placement.free_memory()

    def release(self, *, keep_weights: bool = False) -> None:
        """Drops everything but what the next checkpoint may reuse: the loss, and the weights with `keep_weights`."""
        if keep_weights and "model" in self.__dict__:
            self.kept_weights = parameters_of(self.model)
        for name in list(self.__dict__):
            if name not in ("run", "step", "previous_step", "center", "kept_weights", "vectors_wanted"):
                del self.__dict__[name]
        self.run.placement.free_memory()

    def map_targets(self, work: Callable[[str], R]) -> dict[str, R]:
        """The results of work on every target, by its name; threads or processes split them."""
        targets = self.trajectory.targets
        return dict(zip(targets, self.run.placement.map(work, targets), strict=True))

    @cached_property
    def target_values(self) -> dict[str, Tensor]:
        """Singular values (K,) float64 of every target's dense weight; PCA directions reuse the decompositions."""
        run, step, count = self.trajectory, self.step, self.vectors_wanted

        def decompose(name: str) -> tuple[Tensor, ...]:
            factors = run.low_rank_factors(step, name)
            if factors is not None:
                return (product_singular_values(*factors),)
            weight = run.dense_weight(step, name)
            return principal_vectors(weight, count) if count else (singular_values(weight),)

        found = self.map_targets(decompose)
        self._vectors = {name: (uv[0], uv[1]) for name, (_, *uv) in found.items() if uv}
        return {name: sigma for name, (sigma, *_) in found.items()}

    def target_vectors(self, count: int) -> dict[str, tuple[Tensor, Tensor]] | None:
        """(u, v) of the dense model's target weights by parameter name, where they have been computed."""
        if not self._vectors or self.vectors_wanted < count:
            return None
        transposed = {name for name, module in self.model.named_modules() if isinstance(module, Conv1D)}
        return {f"{name}.weight": (v, u) if name in transposed else (u, v) for name, (u, v) in self._vectors.items()}
