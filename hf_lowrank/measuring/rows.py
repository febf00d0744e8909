"""Results of metrics before they are rows of a run's table."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from hf_lowrank.errors import UserError
from hf_lowrank.geometry import Estimate
from hf_lowrank.runs.measurements import UNDEFINED


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
