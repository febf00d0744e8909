"""Measuring single checkpoints against single baselines, for the `evaluate` module."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.selection import find_checkpoint
from hf_lowrank.runs.trajectory import Trajectory


def checkpoint_of(text: str) -> tuple[Trajectory, int]:
    """The trajectory and the step of `RUN/checkpoint-N`, a folder with one checkpoint, or `user/repo@step-N`.

    The trajectory has the run's other checkpoints as well, so that changes since the previous one can be measured.
    """
    found = find_checkpoint(text)
    one = Trajectory(text if Path(text).is_dir() else found.path, revisions=found.revision)
    if len(one.steps) != 1:
        raise UserError(f"{text}: must name one checkpoint, holds {len(one.steps)}; add checkpoint-N or @step-N")
    run: str | Path | None = found.run
    if run is None and not Path(found.path).is_dir() and (found.revision or "step").startswith("step"):
        run = found.path
    return one if run is None else Trajectory(run), one.steps[0]


def measure_pairs(
    predictions: Sequence[str], references: Sequence[str], **options: Any
) -> dict[str, list[float | None] | list[dict[str, str]]]:
    """The sixteen of every checkpoint in `predictions` against its baseline in `references`.

    Args:
        predictions, references: checkpoints, `RUN/checkpoint-N` or `user/repo@step-N`; both of a pair have one step.
        options: `metrics`, `preset`, `settings`, `device` and `evaluation_set`, as for `hf_lowrank.measuring.measure`.

    Returns:
        By metric id the model's values in the given order, None where there is none; under `"reasons"`, for every
        checkpoint, the reasons for missing values by metric id.

    Raises:
        UserError: numbers or steps differ, a checkpoint does not exist, or an option is not allowed.
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
        for metric in wanted:
            values[metric].append(None if math.isnan(found[metric].value) else found[metric].value)
        reasons.append({metric: found[metric].reason or "" for metric in wanted if values[metric][-1] is None})
    return {**values, "reasons": reasons}
