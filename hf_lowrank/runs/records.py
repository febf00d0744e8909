"""What a run left on disk, as the report needs it: nothing is trained, loaded or measured here."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_lowrank.storage.checksums import FILE_NAME as CHECKSUMS
from hf_lowrank.storage.checksums import check_checksums, checked_names, lacks_checksums, read_sealed_text, unsealed
from hf_lowrank.runs.scores import FILE_NAME as SCORES_FILE
from hf_lowrank.runs.scores import Score, read_scores
from hf_lowrank.errors import UserError
from hf_lowrank.storage.parsing import parse_json, parse_plain_yaml
from hf_lowrank.storage.tables import read_rows

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_COLUMNS = ("step", "metric", "scope", "value", "ci_low", "ci_high", "n", "baseline", "settings", "reason")


@dataclass(frozen=True)
class Row:
    """One line of `measurements.jsonl`; the run's name, method and seed are those of the run that holds it."""

    step: int
    metric: str
    scope: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int | None
    baseline: str | None
    settings: Mapping[str, Any]
    reason: str | None


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        path: its folder.
        name: what tables call it; unique among the runs of a report.
        method, seed: from its recipe, "unknown" and None for folders that came without one.
        steps: its checkpoints' steps, ascending.
        recipe: the resolved recipe as it lies on disk, empty without one.
        facts: what training wrote down about itself (seconds, bytes, tokens), empty without it.
        log: Trainer's log history up to the last checkpoint.
        rows: its measurements, the last one of each key.
        fingerprint: of its evaluation sequences, None where nothing says it.
        scores: its downstream scores, the last of each step, task and metric.
        size: width and depth of its model as its configuration says them; None where it says nothing.
        planned: the step at which training ends; None where nothing says it.
    """

    path: Path
    name: str
    method: str
    seed: int | None
    steps: tuple[int, ...]
    recipe: Mapping[str, Any]
    facts: Mapping[str, Any]
    log: tuple[Mapping[str, Any], ...]
    rows: tuple[Row, ...] = field(repr=False)
    fingerprint: str | None
    scores: tuple[Score, ...] = field(default=(), repr=False)
    size: tuple[int, int] | None = None
    planned: int | None = None

    @property
    def unfinished(self) -> str:
        """`step 400 of 1000` for a run that is still trained, or was ended early; else empty."""
        last = self.steps[-1] if self.steps else None
        behind = last is not None and self.planned is not None and last < self.planned
        return f"step {last} of {self.planned}" if behind else ""

    def logged(self, key: str) -> list[tuple[int, float]]:
        """(step, value) pairs of one key of the log, finite ones, in step order; the last entry of a step counts."""
        found = {
            int(entry["step"]): float(entry[key])
            for entry in self.log
            if _is_number(entry.get(key)) and _is_number(entry.get("step"))
        }
        return sorted(found.items())

    def model_rows(self, metric: str) -> list[Row]:
        """The rows of `metric` for the whole model, in step order."""
        return sorted(
            (row for row in self.rows if row.metric == metric and row.scope == "model"), key=lambda r: r.step
        )

    def last(self, metric: str) -> Row | None:
        """The row of `metric` at the last step that has a value; else the last null one, for its reason."""
        rows = self.model_rows(metric)
        valued = [row for row in rows if row.value is not None]
        found = valued or rows
        return found[-1] if found else None

    def fact(self, key: str) -> float | None:
        """What the facts say under `key`, if it is a finite number."""
        return _number(self.facts.get(key))

    @property
    def final_loss(self) -> float | None:
        """Held-out loss in nats per token at the end: as logged by the Trainer, else, or later, as measured."""
        logged = self.logged("eval_loss")
        row = self.last("loss")
        if logged and (row is None or row.value is None or row.step <= logged[-1][0]):
            return logged[-1][1]
        return row.value if row else None

    @property
    def perplexity(self) -> float | None:
        loss = self.final_loss
        return math.exp(loss) if loss is not None and loss < 700 else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object) -> float | None:
    return float(value) if _is_number(value) else None  # type: ignore[arg-type]


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {_one_line(error)}; remove or mend the file") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _mapping(path: Path, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must hold a mapping of keys to values, got {type(content).__name__}")
    return content


def _facts(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return unsealed(_mapping(path, _read_json(path)))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}; remove the file") from None


def read_measured(path: Path) -> tuple[Row, ...]:
    """The rows of a `measurements.jsonl`, the last of each (step, metric, scope, baseline, settings).

    A torn last line, as a killed writer leaves it, is dropped.

    Raises:
        UserError: the file is not readable, or a line is no measurement.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for row in read_rows(path, lambda entry: _row(unsealed(entry)), "measurement", "measure"):
        key = (
            row.step,
            row.metric,
            row.scope,
            row.baseline,
            json.dumps(_plain_settings(row.settings), sort_keys=True),
        )
        rows.pop(key, None)
        rows[key] = row
    return tuple(rows.values())


def _plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the measured curves that may ride along with them."""
    return {key: value for key, value in settings.items() if not isinstance(value, list | dict)}


def _row(entry: Any) -> Row:
    if not isinstance(entry, Mapping):
        raise TypeError("it is no JSON object")
    if not isinstance(entry["metric"], str) or not isinstance(entry["step"], int):
        raise TypeError("metric must be text and step a whole number")
    settings = entry.get("settings") or {}
    if not isinstance(settings, Mapping):
        raise TypeError("settings must be an object")
    n = entry.get("n")
    return Row(
        step=entry["step"],
        metric=entry["metric"],
        scope=str(entry.get("scope") or "model"),
        value=_number(entry.get("value")),
        ci_low=_number(entry.get("ci_low")),
        ci_high=_number(entry.get("ci_high")),
        n=n if isinstance(n, int) else None,
        baseline=None if entry.get("baseline") is None else str(entry["baseline"]),
        settings=settings,
        reason=None if entry.get("reason") is None else str(entry["reason"]),
    )


def _checkpoints(folder: Path) -> dict[int, Path]:
    found = {}
    for entry in folder.iterdir():
        match = _CHECKPOINT.fullmatch(entry.name)
        # Its checksums are written last: with them it is whole, and what they name and is not there is damage.
        whole = (entry / "config.json").is_file() and not lacks_checksums(entry)
        if match and (whole or (entry / CHECKSUMS).is_file()):
            found[int(match[1])] = entry
    return dict(sorted(found.items()))


def _trainer_state(checkpoints: Mapping[int, Path]) -> Mapping[str, Any]:
    """Of the last checkpoint that has one; empty where none has."""
    for step in sorted(checkpoints, reverse=True):
        path = checkpoints[step] / "trainer_state.json"
        if path.is_file() or path.name in checked_names(checkpoints[step]):
            check_checksums(checkpoints[step], [path.name])
            return _mapping(path, _read_json(path))
    return {}


def _planned(state: Mapping[str, Any], recipe: Mapping[str, Any]) -> int | None:
    training = recipe.get("training")
    said = [state.get("max_steps"), training.get("max_steps") if isinstance(training, Mapping) else None]
    return next((steps for steps in said if isinstance(steps, int) and steps > 0), None)


def _fingerprint(folder: Path, facts: Mapping[str, Any]) -> str | None:
    """The fingerprint recorded in the evaluation file's header, else in the facts; the tensors are not read."""
    path = folder / "evaluation.safetensors"
    if path.is_file():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as tensors:
                recorded = (tensors.metadata() or {}).get("fingerprint")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable evaluation set: {_one_line(error)}") from None
        if recorded:
            return recorded
    said = facts.get("evaluation_fingerprint")
    return str(said) if said else None


_SIZE_KEYS = (("hidden_size", "n_embd", "d_model"), ("num_hidden_layers", "n_layer", "num_layers"))


def _size(checkpoints: Mapping[int, Path]) -> tuple[int, int] | None:
    if not checkpoints:
        return None
    path = checkpoints[max(checkpoints)] / "config.json"
    check_checksums(path.parent, [path.name])
    config = _mapping(path, _read_json(path))
    inner = config.get("base_config")
    config = inner if isinstance(inner, Mapping) else config
    found = [next((config[key] for key in keys if isinstance(config.get(key), int)), None) for keys in _SIZE_KEYS]
    return None if None in found else (found[0], found[1])  # type: ignore[return-value]


def load_run(folder: str | os.PathLike[str]) -> RunRecord:
    """Reads one run directory, or a folder that holds the tables of checkpoints kept elsewhere.

    Raises:
        UserError: it is no folder, holds neither checkpoint nor table, or one of its files is damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder; give the folder that holds checkpoint-N/")
    checkpoints = _checkpoints(path)
    recipe_file, rows_file = path / "recipe.yaml", path / "measurements.jsonl"
    tables = rows_file.is_file() or (path / SCORES_FILE).is_file()
    if not checkpoints and (not tables or any(path.glob("checkpoint-*"))):
        what = "has no whole checkpoint-N/ yet; train it first" if recipe_file.is_file() else "is no run folder"
        raise UserError(f"{path}: {what} (a run folder holds checkpoint-N/ folders with a config.json)")
    recipe: Mapping[str, Any] = {}
    if recipe_file.is_file():
        try:
            recipe = _mapping(recipe_file, parse_plain_yaml(read_sealed_text(recipe_file)) or {})
        except UserError:
            raise
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{recipe_file}: not readable as YAML: {_one_line(error)}") from None
    facts = _facts(path / "facts.json")
    rows = read_measured(rows_file) if rows_file.is_file() else ()
    method = recipe.get("method")
    seed = recipe.get("seed")
    state = _trainer_state(checkpoints)
    history = state.get("log_history")
    return RunRecord(
        path=path,
        name=path.resolve().name,
        method=str(method.get("name", "unknown")) if isinstance(method, Mapping) else "unknown",
        seed=seed if isinstance(seed, int) else None,
        steps=tuple(checkpoints) or tuple(sorted({row.step for row in rows})),
        recipe=recipe,
        facts=facts,
        log=tuple(entry for entry in history if isinstance(entry, Mapping)) if isinstance(history, list) else (),
        rows=rows,
        fingerprint=_fingerprint(path, facts),
        scores=tuple(read_scores(path)),
        size=_size(checkpoints),
        planned=_planned(state, recipe),
    )


def finished_or_all(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Those that are finished, beside which others stand for nothing, or all where none is."""
    return [run for run in runs if not run.unfinished] or list(runs)


def load_runs(folders: Iterable[Any]) -> list[RunRecord]:
    """Reads run folders, given as paths or as anything with a `path`, and gives each a name of its own.

    Raises:
        UserError: there are none, one is named twice, or one cannot be read.
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
    return list(_with_own_names([load_run(path) for path in paths]))


def _with_own_names(records: list[RunRecord]) -> Iterator[RunRecord]:
    """Runs of one folder name get as much of their path before it as tells them apart."""
    from dataclasses import replace

    for record in records:
        rivals = [other for other in records if other is not record and other.name == record.name]
        parts = record.path.resolve().parts
        length = 1
        while any(other.path.resolve().parts[-length:] == parts[-length:] for other in rivals):
            length += 1
        yield replace(record, name="/".join(parts[-length:]))
