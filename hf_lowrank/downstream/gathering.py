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

from hf_lowrank.downstream.prediction import PERMUTATIONS, Answer, Prediction, Table, analyse, too_few
from hf_lowrank.downstream.ridge import Array
from hf_lowrank.errors import UserError
from hf_lowrank.formats import join_words
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.layout import MEASUREMENTS, PREDICTION, SCORES
from hf_lowrank.runs.measurements import NOT_DENSE, OWN_BASELINE, UNDEFINED, Measurement, read_measurements
from hf_lowrank.runs.run_files import UNKNOWN, method_by_name
from hf_lowrank.runs.scores import Grid, Score, above_chance, comparable_scores, read_scores
from hf_lowrank.runs.selection import table_of
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.checksums import sealed
from hf_lowrank.storage.files import whole_file, write_text
from hf_lowrank.storage.parsing import null_non_finite

# The baseline compared with itself: null in its table, but a metric that lacks it would be left out here.
OF_OWN_BASELINE = {
    "method_barrier": 0.0, "method_imib": 0.0, "activation_l2": 0.0, "activation_cosine": 1.0, "activation_cka": 1.0,
}  # fmt: skip
# Settings of measurements that differ between checkpoints.
VARYING = {"from_step", "to_step", "t", "step"}


def predict(
    runs: Sequence[str | os.PathLike[str]],
    *,
    methods: Sequence[str] | None = None,
    tasks: Iterable[str] | None = None,
    metrics: str | Iterable[str] | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
) -> Prediction:
    """Tests whether geometry predicts the downstream scores of these runs better than perplexity alone.

    Args:
        runs: run directories with `measurements.jsonl` and `downstream.jsonl`.
        methods: the method of each run, where settings of one are several; None: as their tables say.
        tasks: tasks whose above-chance scores are averaged; None: all that every run was scored on.
        metrics: ids, dimensions or groups of METRICS; None: the sixteen.
        permutations: how many.
        seed: of permutations.
        output: a folder for `prediction.json` and `prediction.png`; None writes nothing.

    Raises:
        UserError: too few methods and too few runs have measurements and scores; the message says what each of the
            others lacks.
    """
    table = gather(runs, methods=methods, tasks=tasks, metrics=metrics)
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
    methods: Sequence[str] | None = None,
    tasks: Iterable[str] | None = None,
    metrics: str | Iterable[str] | None = None,
) -> Table:
    """The table of checkpoints, from the measurements and scores of runs; arguments as in `predict`.

    Raises:
        UserError: too few runs are complete (the message says what is missing), or they share no task.
    """
    chosen = (
        METRICS.sixteen if metrics is None else [m for m in METRICS.select(metrics) if m not in ("loss", "perplexity")]
    )
    tables: dict[str, tuple[list[Measurement], list[Score]]] = {}
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
        tables[name] = rows, read_scores(file.with_name(SCORES))
    comparable, limit = comparable_scores({name: scores for name, (_, scores) in tables.items()}, tasks)
    for name, (rows, _) in tables.items():
        if not any(row.metric == "perplexity" and math.isfinite(row.value) for row in rows):
            problems.append(f"{name} has no perplexity (hf-lowrank measure {name})")
        elif name not in comparable:
            problems.append(f"{name} has no downstream scores above chance level known (hf-lowrank evaluate {name})")
        else:
            measured[name], scored[name] = rows, comparable[name]
    if not measured:
        raise UserError(
            f"prediction needs runs with measurements and downstream scores, got 0 of {len(runs)}" + _joined(problems)
        )
    notes = [f"left out: {problem}" for problem in problems]
    if limit is not None:
        notes.append(f"scores are those of the first {limit} items of each task")
    notes += _not_dense(measured, chosen)
    target = above_chance(scored, notes)
    columns = {metric: _column(measured, metric, notes) for metric in ["perplexity", *chosen]}
    checkpoints = _checkpoints(target, columns, chosen, notes)
    names = list(dict.fromkeys(run for run, _ in checkpoints))
    known = {} if methods is None else dict(zip([os.fspath(run) for run in runs], methods, strict=True))
    method_of_run = [known.get(name) or _method(name, measured[name][0]) for name in names]
    titles = list(dict.fromkeys(method_of_run))

    def column(values: Grid) -> Array:
        return np.array([values.get(run, {}).get(step, np.nan) for run, step in checkpoints], dtype=float)

    table = Table(
        methods=titles,
        runs=names,
        metrics=chosen,
        method_R=np.array([titles.index(method) for method in method_of_run], dtype=np.int64),
        run_N=np.array([names.index(run) for run, _ in checkpoints], dtype=np.int64),
        step_N=np.array([step for _, step in checkpoints], dtype=np.int64),
        log_perplexity_N=np.log(column(columns["perplexity"])),
        geometry_NP=np.stack([column(columns[metric]) for metric in chosen], axis=1),
        target_N=column(target),
        notes=notes,
    )
    if (reason := too_few(method_of_run)) is not None:
        raise UserError(f"{reason}; {len(names)} of {len(runs)} runs can take part" + _joined(problems))
    return table


def _method(run: str, row: Measurement) -> str:
    """A run's method as its table says it. Folders without a recipe may have equal names in different places."""
    return method_by_name(os.path.normpath(run)) if row.method == UNKNOWN else row.method


def _joined(problems: Iterable[str]) -> str:
    return "".join(f"; {problem}" for problem in problems)


def _has_tables(folder: Path) -> bool:
    return (folder / SCORES).is_file() or (folder / MEASUREMENTS).is_file()


def _column(measured: Mapping[str, Sequence[Measurement]], metric: str, notes: list[str]) -> Grid:
    """A metric's values, of those with the most frequent settings."""
    rows = [(run, row) for run, table in measured.items() for row in table if row.metric == metric]
    own = [(run, row) for run, row in rows if metric in OF_OWN_BASELINE and row.reason == UNDEFINED + OWN_BASELINE]
    rows = [(run, row) for run, row in rows if math.isfinite(row.value)]
    rows.sort(key=lambda found: found[1].settings.get("space") != "parameters")  # the last one of a step counts
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


def _not_dense(measured: Mapping[str, Sequence[Measurement]], metrics: Sequence[str]) -> list[str]:
    """Which metrics of which methods have runs whose own parameters alone were moved."""
    found: dict[tuple[str, ...], list[str]] = {}
    for metric in metrics:
        methods: dict[str, None] = {}
        for run, rows in measured.items():
            own = [row for row in rows if row.metric == metric and row.has_value]
            if {row.settings.get("space") for row in own} == {"parameters"}:
                methods[_method(run, own[0])] = None
        if methods:
            found.setdefault(tuple(methods), []).append(metric)
    return [
        f"{NOT_DENSE}{join_words(which)} of {join_words(methods)} move{'s' * (len(which) == 1)} the model's own "
        "parameters, those of the other methods dense weights"
        for methods, which in found.items()
    ]


def _settings_key(row: Measurement) -> str:
    """The settings as one text. A method without dense weights takes part with its own parameters."""
    settings = {key: "dense" if value == "parameters" and key == "space" else value
                for key, value in row.settings.items() if key not in VARYING}  # fmt: skip
    return json.dumps(settings, sort_keys=True)


def _checkpoints(
    target: Grid, columns: Mapping[str, Grid], metrics: Sequence[str], notes: list[str]
) -> list[tuple[str, int]]:
    """The (run, step) pairs with a target, a perplexity, and each metric that at least half of every run's pairs have.

    A metric that some run lacks at most of its checkpoints does not cost the run, but is left out later.
    """
    pairs = {run: sorted(step for step in by_step if step in columns["perplexity"].get(run, {}))
             for run, by_step in target.items()}  # fmt: skip
    for run in [run for run, steps in pairs.items() if not steps]:
        notes.append(f"left out: {run} has no step with both a score and a perplexity")
        del pairs[run]
    if not pairs:
        raise UserError("no run has a step with both a score and a perplexity; evaluate and measure the same steps")
    unmeasured = sorted({step for run, steps in pairs.items() for step in target[run].keys() - set(steps)})
    if unmeasured:
        notes.append(f"left out: some runs have a score but no perplexity at steps {', '.join(map(str, unmeasured))}")
    missing: dict[str, set[tuple[str, int]]] = {}
    for metric in metrics:
        known = {run: [step for step in steps if step in columns[metric].get(run, {})] for run, steps in pairs.items()}
        if all(2 * len(known[run]) >= len(steps) for run, steps in pairs.items()):
            missing[metric] = {(run, step) for run, steps in pairs.items() for step in set(steps) - set(known[run])}
    for metric, lacking in missing.items():
        if lacking:
            steps = ", ".join(map(str, sorted({step for _, step in lacking})))
            notes.append(f"{metric} is null at steps {steps}: these checkpoints are left out")
    lacking = set().union(*missing.values())
    kept = [(run, step) for run, steps in pairs.items() for step in steps if (run, step) not in lacking]
    if not kept:
        raise UserError("no checkpoint has all metrics; measure the same metrics at the same steps")
    return kept


def _json_content(table: Table, prediction: Prediction) -> dict[str, Any]:
    def question(answer: Answer) -> dict[str, Any]:
        content = asdict(answer)
        for name in ("rows", "observed", "predicted_perplexity", "predicted_both"):
            content[name] = getattr(answer, name).tolist()
        content["rows"] = [[table.runs[table.run_N[row]], int(table.step_N[row])] for row in answer.rows]
        return content

    content = {answer.question: question(answer) for answer in prediction.answers}
    return null_non_finite({**content, "methods": list(table.methods), "notes": list(prediction.notes)})
