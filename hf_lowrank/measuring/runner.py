"""Measuring runs: every metric at every checkpoint, as rows of one tidy table.

Rows are `Measurement`s in each run's `measurements.jsonl`. Metrics of matrices or layers have a row for each (its
dotted path is the scope) and one for the model, their mean. The curve of a sweep is kept for pictures: a row for each
offset, of metric `random_curve` (`pca1_curve`, `pcak_curve`, `step_path`, `method_path` …) and scope "model", with the
offset as `settings["t"]`, the mean over directions as value and its 95 % band as interval; apart from `t` its
`settings` are those of the sweep's metric. Each direction of a sweep is a row of metric `random_draw` or
`pca_direction` with its sharpness as value and its losses as `settings["losses"]`; `losses_of_directions` reads them
back. Of rows with the same key (all columns but the numbers, the reason and the
fingerprints) the last one counts.
"""

import logging
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.errors import UserError
from hf_lowrank.measuring.context import Row, RunContext, StepContext
from hf_lowrank.measuring.plan import GROUPS, Unit, find_baseline, missing_units, plan_run
from hf_lowrank.metrics import METRICS, POINTWISE, reference_of
from hf_lowrank.processes.launch import RECOVERABLE_ERRORS, CollectiveError, Launch, error_line, launched_processes
from hf_lowrank.processes.placement import DeviceMap, Placement, RowSharded
from hf_lowrank.processes.work import Progress, SharedTables, run_units
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.layout import MEASUREMENTS
from hf_lowrank.runs.measure_settings import MeasureSettings, resolve_settings
from hf_lowrank.runs.measurements import NO_EQUIVALENT, NOT_DENSE, Measurement, append_measurements, read_measurements
from hf_lowrank.runs.selection import (
    Run,
    check_rows_belong,
    check_separate_tables,
    find_checkpoint,
    open_run,
    open_runs,
    resolve_evaluation_set,
    table_of,
)
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.locks import all_locked

logger = logging.getLogger(__name__)


def measure(
    runs: Run | Sequence[Run],
    *,
    metrics: str | Iterable[str] | None = None,
    steps: str | int | Iterable[int] | None = None,
    baseline: Run | None = None,
    preset: str = "fast",
    settings: MeasureSettings | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    evaluation_set: EvaluationSet | str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    revisions: str | None = None,
    sharded: bool = False,
    progress: bool = False,
) -> list[Measurement]:
    """Measures runs and returns all their rows; skips what has been measured with the same settings.

    Under `accelerate launch` the processes split the checkpoints; a remainder, or a single checkpoint, they measure
    jointly and split its draws, points and matrices. With `sharded` they hold shards of every model. Every process
    returns all rows, and they are those of one process.

    Args:
        runs: run directories, folders of checkpoints, `user/repo` or `user/repo@revision`, or trajectories.
        metrics: ids, dimensions or groups of METRICS, a list or comma-separated; None: loss, perplexity and the
            sixteen; "all": the extras too.
        steps: "all", "last", numbers; None: every checkpoint for cheap metrics, and as many as the settings say for
            those that evaluate the loss along lines.
        baseline: the run to compare with; None: the full-rank run of the same size and seed among `runs`.
        preset: "fast" or "paper".
        settings: overrides of the preset, as a mapping or a YAML file.
        device: where models are evaluated; None: accelerate's choice for this process; "auto": over all accelerators
            of one process, for a model that is larger than one of them.
        evaluation_set: held-out sequences (a safetensors file or its folder, or a text file, which the run's
            tokenizer splits into sequences); None: each run's own.
        output: a folder for the measurements, with a subfolder for each run; None: the run directories.
        revisions: which revisions of a repository are checkpoints, as a pattern such as `"step*"`.
        sharded: shards every model over the processes of the launch (FSDP2), for models that do not fit one device:
            each holds its rows of every parameter. Metrics with gradients and the aligned barrier are null rows then.
        progress: shows evaluations done and time left on stderr.

    Returns:
        All rows of these runs, in file order.

    Raises:
        UserError: a run, metric, step, preset, setting or the evaluation set is unusable (nothing is written), a file
            cannot be written, or a process was lost (finished rows are saved). A metric that fails for one checkpoint
            is a null row with the reason.
    """
    wanted = METRICS.select(metrics)
    chosen = settings if isinstance(settings, MeasureSettings) else resolve_settings(preset, settings)
    trajectories = open_runs(runs, "measure", revisions)
    named = None if baseline is None else open_run(baseline, revisions)
    launch, placement = _launch(device, sharded, chosen)
    contexts = []
    for trajectory in trajectories:
        other, no_baseline = (named, None) if named is not None else find_baseline(trajectory, trajectories)
        evaluation = resolve_evaluation_set(evaluation_set, trajectory)
        contexts.append(RunContext(trajectory, chosen, placement, evaluation, other, no_baseline))
    plans = [plan_run(context, wanted, steps) for context in contexts]
    files = [table_of(trajectory, output, MEASUREMENTS) for trajectory in trajectories]
    check_separate_tables(trajectories, files)
    tables = SharedTables(launch, files, read_measurements, append_measurements)
    compares = any(METRICS[metric].needs_baseline for metric in wanted)
    with all_locked([file.parent for file in files], "measure"):
        tables.merge()
        known = [read_measurements(file) for file in files]
        for context, file, rows in zip(contexts, files, known, strict=True):
            check_rows_belong(context.trajectory, file, rows, context.baseline if compares else None)
        units = launch.from_first(lambda: missing_units(contexts, plans, known))
        with Progress("eval", progress and launch.is_first) as bar:
            session = _Session(contexts, tables, known, bar)
            run_units(units, session.measure, tables, placement, bar, cost=session.evaluations, activity="measuring")
        if session.unwritable:
            raise next(iter(session.unwritable.values()))
    return tables.rows()


def unmeasured(
    run: Run,
    *,
    metrics: str | Iterable[str] | None = None,
    steps: str | int | Iterable[int] | None = None,
    baseline: Run | None = None,
    preset: str = "fast",
    settings: MeasureSettings | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    evaluation_set: EvaluationSet | str | os.PathLike[str] | None = None,
) -> list[tuple[int, str]]:
    """The (step, metric) pairs that `measure` with these arguments would measure; computes nothing."""
    chosen = settings if isinstance(settings, MeasureSettings) else resolve_settings(preset, settings)
    trajectory = open_run(run)
    context = RunContext(
        trajectory,
        chosen,
        Placement(torch.device("cpu")),
        evaluation=resolve_evaluation_set(evaluation_set, trajectory),
        baseline=None if baseline is None else open_run(baseline),
    )
    rows = read_measurements(table_of(trajectory, None, MEASUREMENTS))
    units = missing_units([context], [plan_run(context, METRICS.select(metrics), steps)], [rows])
    return [(unit.step, metric) for unit in units for ids in unit.groups.values() for metric in sorted(ids)]


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
        checkpoint, the reasons for missing values by metric id; under `"remarks"` those on values: spectra of a
        surrogate, a landscape of the model's own parameters.

    Raises:
        UserError: numbers or steps differ, a checkpoint does not exist, or an option is not allowed.
    """
    if len(predictions) != len(references):
        raise UserError(f"there must be a reference for each prediction, got {len(predictions)} and {len(references)}")
    wanted = METRICS.select(options.pop("metrics", METRICS.sixteen))
    values: dict[str, list[float | None]] = {metric: [] for metric in wanted}
    reasons: list[dict[str, str]] = []
    remarks: list[dict[str, str]] = []
    for prediction, reference in zip(predictions, references, strict=True):
        (run, step), (base, base_step) = checkpoint_of(prediction), checkpoint_of(reference)
        if step != base_step:
            raise UserError(f"a pair must have one step, {prediction} has {step} and {reference} has {base_step}")
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(run, metrics=wanted, steps=step, baseline=base, output=folder, **options)
        found = {row.metric: row for row in rows if row.scope == "model"}
        for metric in wanted:
            values[metric].append(None if math.isnan(found[metric].value) else found[metric].value)
        said = {metric: found[metric].reason or "" for metric in wanted}
        reasons.append({metric: why for metric, why in said.items() if values[metric][-1] is None})
        remarks.append({metric: why for metric, why in said.items() if why and values[metric][-1] is not None})
    return {**values, "reasons": reasons, "remarks": remarks}


def _launch(device: str | torch.device | None, sharded: bool, settings: MeasureSettings) -> tuple[Launch, Placement]:
    """The processes of this launch, and where they place models."""
    if device == "auto":
        if sharded or launched_processes() > 1:
            raise UserError(
                "device='auto' places a model over the accelerators of one process; start one, or shard the model "
                "over several with sharded=True (--sharded) and no device"
            )
        return Launch("cpu"), DeviceMap()
    launch = Launch(device, sharded=sharded)
    if not sharded:
        return launch, Placement(launch.device)
    if settings.memory == "low":
        raise UserError("settings: memory must be 'copy' with sharded=True (--sharded): the copy is sharded as well")
    return launch, RowSharded(launch.device)


@dataclass
class _Session:
    """Runs being measured, each with its table and the rows that it held at the start."""

    contexts: Sequence[RunContext]
    tables: SharedTables[Measurement]
    known: Sequence[Sequence[Measurement]]
    progress: Progress  # counts evaluations of the loss
    unwritable: dict[int, UserError] = field(default_factory=dict)  # by run; nothing more of it is measured

    def evaluations(self, unit: Unit) -> int:
        """How many times a unit evaluates the loss."""
        return sum(GROUPS[name].evaluations(self.contexts[unit.run].settings) for name in unit.groups)

    def measure(self, units: Sequence[Unit], placement: Placement, writes: bool) -> None:
        """Measures units one after the other and appends their rows, if this process writes any."""
        earlier: dict[int, StepContext] = {}
        contexts: dict[int, RunContext] = {}
        for index, step, groups in units:
            if index in self.unwritable:
                continue
            if index not in contexts:
                contexts[index] = replace(self.contexts[index], placement=placement, tick=self.progress.tick)
            context = contexts[index]
            pca = context.settings.pca
            with_vectors = "pca" in groups and pca.basis == "weights" and context.space == "dense"
            at = StepContext(context, step, earlier.get(index), vectors_wanted=pca.count if with_vectors else 0)
            earlier = {index: at}
            part = self.tables.part(self.tables.files[index])
            for name, ids in groups.items():
                label = f"{context.trajectory.run.name} {step} {name}"
                self.progress.start(label, GROUPS[name].evaluations(context.settings))
                rows = self._changed(index, at, [_measurement(at, row) for row in _group_rows(at, name, ids)])
                append = partial(self.tables.append, part, rows if writes else [])
                try:
                    placement.synchronized(append, independent=True)
                except UserError as error:
                    self.unwritable[index] = error
                    break
            at.release(keep_weights="step" in groups)

    def _changed(self, index: int, at: StepContext, rows: Sequence[Measurement]) -> list[Measurement]:
        """The rows that the table lacks, without failures of what it has a value for: the checkpoint, its run or its
        baseline was damaged after that was measured."""
        known = [row for row in self.known[index] if row.step == at.step]
        old = {row.key: row for row in known}
        valued = [row for row in known if row.scope == "model" and not row.failed]

        def has_value(failure: Measurement) -> bool:
            return any(
                (failure.run, failure.metric) == (row.run, row.metric)
                and failure.baseline in (None, row.baseline)
                and failure.settings.items() <= row.settings.items()
                for row in valued
            )

        new = [row for row in rows if row.key not in old or row.to_line() != old[row.key].to_line()]
        kept = [row for row in new if not (row.failed and has_value(row))]
        for reason in dict.fromkeys(row.reason for row in new if row not in kept):
            logger.warning(
                "%s cannot be measured again, its earlier values are kept: %s", at.trajectory.where(at.step), reason
            )
        return kept


def _group_rows(at: StepContext, group: str, ids: set[str]) -> list[Row]:
    """The rows of a group; an error becomes null rows with its reason, and other groups are not affected."""

    def compute() -> list[Row]:
        if at.trajectory.fingerprint(at.step) is None:
            at.trajectory.checked_folder(at.step)  # raises, also for metrics that do not read the damaged file
        return GROUPS[group].compute(at, ids)

    def request(metric: str) -> dict[str, Any]:
        try:
            return GROUPS[group].request(at.run, metric)
        except RECOVERABLE_ERRORS:
            return {}

    try:
        rows = at.run.placement.synchronized(compute)
    except RECOVERABLE_ERRORS as error:
        if isinstance(error, CollectiveError) and error.unexpected:
            at.forget_models()
        own = error.own if isinstance(error, CollectiveError) else error
        rest: dict[str, Any] = {"baseline": getattr(own, "baseline", None), "reason": error_line(error)}
        return [Row(metric=metric, settings=request(metric), **rest) for metric in sorted(ids)]
    return [_explained(at, row) for row in rows]


def _explained(at: StepContext, row: Row) -> Row:
    """The row with the reason of a NaN, and with a remark on a number that is not of dense weights."""
    if row.value != row.value:
        return row if row.reason else replace(row, reason="the value is NaN")
    if row.settings.get("space") != "parameters" or row.metric in POINTWISE:
        return row
    exact = at.trajectory.dense_weight_kind == "exact"
    remark = f"{NOT_DENSE}moves the model's own parameters, as {'the settings ask' if exact else NO_EQUIVALENT}"
    return replace(row, reason=f"{row.reason}; {remark}" if row.reason else remark)


def _measurement(at: StepContext, row: Row) -> Measurement:
    run, base = at.trajectory.run, at.run.baseline
    row = replace(row, settings={**row.settings, **reference_of(row.metric)})
    compares = base is not None and row.baseline == base.run.name and at.step in base.steps
    return Measurement(
        run=run.name,
        method=run.method,
        seed=run.seed,
        step=at.step,
        **asdict(row),
        checkpoint=at.trajectory.fingerprint(at.step),
        baseline_checkpoint=base.fingerprint(at.step) if base is not None and compares else None,
    )
