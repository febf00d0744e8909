"""The runs, checkpoints, tables and evaluation sets that the arguments of a command name, and whether rows belong to
the runs."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs.checkpoints import check_files
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.layout import CONFIG, RECIPE, STEP_FOLDER, TOKENIZER, step_folders
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.runs.weights import positions_of

Run = str | os.PathLike[str] | Trajectory
AT_STEP = re.compile(r"(?P<run>.+)@(?:step-)?(?P<step>\d+|last)")
# Tokens of the sequences that a text file is packed into.
SEQUENCE_LENGTH = 256


def open_run(run: Run, revisions: str | None = None) -> Trajectory:
    """The run's trajectory; `revisions` selects checkpoints of a repository."""
    return run if isinstance(run, Trajectory) else Trajectory(run, revisions=revisions)


def open_runs(runs: Run | Sequence[Run], purpose: str, revisions: str | None = None) -> list[Trajectory]:
    """The trajectories of one run or several.

    Raises:
        UserError: there is no run, or one is unusable.
    """
    given = [runs] if isinstance(runs, str | os.PathLike | Trajectory) else list(runs)
    if not given:
        raise UserError(f"there must be at least one run to {purpose}")
    return [open_run(run, revisions) for run in given]


def choose_steps(available: Sequence[int], wanted: str | int | Iterable[int] | None, count: int | str) -> list[int]:
    """The checkpoints that `wanted` names: None takes `count` of them evenly spread (the last always, the first only
    when all fit), "all", "last", one step or several ("100,200").

    Raises:
        UserError: a step is not a number or not among the checkpoints.
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
    items: Iterable[Any] = (
        wanted.split(",") if isinstance(wanted, str) else wanted if not isinstance(wanted, int) else [wanted]
    )
    try:
        chosen = {int(item) for item in items}
    except (TypeError, ValueError):
        raise UserError(f"steps must be all, last or numbers such as 100,200, got {wanted!r}") from None
    missing = sorted(chosen - set(available))
    if missing:
        raise UserError(f"no checkpoint of step {missing[0]}; there are: {', '.join(map(str, available))}")
    return sorted(chosen)


def steps_of(trajectory: Trajectory, wanted: str | int | Iterable[int] | None, count: int | str = "all") -> list[int]:
    """`choose_steps` among a trajectory's checkpoints; an error names the run."""
    try:
        return choose_steps(trajectory.steps, wanted, count)
    except UserError as error:
        raise UserError(f"{trajectory.path}: {error}") from None


@dataclass(frozen=True)
class Checkpoint:
    """A folder with weights, and the run directory or folder of checkpoints that holds it, if any; or a repository on
    the Hub with its revision, None for the default one."""

    path: str
    revision: str | None = None
    run: Path | None = None


def find_checkpoint(named: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """The checkpoint that `named` means: `RUN/checkpoint-N`, `RUN@N`, `RUN@last`, `RUN` (its last one), an exported
    folder, or `user/repo` with a `revision` such as `step-N`, also written `user/repo@step-N`.

    Raises:
        UserError: a local run has no such checkpoint.
    """
    text, local = os.fspath(named), Path(named)
    if local.is_dir() and ((local / CONFIG).is_file() or not step_folders(local)):
        folder = local.resolve()
        in_run = STEP_FOLDER.fullmatch(folder.name) or (folder.parent / RECIPE).is_file()
        return Checkpoint(text, None, folder.parent if in_run else None)
    match = None if local.is_dir() else AT_STEP.fullmatch(text)
    run = Path(match["run"]) if match else local
    if run.is_dir():
        trajectory = Trajectory(run)
        (step,) = steps_of(trajectory, match["step"] if match else "last")
        return Checkpoint(trajectory.where(step), None, run)
    repository, _, at = text.partition("@")
    if at and os.path.isdir(repository):
        raise UserError(f"{text}: after the @ must be a step, such as {repository}@400, or last, got {at!r}")
    if os.sep in text and (text.startswith((".", "/", "~")) or text.count("/") > 1):
        raise UserError(f"{run}: no such folder; give RUN/checkpoint-N, RUN@N, an exported folder or user/repo")
    return Checkpoint(repository, at or revision)


def table_of(trajectory: Trajectory, output: str | os.PathLike[str] | None, file_name: str) -> Path:
    """Where a table of a run is written: `output/RUN/` if given, else the run directory, else (Hub) ./RUN/."""
    name = trajectory.run.name.replace("/", "--")
    local = Path(trajectory.path)
    if output is not None:
        return Path(output) / name / file_name
    if not local.is_dir():
        return Path(name) / file_name
    is_checkpoint = (local / CONFIG).is_file()
    return (local.resolve().parent if is_checkpoint and local.resolve().name != name else local) / file_name


def check_separate_tables(trajectories: Sequence[Trajectory], tables: Sequence[Path]) -> None:
    """Raises UserError where two runs of one name would write to the same table."""
    owners: dict[Path, Path] = {}
    for trajectory, table in zip(trajectories, tables, strict=True):
        owner = owners.setdefault(table.absolute(), Path(trajectory.path).resolve())
        if owner != Path(trajectory.path).resolve():
            raise UserError(
                f"{table}: {owner} and {trajectory.path} would both write their rows to it; give each its own --output"
            )


def size_of(trajectory: Trajectory) -> str:
    """What two runs must share to be compared: the shape of the plain architecture, as a string."""
    config = trajectory.config
    base = getattr(config, "base_config", None) or config
    fields = base if isinstance(base, dict) else base.to_dict()
    names = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    )  # fmt: skip
    return json.dumps({name: fields.get(name) for name in names}, sort_keys=True)


def is_current(row: Any, trajectory: Trajectory) -> bool:
    """Whether a row's fingerprint is that of the trajectory's checkpoint of its step; True where one is unknown."""
    present = trajectory.fingerprint(row.step) if row.checkpoint and row.step in trajectory.steps else None
    return present is None or row.checkpoint == present


def is_current_comparison(row: Any, baseline: Trajectory | None) -> bool:
    """Whether a row compares with the checkpoint that `baseline` has of its step; True where one is unknown."""
    if baseline is None or row.baseline != baseline.run.name:
        return baseline is None and row.baseline is None
    present = baseline.fingerprint(row.step) if row.baseline_checkpoint and row.step in baseline.steps else None
    return present is None or row.baseline_checkpoint == present


def check_rows_belong(
    trajectory: Trajectory, table: Path, rows: Sequence[Any], baseline: Trajectory | None = None
) -> None:
    """Raises UserError where rows of a table are not of the checkpoints that the run has now (another run of that
    name, or one that was trained again), or compare with another run of the name of `baseline`."""
    run = trajectory.run
    other = next((row for row in rows if (row.method, row.seed) != (run.method, run.seed)), None)
    if other is not None:
        raise UserError(
            f"{table}: holds rows of another run of that name ({other.method}, seed {other.seed}) than "
            f"{trajectory.path} ({run.method}, seed {run.seed}); choose another --output"
        )
    valued = [row for row in rows if not getattr(row, "failed", False)]
    other = next((row for row in valued if not is_current(row, trajectory)), None)
    if other is not None:
        raise UserError(
            f"{table}: its rows of step {other.step} are not of {trajectory.where(other.step)}, but of another "
            "checkpoint of that name, or of it before it changed; choose another --output, or move that file away"
        )
    if baseline is None:
        return
    compared = (row for row in valued if row.baseline == baseline.run.name)
    other = next((row for row in compared if not is_current_comparison(row, baseline)), None)
    if other is not None:
        raise UserError(
            f"{table}: its rows of step {other.step} compare with another run named {other.baseline} than "
            f"{baseline.path}, or with it before it changed; choose another --output, or move that file away"
        )


def resolve_evaluation_set(
    given: EvaluationSet | str | os.PathLike[str] | None, trajectory: Trajectory
) -> EvaluationSet | None:
    """The set that a safetensors file or its folder holds, or that a `.txt` file gives with the run's tokenizer."""
    if given is None or isinstance(given, EvaluationSet):
        return given
    path = Path(given)
    return evaluation_set_from_text(path, trajectory) if path.suffix.lower() == ".txt" else EvaluationSet.load(path)


def evaluation_set_from_text(path: Path, trajectory: Trajectory, length: int = SEQUENCE_LENGTH) -> EvaluationSet:
    """The file's text, packed into sequences of `length` tokens of the trajectory's tokenizer, or of as many as the
    model has positions for; a shorter rest is dropped.

    Raises:
        UserError: the file is unreadable or too short, or the checkpoints have no tokenizer.
    """
    from transformers import AutoTokenizer

    if not path.is_file():
        raise UserError(f"{path}: no such text file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {one_line(error)}") from None
    folder = trajectory.extra(TOKENIZER)
    if folder is not None:
        check_files(folder)
    source = folder or trajectory.tokenizer_source
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source}: has no tokenizer, which a text needs; save one there with save_pretrained: "
            f"{one_line(error, 200)}"
        ) from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    length = min(length, positions_of(trajectory.config) or length)
    count = len(ids) // length
    if count == 0:
        raise UserError(f"{path}: must hold at least {length} tokens, got {len(ids)}")
    input_ids = torch.tensor(ids[: count * length]).view(count, length)
    return EvaluationSet(input_ids, torch.ones_like(input_ids))
