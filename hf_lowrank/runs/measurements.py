"""The table of measurements: JSON lines, appended whole, read again after any accident."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_lowrank.storage.checksums import sealed, unsealed
from hf_lowrank.errors import UserError
from hf_lowrank.storage.tables import append_lines, read_rows, row_of

FILE_NAME = "measurements.jsonl"
# How reasons begin where the quantity has no meaning, as against one that could not be had.
UNDEFINED = "undefined: "
OWN_BASELINE = "the run is its own baseline"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row.

    Attributes:
        run, method, seed: which run, as it says itself.
        step: optimizer step of the checkpoint (of the later one for a pair).
        metric: id in METRICS.
        scope: "model", or the dotted path of a layer or target module.
        value: NaN (null in the file) where the quantity has no meaning or could not be had; `reason` says why.
        ci_low, ci_high: 95 % interval; NaN where there is none.
        n: number of independent draws behind the value; None for what is not random.
        baseline: the baseline's run name, for metrics that compare with one.
        settings: what defines the number beside the checkpoint.
        reason: why there is no value; a remark ("surrogate: …") beside one.
        checkpoint, baseline_checkpoint: fingerprints of what was measured and of what it was compared with
            (`Trajectory.fingerprint`), so that no other run of their names is taken for them; None where unknown.
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
        """What a later row must share with an earlier one to replace it."""
        settings = json.dumps(self.settings, sort_keys=True)
        return (self.run, self.method, self.seed, self.step, self.metric, self.scope, self.baseline, settings)

    @property
    def failed(self) -> bool:
        """Whether the value could not be had, though it may be another time."""
        return not math.isfinite(self.value) and not (self.reason or "").startswith(UNDEFINED)

    def to_line(self) -> str:
        """The row as a line of JSON with its checksum and a newline; numbers that are not finite become null."""
        row = asdict(self)
        for name in NUMBERS:
            if not math.isfinite(row[name]):
                row[name] = None
        return json.dumps(sealed(row), ensure_ascii=False, allow_nan=False) + "\n"


# Null in the file where they are not a number here.
NUMBERS = ("value", "ci_low", "ci_high")


def append_measurements(path: str | os.PathLike[str], rows: Iterable[Measurement]) -> None:
    """Appends rows in one write and syncs them; cuts off a torn last line that a killed process left.

    Raises:
        UserError: the file cannot be written (no space, no permission), or its end is damaged.
    """
    try:
        append_lines(Path(path), (row.to_line() for row in rows))
    except OSError as error:
        raise UserError(f"{path}: measurements cannot be written: {error}") from None


def read_measurements(path: str | os.PathLike[str]) -> list[Measurement]:
    """The rows of a `measurements.jsonl` (or of a run directory's), the last of each key, in file order.

    A missing file has no rows; a torn last line is dropped, and so are failures that a later row made good.

    Raises:
        UserError: a line is no measurement; the message names its number.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    if not file.exists():
        return []
    rows: dict[tuple[Any, ...], Measurement] = {}
    for row in read_rows(file, _parse, "measurement", "measure"):
        rows.pop(row.key, None)
        rows[row.key] = row
    return _without_mended(list(rows.values()))


def _without_mended(rows: list[Measurement]) -> list[Measurement]:
    """The rows without those failures after which the same measurement came out."""
    later: dict[tuple[Any, ...], list[Measurement]] = {}
    kept = []
    for row in reversed(rows):
        place = (row.run, row.method, row.seed, row.step, row.metric, row.scope)
        after = later.setdefault(place, [])
        if not (row.failed and any(row.settings.items() <= other.settings.items() for other in after)):
            kept.append(row)
            after.append(row)
    return kept[::-1]


def _parse(entry: dict[str, Any]) -> Measurement:
    content = unsealed(entry)
    row = row_of(Measurement, {k: v for k, v in content.items() if not (k in NUMBERS and v is None)})
    if row.step < 0:
        raise ValueError(f"step must not be negative, got {row.step}")
    return row
