"""`measurements.jsonl` of a run: its row, its reader and its writer.

Of several rows of the same measurement the last one counts, and a failure after which the measurement succeeded is
dropped. Whoever reads the table gets it so.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.metrics import DIRECTIONS, reference_of
from hf_lowrank.runs.layout import MEASUREMENTS
from hf_lowrank.storage.tables import append_rows, line_of, read_table, row_of

# How the reason begins where the quantity is not defined, rather than not available.
UNDEFINED = "undefined: "
OWN_BASELINE = "the run is its own baseline"
# How the remark on a number begins that was measured by moving what the model stores (`space: parameters`).
NOT_DENSE = "not dense: "
NO_EQUIVALENT = "its layers have no dense equivalent"
# What rows of single directions hold among their settings: losses at even offsets, and the largest offset.
LOSSES, REACH = "losses", "reach"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row.

    Attributes:
        run, method, seed: the run, as named by its folder and recipe.
        step: optimizer step of the checkpoint (of the later one for a pair).
        metric: id in METRICS.
        scope: "model", or the dotted path of a layer or target module.
        value: NaN (null in the file) where the quantity is undefined or could not be computed; `reason` says why.
        ci_low, ci_high: 95 % interval; NaN without one.
        n: number of independent draws; None for a deterministic value.
        baseline: the baseline's run name, for metrics that compare with one.
        settings: what defines the number apart from the checkpoint; of a single direction also its losses.
        reason: why there is no value; with a value, a remark ("surrogate: …").
        checkpoint, baseline_checkpoint: fingerprints of the checkpoint and of its baseline (`Trajectory.fingerprint`),
            so that a different run of the same name is not mistaken for it; None where unknown.
    """

    run: str
    method: str
    seed: int | None
    step: int
    metric: str
    scope: str = "model"
    value: float = math.nan
    ci_low: float = math.nan
    ci_high: float = math.nan
    n: int | None = None
    baseline: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    checkpoint: str | None = None
    baseline_checkpoint: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the measurement: a later row with the same key replaces an earlier one."""
        settings = _defining(self.settings, LOSSES, REACH)
        return (self.run, self.method, self.seed, self.step, self.metric, self.scope, self.baseline, settings)

    @property
    def has_value(self) -> bool:
        """Whether the value is a finite number."""
        return math.isfinite(self.value)

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are finite numbers."""
        return math.isfinite(self.ci_low) and math.isfinite(self.ci_high)

    @property
    def failed(self) -> bool:
        """Whether there is no value, although there may be one after another try."""
        return not self.has_value and not (self.reason or "").startswith(UNDEFINED)

    def to_line(self) -> str:
        """The row as a line of JSON with its checksum and a newline."""
        return line_of(self)


def append_measurements(path: str | os.PathLike[str], rows: Iterable[Measurement]) -> None:
    """Appends rows to a table, see `append_rows`."""
    append_rows(path, rows, "measurements")


def read_measurements(path: str | os.PathLike[str]) -> list[Measurement]:
    """The rows that count of a `measurements.jsonl` (or of a run directory's), in file order; none without a file.

    A torn last line and rows by an earlier definition of their metric (`Metric.reference`) are skipped.

    Raises:
        UserError: a line is not a measurement; names its number.
    """
    rows = read_table(path, MEASUREMENTS, _parse, lambda row: row.key, "measurement", "measure")
    return _without_retried([row for row in rows if reference_of(row.metric).items() <= row.settings.items()])


def losses_of_directions(rows: Iterable[Measurement]) -> tuple[list[float], list[list[float]]]:
    """(offsets (G,) ascending, losses (D, G) in nats) of the directions of one sweep.

    Args:
        rows: the rows of metric `random_draw` (or `pca_direction`) of one run, step and settings; others are ignored.

    Raises:
        UserError: there are none, or they are of several sweeps.
    """
    found = [row for row in rows if row.metric in DIRECTIONS.values()]
    sweeps = {(*row.key[:-1], _defining(row.settings, LOSSES, REACH, "direction")) for row in found}
    if len(sweeps) != 1:
        raise UserError(f"rows must be the directions of one sweep, got {len(sweeps)} sweeps; choose a run and a step")
    losses = [row.settings[LOSSES] for row in sorted(found, key=lambda row: row.settings["direction"])]
    half = len(losses[0]) // 2
    offsets = [k * (found[0].settings[REACH] / half) for k in range(-half, half + 1)]
    return offsets, losses


def _defining(settings: Mapping[str, Any], *leave_out: str) -> str:
    return json.dumps({name: value for name, value in settings.items() if name not in leave_out}, sort_keys=True)


def _without_retried(rows: list[Measurement]) -> list[Measurement]:
    """The rows without failures that a later row of the same measurement made good."""
    later: dict[tuple[Any, ...], list[Measurement]] = {}
    kept = []
    for row in reversed(rows):
        after = later.setdefault((row.run, row.method, row.seed, row.step, row.metric, row.scope), [])
        if not (row.failed and any(row.settings.items() <= other.settings.items() for other in after)):
            kept.append(row)
            after.append(row)
    return kept[::-1]


def _parse(entry: object) -> Measurement:
    row = row_of(Measurement, entry)
    if row.step < 0:
        raise ValueError(f"step must not be negative, got {row.step}")
    return row
