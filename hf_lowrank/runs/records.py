"""Everything that a run directory holds apart from weights, read once: for reports, claims and cards."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.formats import finite_number
from hf_lowrank.metrics import moves_weights
from hf_lowrank.runs.checkpoints import check_files, complete_checkpoints
from hf_lowrank.runs.evaluation_set import recorded_fingerprint
from hf_lowrank.runs.layout import CONFIG, MEASUREMENTS, RECIPE, SCORES, step_folders
from hf_lowrank.runs.measurements import NOT_DENSE, Measurement, read_measurements
from hf_lowrank.runs.run_files import (
    TrainerState,
    method_of,
    read_facts,
    read_recipe,
    read_trainer_state,
    section,
    seed_of,
)
from hf_lowrank.runs.scores import Score, read_scores
from hf_lowrank.storage.checksums import read_object

_SIZE_KEYS = (("hidden_size", "n_embd", "d_model"), ("num_hidden_layers", "n_layer", "num_layers"))


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        path: its folder.
        name: its name in tables; unique among the runs of a report.
        method, seed: from its recipe; "unknown" and None without one.
        steps: the steps of its checkpoints, ascending.
        recipe: the resolved recipe, empty without one.
        facts: what training recorded about the run (seconds, bytes, tokens), empty without it.
        state: Trainer's state at the last checkpoint that has one.
        rows: its measurements.
        fingerprint: of its evaluation sequences, None where unknown.
        scores: its downstream scores.
        checkpoint: the folder of its last checkpoint, None without one.
        config: the configuration of that checkpoint, empty without one.
        planned: the step at which training ends; None where unknown.
    """

    path: Path
    name: str
    method: str = "unknown"
    seed: int | None = None
    steps: tuple[int, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    state: TrainerState = field(default_factory=TrainerState)
    rows: tuple[Measurement, ...] = field(default=(), repr=False)
    fingerprint: str | None = None
    scores: tuple[Score, ...] = field(default=(), repr=False)
    checkpoint: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    planned: int | None = None

    @property
    def unfinished(self) -> str:
        """`step 400 of 1000` for a run that is still training or was stopped early; else empty."""
        last = self.steps[-1] if self.steps else None
        behind = last is not None and self.planned is not None and last < self.planned
        return f"step {last} of {self.planned}" if behind else ""

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and depth of the model according to its configuration; None where that does not say."""
        inner = self.config.get("base_config")
        config = inner if isinstance(inner, Mapping) else self.config
        width, depth = (next((config[k] for k in keys if isinstance(config.get(k), int)), None) for keys in _SIZE_KEYS)
        return None if width is None or depth is None else (width, depth)

    def logged(self, key: str) -> list[tuple[int, float]]:
        """(step, value) pairs of one key of the log, finite ones, in step order; the last entry of a step counts."""
        return list(self.state.logged(key).items())

    def model_rows(self, metric: str) -> list[Measurement]:
        """The rows of `metric` for the whole model, in step order."""
        return sorted(
            (row for row in self.rows if row.metric == metric and row.scope == "model"), key=lambda row: row.step
        )

    def last(self, metric: str) -> Measurement | None:
        """The last row of `metric` that has a value; without any, the last one, for its reason."""
        rows = self.model_rows(metric)
        found = [row for row in rows if row.has_value] or rows
        return found[-1] if found else None

    def not_dense(self, row: Measurement) -> str | None:
        """Why a number is not of dense weights; None where it is, and for numbers that move no weights."""
        space = row.settings.get("space")
        if space is None and moves_weights(row.metric) and self.config.get("model_type") == "lowrank":
            return f"{NOT_DENSE}measured before dense weights were moved; measure again"
        return (row.reason or NOT_DENSE.rstrip(": ")) if space == "parameters" else None

    def fact(self, key: str) -> float | None:
        """A fact, if it is a finite number."""
        return finite_number(self.facts.get(key))

    @property
    def final_loss(self) -> float | None:
        """The last held-out loss in nats per token: as logged by Trainer, or as measured at a later step."""
        logged = self.logged("eval_loss")
        row = self.last("loss")
        if logged and (row is None or not row.has_value or row.step <= logged[-1][0]):
            return logged[-1][1]
        return row.value if row is not None and row.has_value else None

    @property
    def perplexity(self) -> float | None:
        loss = self.final_loss
        return math.exp(loss) if loss is not None and loss < 700 else None


def load_run(folder: str | os.PathLike[str]) -> RunRecord:
    """Reads one run directory, or a folder with the tables of checkpoints that are elsewhere.

    Raises:
        UserError: the folder does not exist or has neither a complete checkpoint nor a table, or a file is damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder; give the folder that holds checkpoint-N/")
    has_tables = any((path / name).is_file() for name in (MEASUREMENTS, SCORES))
    if not complete_checkpoints(path) and (not has_tables or step_folders(path)):
        what = (
            "has no complete checkpoint-N/ yet; train it first" if (path / RECIPE).is_file() else "is not a run folder"
        )
        raise UserError(f"{path}: {what} (a run folder holds checkpoint-N/ folders with a config.json)")
    return read_run(path)


def read_run(path: Path, checkpoint: Path | None = None) -> RunRecord:
    """Reads a folder, whatever it holds; configuration and log come from `checkpoint`, by default the last one."""
    checkpoints = complete_checkpoints(path)
    recipe, facts, rows = read_recipe(path) or {}, read_facts(path), tuple(read_measurements(path))
    last = checkpoint or (checkpoints[max(checkpoints)] if checkpoints else None)
    candidates = [checkpoint] if checkpoint is not None else [checkpoints[step] for step in sorted(checkpoints)[::-1]]
    state = next(filter(None, map(read_trainer_state, candidates)), TrainerState())
    fingerprint = recorded_fingerprint(path) or facts.get("evaluation_fingerprint")
    limits = (state.max_steps, section(recipe, "training").get("max_steps"))
    return RunRecord(
        path=path,
        name=path.resolve().name,
        method=method_of(recipe),
        seed=seed_of(recipe),
        steps=tuple(checkpoints) or tuple(sorted({row.step for row in rows})),
        recipe=recipe,
        facts=facts,
        state=state,
        rows=rows,
        fingerprint=str(fingerprint) if fingerprint else None,
        scores=tuple(read_scores(path)),
        checkpoint=last,
        config=read_config_file(last) if last is not None else {},
        planned=next((steps for steps in limits if isinstance(steps, int) and steps > 0), None),
    )


def read_config_file(checkpoint: Path) -> Mapping[str, Any]:
    """config.json of a checkpoint as plain data, without building anything from it."""
    file = checkpoint / CONFIG
    check_files(checkpoint, [file.name])
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON: {one_line(error)}") from None


def finished_or_all(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The finished runs, or all of them where none is finished."""
    return [run for run in runs if not run.unfinished] or list(runs)


def load_runs(folders: Iterable[Any]) -> list[RunRecord]:
    """Reads run folders, given as paths or as objects with a `path`, and makes their names unique.

    Raises:
        UserError: there are none, one is given twice, or one cannot be read.
    """
    if isinstance(folders, str | os.PathLike):
        folders = [folders]
    paths = [Path(getattr(folder, "path", folder)) for folder in folders]
    if not paths:
        raise UserError("runs must name at least one run folder, got none")
    resolved = [path.resolve() for path in paths]
    for path, real in zip(paths, resolved, strict=True):
        if resolved.count(real) > 1:
            raise UserError(f"{path}: this run is named twice; name each run once")
    return list(_with_unique_names([load_run(path) for path in paths]))


def _with_unique_names(records: list[RunRecord]) -> Iterator[RunRecord]:
    """Runs with the same folder name get as much of the path before it as distinguishes them."""
    for record in records:
        rivals = [other for other in records if other is not record and other.name == record.name]
        parts = record.path.resolve().parts
        length = 1
        while any(other.path.resolve().parts[-length:] == parts[-length:] for other in rivals):
            length += 1
        yield replace(record, name="/".join(parts[-length:]))
