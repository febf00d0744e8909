"""Measuring single checkpoints against single baselines, for the `evaluate` module."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.trajectory import Trajectory


def checkpoint_of(text: str) -> tuple[Trajectory, int]:
    """The trajectory and the step that `RUN/checkpoint-N`, a folder with one checkpoint, or `user/repo@step-N` name.

    The checkpoints beside it belong to the trajectory, so that changes since the one before can be measured.
    """
    one = Trajectory(text)
    if len(one.steps) != 1:
        raise UserError(f"{text}: must name one checkpoint, holds {len(one.steps)}; add checkpoint-N or @step-N")
    repository, separator, revision = text.partition("@")
    path = Path(text)
    around: str | Path = path.resolve().parent if path.is_dir() else repository
    if path.is_dir() and path.resolve().name != f"checkpoint-{one.steps[0]}":
        return one, one.steps[0]
    if separator and not path.is_dir() and not revision.startswith("step"):
        return one, one.steps[0]
    return Trajectory(around), one.steps[0]


def measure_pairs(
    predictions: Sequence[str], references: Sequence[str], **options: Any
) -> dict[str, list[float | None] | list[dict[str, str]]]:
    """The sixteen of every checkpoint in `predictions` against its baseline in `references`.

    Args:
        predictions, references: as many checkpoints, `RUN/checkpoint-N` or `user/repo@step-N`; a pair has one step.
        options: `metrics`, `preset`, `settings`, `device` and `evaluation_set`, as for `hf_lowrank.measuring.measure`.

    Returns:
        By metric id the model's values in the order given, None where there is none; under `"reasons"` for every
        checkpoint what is said about its missing values, by metric id.

    Raises:
        UserError: numbers or steps differ, a checkpoint cannot be found, or an option is not allowed.
    """
    from hf_lowrank.measuring import measure

    if len(predictions) != len(references):
        raise UserError(f"there must be a reference for each prediction, got {len(predictions)} and {len(references)}")
    wanted = METRICS.select(options.pop("metrics", METRICS.sixteen))
    values: dict[str, list[float | None]] = {metric: [] for metric in wanted}
    reasons: list[dict[str, str]] = []
    for prediction, reference in zip(predictions, references, strict=True):
        (run, step), (base, base_step) = checkpoint_of(prediction), checkpoint_of(reference)
        if step != base_step:
            raise UserError(f"a pair must have one step, {prediction} has {step} and {reference} has {base_step}")
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(run, metrics=wanted, steps=step, baseline=base, output=folder, **options)
        found = {row.metric: row for row in rows if row.scope == "model"}
        said = {}
        for metric in wanted:
            row = found[metric]
            values[metric].append(row.value if row.value == row.value else None)
            if row.value != row.value:
                said[metric] = row.reason or ""
        reasons.append(said)
    return {**values, "reasons": reasons}
