"""Measuring runs: every metric at every checkpoint, as rows of one tidy table.

Rows are `Measurement`s in `measurements.jsonl` of each run. Metrics of a matrix or layer have a row for each (its
dotted path is the scope) and one for the model, their mean. A sweep's curve is kept for pictures: a row for each
offset, metric `random_curve` (`pca1_curve`, `pcak_curve`, `step_path`, `method_path`), scope "model", with the
offset as `settings["t"]`, the mean over directions as value and its 95 % band as interval; `settings` without `t`
are those of the metric that the sweep gave. The last row of a key (all columns but the numbers, the reason and the
fingerprints) counts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.errors import UserError
from hf_lowrank.measuring.context import Row, RunContext, StepContext
from hf_lowrank.measuring.groups import GROUPS
from hf_lowrank.measuring.plan import check_apart, check_own, choose_steps, find_baseline, missing_metrics, rows_file
from hf_lowrank.measuring.progress import Progress
from hf_lowrank.measuring.settings import MeasureSettings, resolve_settings
from hf_lowrank.metrics import CURVES, METRICS, Metric
from hf_lowrank.processes.faults import FAULTS, LostProcessError, reason_of
from hf_lowrank.processes.launch import Processes
from hf_lowrank.processes.placement import OneDevice, Replicas, SeveralDevices, Shards
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.measurements import Measurement, append_measurements, read_measurements
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.locks import all_locked

__all__ = [
    "CURVES",
    "METRICS",
    "Measurement",
    "Metric",
    "append_measurements",
    "measure",
    "read_measurements",
    "unmeasured",
]

logger = logging.getLogger(__name__)

Run = str | os.PathLike[str] | Trajectory


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
    """Measures runs and returns their rows, old and new; what is there already with equal settings is not done again.

    Under `accelerate launch` the checkpoints are shared out over the processes; those that do not go up, or a single
    one, they measure together, each some of the draws, points and matrices. With `sharded` each model is divided
    among them. Every process returns all rows, which are those of one process.

    Args:
        runs: run directories, folders of checkpoints, `user/repo` or `user/repo@revision`, or trajectories.
        metrics: ids, dimensions or groups of METRICS, a list or comma-separated; None: loss, perplexity and the
            sixteen; "all": the extras too.
        steps: "all", "last", numbers; None: every checkpoint for the cheap metrics, as many as the settings say for
            those that evaluate losses along lines.
        baseline: the run to compare with; None: the full-rank run of the same size and seed among `runs`.
        preset: "fast" or "paper".
        settings: own settings over the preset's, as a mapping or a YAML file.
        device: where models are evaluated; None: accelerate's choice for this process; "auto": over all accelerators
            of this one process, for a model that is larger than one of them.
        evaluation_set: held-out sequences (safetensors file or its folder, or a text file, which the run's
            tokenizer cuts into sequences); None: each run's own.
        output: a folder for the measurements, one subfolder a run; None: the run directories.
        revisions: which revisions of a repository are checkpoints, as a pattern such as `"step*"`.
        sharded: the processes of the launch hold every model together (FSDP2) in place of sharing out checkpoints, for
            a model that is larger than one device, or than its fellows' room: each has its rows of every parameter.
            Metrics with gradients and the aligned barrier are then null rows.
        progress: shows evaluations done and time left on stderr.

    Returns:
        All rows of these runs, in file order.

    Raises:
        UserError: a run, metric, step, preset, setting or the evaluation set is unusable (nothing is written then),
            or a file cannot be written. A metric that fails for one checkpoint is a null row with the reason. Also
            where processes that hold models together lose one of them: what was measured is written then.
    """
    given = [runs] if isinstance(runs, str | os.PathLike | Trajectory) else list(runs)
    if not given:
        raise UserError("there must be at least one run to measure")
    wanted = METRICS.select(metrics)
    chosen = settings if isinstance(settings, MeasureSettings) else resolve_settings(preset, settings)
    trajectories = [run if isinstance(run, Trajectory) else Trajectory(run, revisions=revisions) for run in given]
    explicit = (
        baseline if isinstance(baseline, Trajectory) or baseline is None else Trajectory(baseline, revisions=revisions)
    )
    processes, placement = _place(device, sharded, chosen)
    contexts = []
    for trajectory in trajectories:
        other, why_not = (explicit, None) if explicit is not None else find_baseline(trajectory, trajectories)
        contexts.append(
            RunContext(
                trajectory,
                chosen,
                placement,
                evaluation=_evaluation(evaluation_set, trajectory),
                baseline=other,
                no_baseline=why_not,
            )
        )
    plans = [_plan(context, wanted, steps) for context in contexts]
    files = [rows_file(context.trajectory, None if output is None else Path(output)) for context in contexts]
    check_apart(trajectories, files)
    with all_locked([file.parent for file in files], "measure"):
        try:
            _measure_all(contexts, plans, files, processes, progress)
        except LostProcessError as error:
            raise UserError(f"measuring together ended: {error}; what was measured is written, start again") from None
    return [row for file in files for row in read_measurements(file)]


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
    """The (step, metric) that `measure` with these arguments would measure in a run; nothing is computed."""
    chosen = settings if isinstance(settings, MeasureSettings) else resolve_settings(preset, settings)
    trajectory = run if isinstance(run, Trajectory) else Trajectory(run)
    other = baseline if isinstance(baseline, Trajectory) or baseline is None else Trajectory(baseline)
    evaluation = _evaluation(evaluation_set, trajectory)
    context = RunContext(trajectory, chosen, OneDevice(torch.device("cpu")), evaluation=evaluation, baseline=other)
    rows = read_measurements(rows_file(trajectory, None))
    return [
        (step, metric)
        for step, groups in _plan(context, METRICS.select(metrics), steps).items()
        for name, ids in groups.items()
        for metric in sorted(_missing(context, step, name, ids, rows))
    ]


def _place(device: str | torch.device | None, sharded: bool, settings: MeasureSettings) -> tuple[Processes, OneDevice]:
    """The processes of this launch, and where they put models."""
    if device == "auto":
        if sharded or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "device='auto' lays a model over the accelerators of one process; start one, or divide the model "
                "among several with sharded=True (--sharded) and no device"
            )
        return Processes("cpu"), SeveralDevices()
    processes = Processes(device, together=sharded)
    if not sharded:
        return processes, OneDevice(processes.device)
    if settings.memory == "low":
        raise UserError("settings: memory must be 'copy' with sharded=True (--sharded): the copy is divided as well")
    return processes, Shards(processes.device)


Plan = dict[int, dict[str, set[str]]]  # step -> group -> metric ids
Unit = tuple[int, int, dict[str, set[str]]]  # number of the run, step, group -> metric ids


def _plan(context: RunContext, wanted: list[str], steps: Any) -> Plan:
    """The groups of every step, whether they are done or not."""
    trajectory, plan = context.trajectory, Plan()
    try:
        cheap = choose_steps(trajectory.steps, steps, "all")
        costly = choose_steps(trajectory.steps, steps, context.settings.steps)
    except UserError as error:
        raise UserError(f"{trajectory.path}: {error}") from None
    for metric in wanted:
        group = METRICS[metric].group
        for step in costly if GROUPS[group].costly else cheap:
            plan.setdefault(step, {}).setdefault(group, set()).add(metric)
    return {step: {name: plan[step][name] for name in GROUPS if name in plan[step]} for step in sorted(plan)}


def _measure_all(
    contexts: list[RunContext],
    plans: list[Plan],
    files: list[Path],
    processes: Processes,
    show: bool,
) -> None:
    processes.merge_parts(files)
    known = [read_measurements(file) for file in files]
    for context, plan, file, rows in zip(contexts, plans, files, known, strict=True):
        wanted = {metric for groups in plan.values() for ids in groups.values() for metric in ids}
        compares = any(METRICS[metric].needs_baseline for metric in wanted)
        check_own(context.trajectory, file, rows, context.baseline if compares else None)
    whole, rest = processes.rounds(processes.of_first(lambda: _work(contexts, plans, known)))
    share = processes.share(whole, lambda unit: 1 + _evaluations(contexts, [unit]))
    total = _evaluations(contexts, share) + _evaluations(contexts, rest) // processes.count
    unwritable: dict[int, UserError] = {}
    with Progress(total, show and processes.first) as bar:
        measure_units = partial(_measure_units, files=files, known=known, unwritable=unwritable, bar=bar)
        measure_units(share, contexts, processes, writes=processes.writes)
        if rest:
            # All wait here for the slowest share, which may take hours; what comes then goes from step to step.
            processes.merge_parts(files)
            with Replicas(processes.device) as together:
                contexts = [replace(context, placement=together) for context in contexts]
                measure_units(rest, contexts, processes, writes=processes.first)
    processes.merge_parts(files)
    if unwritable:
        raise next(iter(unwritable.values()))


def _work(contexts: list[RunContext], plans: list[Plan], known: list[list[Measurement]]) -> list[Unit]:
    """What is not measured yet."""
    work: list[Unit] = []
    for index, (context, plan) in enumerate(zip(contexts, plans, strict=True)):
        for step, groups in plan.items():
            missing = {name: _missing(context, step, name, ids, known[index]) for name, ids in groups.items()}
            missing = {name: ids for name, ids in missing.items() if ids}
            if missing:
                work.append((index, step, missing))
    return work


def _evaluations(contexts: Sequence[RunContext], units: Iterable[Unit]) -> int:
    return sum(GROUPS[name].evaluations(contexts[i].settings) for i, _, groups in units for name in groups)


def _measure_units(
    units: Sequence[Unit],
    contexts: Sequence[RunContext],
    processes: Processes,
    *,
    files: Sequence[Path],
    known: Sequence[list[Measurement]],
    unwritable: dict[int, UserError],
    bar: Progress,
    writes: bool,
) -> None:
    """Measures units one after the other; `unwritable` gets the runs whose rows cannot be written."""
    earlier: dict[int, StepContext] = {}
    for index, step, groups in units:
        if index in unwritable:
            continue
        context = contexts[index]
        context.tick = bar.tick
        at = StepContext(context, step, earlier.get(index))
        if "pca" in groups and context.settings.pca.basis == "weights" and not context.trajectory.adapted:
            at.vectors_wanted = context.settings.pca.count
        earlier = {index: at}
        old = {row.key: row for row in known[index]}
        part = processes.part(files[index])
        for name, ids in groups.items():
            bar.start(f"{context.trajectory.run.name} {step} {name}", GROUPS[name].evaluations(context.settings))
            rows = [_measurement(context, step, row) for row in _rows(at, name, ids)]
            rows = [row for row in rows if row.key not in old or row.to_line() != old[row.key].to_line()]
            rows = _without_lost(rows, known[index], context.trajectory.where(step))
            try:
                context.placement.agreed(partial(append_measurements, part, rows if writes else []), apart=True)
            except UserError as error:
                unwritable[index] = error
                break
        at.release(keep_weights="step" in groups)


def _without_lost(rows: list[Measurement], known: list[Measurement], where: str) -> list[Measurement]:
    """The rows without failures of what was measured before the checkpoint, its run or its baseline was damaged."""
    measured: dict[tuple[str, int, str], list[Measurement]] = {}
    for row in known:
        if row.scope == "model" and not row.failed:
            measured.setdefault((row.run, row.step, row.metric), []).append(row)

    def is_there(failure: Measurement) -> bool:
        return any(
            failure.baseline in (None, row.baseline) and failure.settings.items() <= row.settings.items()
            for row in measured.get((failure.run, failure.step, failure.metric), ())
        )

    lost = [row for row in rows if row.failed and is_there(row)]
    for reason in dict.fromkeys(row.reason for row in lost):
        logger.warning("%s cannot be measured again, what was measured stays: %s", where, reason)
    return [row for row in rows if row not in lost]


def _missing(context: RunContext, step: int, group: str, ids: set[str], rows: list[Measurement]) -> set[str]:
    ours, base = context.trajectory, context.baseline
    try:
        return missing_metrics(ids, step, lambda metric: GROUPS[group].request(context, metric), ours, base, rows)
    except FAULTS:
        return ids  # the same fault becomes the reason of the rows


def _rows(at: StepContext, group: str, ids: set[str]) -> list[Row]:
    """The group's rows; a fault becomes null rows with its reason, and the other groups go on."""
    try:
        rows = at.run.placement.agreed(lambda: _computed(at, group, ids))
    except FAULTS as error:
        if getattr(error, "halfway", False):
            at.forget_models()
        beside = getattr(error, "baseline", None)
        reason = reason_of(error)
        return [Row(metric=m, baseline=beside, settings=_request(at, group, m), reason=reason) for m in sorted(ids)]
    return [row if row.value == row.value or row.reason else _unexplained(row) for row in rows]


def _computed(at: StepContext, group: str, ids: set[str]) -> list[Row]:
    if at.trajectory.fingerprint(at.step) is None:
        at.trajectory.checked_folder(at.step)  # says what is wrong, also where a metric reads nothing of it
    return GROUPS[group].compute(at, ids)


def _request(at: StepContext, group: str, metric: str) -> dict[str, Any]:
    try:
        return GROUPS[group].request(at.run, metric)
    except FAULTS:
        return {}


def _unexplained(row: Row) -> Row:
    return Row(**{**asdict(row), "reason": "the value is not a number"})


def _measurement(context: RunContext, step: int, row: Row) -> Measurement:
    run, base = context.trajectory.run, context.baseline
    beside = base is not None and row.baseline == base.run.name and step in base.steps
    return Measurement(
        run=run.name,
        method=run.method,
        seed=run.seed,
        step=step,
        **asdict(row),
        checkpoint=context.trajectory.fingerprint(step),
        baseline_checkpoint=base.fingerprint(step) if base is not None and beside else None,
    )


def _evaluation(given: EvaluationSet | str | os.PathLike[str] | None, trajectory: Trajectory) -> EvaluationSet | None:
    if given is None or isinstance(given, EvaluationSet):
        return given
    path = Path(given)
    if path.suffix == ".txt":
        from hf_lowrank.measuring.text import evaluation_set_from_text

        return evaluation_set_from_text(path, trajectory)
    return EvaluationSet.load(path)
