"""What to measure: the computations behind the metrics, a run's baseline and checkpoints, and what is missing."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hf_lowrank.measuring import landscape, layers
from hf_lowrank.measuring.context import Row, RunContext, StepContext
from hf_lowrank.metrics import METRICS, reference_of
from hf_lowrank.processes.launch import RECOVERABLE_ERRORS
from hf_lowrank.runs.measure_settings import MeasureSettings, Space
from hf_lowrank.runs.measurements import UNDEFINED, Measurement
from hf_lowrank.runs.run_files import section
from hf_lowrank.runs.selection import is_current, is_current_comparison, size_of, steps_of
from hf_lowrank.runs.trajectory import Trajectory

BASELINE_METHOD = "full_rank"

Request = Callable[[RunContext, str], dict[str, Any]]


@dataclass(frozen=True)
class Group:
    """Metrics that come from one computation.

    Attributes:
        compute: (checkpoint, wanted ids) -> rows; an error becomes the reason of null rows.
        request: (run, metric id) -> settings that a row must contain for the metric to count as measured.
        evaluations: how many times it evaluates the loss, for the progress bar.
        costly: whether it is measured at `MeasureSettings.steps` checkpoints only, unless steps are named.
    """

    compute: Callable[[StepContext, set[str]], list[Row]]
    request: Request = lambda run, metric: {}
    evaluations: Callable[[MeasureSettings], int] = lambda settings: 1
    costly: bool = False


def _sequences(run: RunContext, metric: str) -> dict[str, Any]:
    return run.evaluated_on


def _settings(block: str, space: Space | None = None) -> Request:
    return lambda run, metric: run.settings_of(block, space)


def _path(compute: Callable[[StepContext, set[str]], list[Row]], space: Space | None = None) -> Group:
    return Group(compute, _settings("path", space), _path_evaluations, costly=True)


def _path_evaluations(settings: MeasureSettings) -> int:
    return settings.path.points + 5  # an end, and the refinement of the highest point


GROUPS: dict[str, Group] = {
    "loss": Group(landscape.loss_rows, _sequences),
    "weight": Group(layers.weight_rows),
    "update": Group(layers.update_rows),
    "total": Group(layers.total_rows),
    "overlap": Group(layers.overlap_rows, lambda run, metric: run.settings.overlap.request()),
    "activations": Group(layers.activation_rows, _sequences, lambda s: 2),
    "random": Group(
        landscape.random_rows, _settings("random"), lambda s: 2 * s.random.steps * s.random.draws, costly=True
    ),
    "pca": Group(landscape.pca_rows, landscape.pca_settings, lambda s: 2 * s.pca.steps * s.pca.count, costly=True),
    "step": _path(landscape.step_rows),
    "method": _path(landscape.method_rows, "dense"),
    "aligned": _path(landscape.aligned_rows, "dense"),
    "curved": Group(
        landscape.curved_rows,
        landscape.curve_settings,
        lambda s: s.curve.steps + s.curve.points + 6 + _path_evaluations(s),
        costly=True,
    ),
    "plane": Group(landscape.plane_rows, _settings("plane"), lambda s: (2 * s.plane.steps + 1) ** 2, costly=True),
    "dimension": Group(layers.dimension_rows, layers.dimension_settings, costly=True),
    "noise": Group(landscape.noise_rows, _settings("noise"), lambda s: 6, costly=True),
    "critical": Group(landscape.critical_rows, landscape.critical_settings, lambda s: 15, costly=True),
    "hessian": Group(
        landscape.hessian_rows,
        _settings("hessian"),
        lambda s: 6 * (s.hessian.iterations + s.hessian.probes),
        costly=True,
    ),
}

Plan = dict[int, dict[str, set[str]]]  # step -> group -> metric ids


class Unit(NamedTuple):
    """Metrics of one checkpoint."""

    run: int  # index among the runs
    step: int
    groups: dict[str, set[str]]  # group -> metric ids


def find_baseline(trajectory: Trajectory, candidates: Sequence[Trajectory]) -> tuple[Trajectory | None, str | None]:
    """The full-rank run of the same size and seed among `candidates`, or why there is none."""
    full = [other for other in candidates if other.run.method == BASELINE_METHOD]
    if not full:
        return None, "no baseline: none of the runs is a full-rank one; name one with --baseline"
    same_size = [other for other in full if size_of(other) == size_of(trajectory)]
    if not same_size:
        return None, f"no baseline: no full-rank run has the size of {trajectory.run.name}"
    same_seed = [other for other in same_size if other.run.seed == trajectory.run.seed]
    if not same_seed:
        seeds = sorted({str(other.run.seed) for other in same_size})
        return None, f"no baseline: no full-rank run has seed {trajectory.run.seed} (there: {', '.join(seeds)})"
    methods = [section(other.run.recipe or {}, "method") for other in same_seed]
    if any(method != methods[0] for method in methods):
        names = ", ".join(other.run.name for other in same_seed)
        return None, (
            f"no baseline: several full-rank runs have seed {trajectory.run.seed} ({names}); name one with --baseline"
        )
    return same_seed[0], None


def plan_run(context: RunContext, wanted: Iterable[str], steps: str | int | Iterable[int] | None) -> Plan:
    """The groups of every step, measured already or not."""
    plan = Plan()
    cheap = steps_of(context.trajectory, steps)
    costly = steps_of(context.trajectory, steps, context.settings.steps)
    for metric in wanted:
        group = METRICS[metric].group
        for step in costly if GROUPS[group].costly else cheap:
            plan.setdefault(step, {}).setdefault(group, set()).add(metric)
    return {step: {name: plan[step][name] for name in GROUPS if name in plan[step]} for step in sorted(plan)}


def missing_units(
    contexts: Sequence[RunContext], plans: Sequence[Plan], known: Sequence[Sequence[Measurement]]
) -> list[Unit]:
    """What the plans of the runs still miss, given the rows of their tables."""
    units: list[Unit] = []
    for index, (context, plan, rows) in enumerate(zip(contexts, plans, known, strict=True)):
        for step, groups in plan.items():
            missing = {name: _missing_metrics(context, step, name, ids, rows) for name, ids in groups.items()}
            missing = {name: ids for name, ids in missing.items() if ids}
            if missing:
                units.append(Unit(index, step, missing))
    return units


def _missing_metrics(
    context: RunContext, step: int, group: str, ids: set[str], rows: Sequence[Measurement]
) -> set[str]:
    """Those of `ids` without a finished model row with these settings; failed rows count as missing."""
    try:
        requests = {metric: {**GROUPS[group].request(context, metric), **reference_of(metric)} for metric in ids}
    except RECOVERABLE_ERRORS:
        return ids  # measuring meets the same error, and it becomes the reason of the rows
    return ids - {
        row.metric
        for row in rows
        if row.step == step and row.scope == "model" and row.metric in ids and not row.failed
        and is_current(row, context.trajectory) and _has_baseline(row, context.baseline)
        and all(row.settings.get(key) == value for key, value in requests[row.metric].items())
    }  # fmt: skip


def _has_baseline(row: Measurement, baseline: Trajectory | None) -> bool:
    """Whether a row compares with `baseline`, or needs no baseline: a run that is its own has nothing to compare."""
    never_compares = row.baseline is None and (row.reason or "").startswith(UNDEFINED)
    return not METRICS[row.metric].needs_baseline or is_current_comparison(row, baseline) or never_compares
