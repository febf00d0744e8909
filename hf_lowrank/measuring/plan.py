"""What is to be measured: runs, their baselines, checkpoints, and what of it is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.measuring.context import size_of
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.measurements import FILE_NAME, UNDEFINED, Measurement
from hf_lowrank.runs.trajectory import Trajectory

BASELINE_METHOD = "full_rank"


def choose_steps(available: Sequence[int], wanted: str | int | Iterable[int] | None, count: int | str) -> list[int]:
    """The checkpoints that `wanted` names: None takes `count` of them evenly spread (the last always, the first only
    when all fit), "all", "last", one step or several ("100,200").

    Raises:
        UserError: a step is no number or not among the checkpoints.
    """
    if wanted is None:
        if count == "all" or int(count) >= len(available):
            return list(available)
        number, last = int(count), len(available) - 1
        return sorted({available[round(last * (k + 1) / number)] for k in range(number)})
    if wanted == "all":
        return list(available)
    if wanted == "last":
        return [available[-1]]
    parts: Iterable[Any] = (
        wanted.split(",") if isinstance(wanted, str) else wanted if not isinstance(wanted, int) else [wanted]
    )
    chosen = []
    for part in parts:
        try:
            step = int(part)
        except (TypeError, ValueError):
            raise UserError(f"steps must be all, last or numbers such as 100,200, got {wanted!r}") from None
        chosen.append(step)
    missing = sorted(set(chosen) - set(available))
    if missing:
        raise UserError(f"no checkpoint of step {missing[0]}; there are: {', '.join(map(str, available))}")
    return sorted(set(chosen))


def find_baseline(trajectory: Trajectory, candidates: Sequence[Trajectory]) -> tuple[Trajectory | None, str | None]:
    """The full-rank run of the same size and seed among `candidates`, or why there is none."""
    full = [other for other in candidates if other.run.method == BASELINE_METHOD]
    if not full:
        return None, "no baseline: none of the runs is a full-rank one; name one with --baseline"
    same_size = [other for other in full if size_of(other) == size_of(trajectory)]
    if not same_size:
        return None, f"no baseline: no full-rank run has the size of {trajectory.run.name}"
    seeds = [other for other in same_size if other.run.seed == trajectory.run.seed]
    if not seeds:
        there = sorted({str(other.run.seed) for other in same_size})
        return None, f"no baseline: no full-rank run has seed {trajectory.run.seed} (there: {', '.join(there)})"
    return seeds[0], None


def rows_file(trajectory: Trajectory, output: str | Path | None) -> Path:
    """Where a run's measurements go: `output/RUN/` if given, else the run directory, else (Hub) ./RUN/."""
    name = trajectory.run.name.replace("/", "--")
    local = Path(trajectory.path)
    if output is not None:
        return Path(output) / name / FILE_NAME
    if not local.is_dir():
        return Path(name) / FILE_NAME
    is_checkpoint = (local / "config.json").is_file()
    return (local.resolve().parent if is_checkpoint and local.resolve().name != name else local) / FILE_NAME


def check_apart(trajectories: Sequence[Trajectory], files: Sequence[Path]) -> None:
    """Raises UserError where two runs of one name would share a file of rows."""
    owners: dict[Path, Path] = {}
    for trajectory, file in zip(trajectories, files, strict=True):
        owner = owners.setdefault(file.absolute(), Path(trajectory.path).resolve())
        if owner != Path(trajectory.path).resolve():
            raise UserError(
                f"{file}: the rows of {owner} and {trajectory.path} would both go there; give each its own --output"
            )


def is_of(row: Any, trajectory: Trajectory) -> bool:
    """Whether a row is of the checkpoint that `trajectory` has of its step, as far as one can tell."""
    there = trajectory.fingerprint(row.step) if row.checkpoint and row.step in trajectory.steps else None
    return there is None or row.checkpoint == there


def is_beside(row: Measurement, baseline: Trajectory | None) -> bool:
    """Whether a row compares with the checkpoint that `baseline` has of its step, as far as one can tell."""
    if baseline is None or row.baseline != baseline.run.name:
        return baseline is None and row.baseline is None
    there = baseline.fingerprint(row.step) if row.baseline_checkpoint and row.step in baseline.steps else None
    return there is None or row.baseline_checkpoint == there


def check_own(trajectory: Trajectory, file: Path, rows: Sequence[Any], baseline: Trajectory | None = None) -> None:
    """Raises UserError where `rows` of `file` are not of the checkpoints there: another run's of the same name, or of
    one that was trained again; or where they compare with another run of the name of `baseline`."""
    run = trajectory.run
    other = next((row for row in rows if (row.method, row.seed) != (run.method, run.seed)), None)
    if other is not None:
        raise UserError(
            f"{file}: holds the rows of another run of that name ({other.method}, seed {other.seed}) than "
            f"{trajectory.path} ({run.method}, seed {run.seed}); choose another --output"
        )
    valued = [row for row in rows if not getattr(row, "failed", False)]
    other = next((row for row in valued if not is_of(row, trajectory)), None)
    if other is not None:
        raise UserError(
            f"{file}: its rows of step {other.step} are not of {trajectory.where(other.step)}, but of another "
            "checkpoint of that name, or of it before it changed; choose another --output, or move that file away"
        )
    if baseline is None:
        return
    other = next((row for row in valued if row.baseline == baseline.run.name and not is_beside(row, baseline)), None)
    if other is not None:
        raise UserError(
            f"{file}: its rows of step {other.step} compare with another run named {other.baseline} than "
            f"{baseline.path}, or with it before it changed; choose another --output, or move that file away"
        )


def missing_metrics(
    metrics: set[str],
    step: int,
    request: Callable[[str], dict[str, Any]],
    trajectory: Trajectory,
    baseline: Trajectory | None,
    rows: Iterable[Measurement],
) -> set[str]:
    """Those of `metrics` that have no finished model row with these settings; failed ones count as missing."""
    done = set()
    for row in rows:
        if row.step != step or row.scope != "model":
            continue
        if row.metric not in metrics or row.failed or not is_of(row, trajectory):
            continue
        if any(row.settings.get(key) != value for key, value in request(row.metric).items()):
            continue
        metric = METRICS[row.metric]
        # What has no meaning beside any run (it is its own baseline) was compared with nothing.
        never = row.baseline is None and (row.reason or "").startswith(UNDEFINED)
        if not metric.needs_baseline or is_beside(row, baseline) or never:
            done.add(row.metric)
    return metrics - done
