"""From the tables of runs to a `Prediction`: `hf-lowrank predict`."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hf_lowrank.downstream.prediction import FEWEST_RUNS, PERMUTATIONS, Prediction, Table, analyse
from hf_lowrank.errors import UserError
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.layout import MEASUREMENTS, PREDICTION, SCORES
from hf_lowrank.runs.measurements import OWN_BASELINE, UNDEFINED, Measurement, read_measurements
from hf_lowrank.runs.scores import Grid, Score, above_chance, read_scores, usable_scores
from hf_lowrank.runs.selection import table_of
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.checksums import sealed
from hf_lowrank.storage.files import whole_file, write_text
from hf_lowrank.storage.parsing import null_non_finite

# The baseline compared with itself: null in its table, but a metric that lacks it would be left out here.
OF_OWN_BASELINE = {"method_barrier": 0.0, "activation_l2": 0.0, "activation_cosine": 1.0, "activation_cka": 1.0}
# Settings of measurements that differ between checkpoints.
VARYING = {"from_step", "to_step", "t", "step"}


def predict(
    runs: Sequence[str | os.PathLike[str]],
    *,
    tasks: Iterable[str] | None = None,
    metrics: str | Iterable[str] | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
) -> Prediction:
    """Tests whether geometry predicts the downstream scores of these runs better than perplexity alone.

    Args:
        runs: run directories with `measurements.jsonl` and `downstream.jsonl`.
        tasks: tasks whose above-chance scores are averaged; None: all that every run was scored on.
        metrics: ids, dimensions or groups of METRICS; None: the sixteen.
        permutations: how many.
        seed: of permutations and bootstrap.
        output: a folder for `prediction.json` and `prediction.png`; None writes nothing.

    Raises:
        UserError: fewer than 8 runs have measurements and scores; the message says what each of the others lacks.
    """
    table = gather(runs, tasks=tasks, metrics=metrics)
    prediction = analyse(table, permutations=permutations, seed=seed)
    if output is not None:
        folder = Path(output)
        write_text(folder / PREDICTION, json.dumps(sealed(_json_content(table, prediction)), indent=1) + "\n")
        from hf_lowrank.downstream.figures import prediction_figure

        with whole_file(folder / "prediction.png") as temporary:
            prediction_figure(table, prediction).savefig(temporary, format="png", dpi=150)
    return prediction


def gather(
    runs: Sequence[str | os.PathLike[str]],
    *,
    tasks: Iterable[str] | None = None,
    metrics: str | Iterable[str] | None = None,
) -> Table:
    """The table of checkpoints, from the measurements and scores of runs.

    Raises:
        UserError: too few runs are complete (the message says what is missing), or they share no step or task.
    """
    chosen = (
        METRICS.sixteen if metrics is None else [m for m in METRICS.select(metrics) if m not in ("loss", "perplexity")]
    )
    measured: dict[str, list[Measurement]] = {}
    scored: dict[str, list[Score]] = {}
    problems: list[str] = []
    for given in runs:
        name = os.fspath(given)
        try:
            folder = Path(name)
            file = folder / MEASUREMENTS if _has_tables(folder) else table_of(Trajectory(name), None, MEASUREMENTS)
        except UserError as error:
            problems.append(str(error))
            continue
        rows = [row for row in read_measurements(file) if row.scope == "model"]
        scores = usable_scores(read_scores(file.with_name(SCORES)), tasks)
        if not any(row.metric == "perplexity" and math.isfinite(row.value) for row in rows):
            problems.append(f"{name} has no perplexity (hf-lowrank measure {name})")
        elif not scores:
            problems.append(f"{name} has no downstream scores above chance level known (hf-lowrank evaluate {name})")
        else:
            measured[name], scored[name] = rows, scores
    if len(measured) < FEWEST_RUNS:
        raise UserError(
            f"prediction needs at least {FEWEST_RUNS} runs with measurements and downstream scores, got "
            f"{len(measured)} of {len(runs)}" + "".join(f"; {problem}" for problem in problems)
        )
    notes = [f"left out: {problem}" for problem in problems]
    target = above_chance(scored, notes)
    columns = {metric: _column(measured, metric, notes) for metric in ["perplexity", *chosen]}
    steps = _steps(list(measured), target, columns, chosen, notes)
    names = list(measured)

    def grid(values: Grid) -> Any:
        return np.array([[values.get(run, {}).get(step, np.nan) for step in steps] for run in names], dtype=float)

    return Table(
        runs=names,
        steps=steps,
        metrics=chosen,
        log_perplexity=np.log(grid(columns["perplexity"])),
        geometry=np.stack([grid(columns[metric]) for metric in chosen], axis=2),
        target=grid(target),
        notes=notes,
    )


def _has_tables(folder: Path) -> bool:
    return (folder / SCORES).is_file() or (folder / MEASUREMENTS).is_file()


def _column(measured: Mapping[str, Sequence[Measurement]], metric: str, notes: list[str]) -> Grid:
    """A metric's values, of those with the most frequent settings."""
    rows = [(run, row) for run, table in measured.items() for row in table if row.metric == metric]
    own = [(run, row) for run, row in rows if metric in OF_OWN_BASELINE and row.reason == UNDEFINED + OWN_BASELINE]
    rows = [(run, row) for run, row in rows if math.isfinite(row.value)]
    counts = Counter(_settings_key(row) for _, row in rows)
    if len(counts) > 1:
        notes.append(f"{metric} was measured with {len(counts)} different settings: the most frequent ones are used")
    common = counts.most_common(1)[0][0] if counts else None
    values: Grid = {}
    for run, row in rows:
        if _settings_key(row) == common:
            values.setdefault(run, {})[row.step] = row.value
    for run, row in own:
        values.setdefault(run, {})[row.step] = OF_OWN_BASELINE[metric]
    return values


def _settings_key(row: Measurement) -> str:
    return json.dumps({k: v for k, v in row.settings.items() if k not in VARYING}, sort_keys=True)


def _steps(
    runs: list[str], target: Grid, columns: Mapping[str, Grid], metrics: Sequence[str], notes: list[str]
) -> list[int]:
    """The steps where all runs have a target, a perplexity, and each metric that at least half of these steps have."""

    def common_steps(grid: Grid) -> set[int]:
        return set.intersection(*(set(grid.get(run, {})) for run in runs))

    every = set.union(*(set(target[run]) for run in runs))
    steps = common_steps(target) & common_steps(columns["perplexity"])
    if not steps:
        raise UserError("the runs share no step with a score and a perplexity; evaluate and measure the same steps")
    complete = {metric: common_steps(columns[metric]) & steps for metric in metrics}
    for metric, present in complete.items():
        if 2 * len(present) >= len(steps) and present != steps:
            notes.append(f"{metric} is null at steps {_listed(steps - present)}: these steps are left out")
    kept = set.intersection(steps, *(present for present in complete.values() if 2 * len(present) >= len(steps)))
    if not kept:
        raise UserError("no step has all metrics in all runs; measure the same metrics at the same steps everywhere")
    if every - steps:
        notes.append(f"steps {_listed(every - steps)} are missing in some runs: left out")
    return sorted(kept)


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(steps)))


def _json_content(table: Table, prediction: Prediction) -> dict[str, Any]:
    content = asdict(prediction)
    for name in ("seen", "predicted_perplexity", "predicted_both"):
        content[name] = np.asarray(content[name]).tolist()
    content["rows"] = [[run, step] for run in table.runs for step in table.steps]
    return null_non_finite(content)
