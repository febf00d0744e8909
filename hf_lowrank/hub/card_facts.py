"""What a card says, read from a run directory: recipe, losses, measurements, scores, costs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_lowrank.errors import UserError
from hf_lowrank.hub.privacy import without_private_parts
from hf_lowrank.storage.parsing import parse_json, parse_plain_yaml

DOWNSTREAM = "downstream.jsonl"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; empty where there is none."""
    try:
        content = without_private_parts(parse_plain_yaml(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable recipe: {' '.join(str(error).split())}") from None
    return content if isinstance(content, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none or it is being written."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def section(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = recipe.get(name)
    return found if isinstance(found, dict) else {}


def last_checkpoint(run: Path) -> Path | None:
    """The folder of the highest step in a run directory."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """The step that a folder's name says; 0 where it says none."""
    match = re.search(r"(\d+)$", checkpoint.name) if checkpoint is not None else None
    return int(match[1]) if match else 0


def log_history(checkpoint: Path) -> list[dict[str, Any]]:
    history = read_json(checkpoint / "trainer_state.json").get("log_history")
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []


def loss_at(checkpoint: Path, step: int) -> float | None:
    """The evaluation loss at a step, else the training loss last logged before it, in nats per token."""
    history = log_history(checkpoint)
    exact = [e["eval_loss"] for e in history if e.get("step") == step and "eval_loss" in e]
    before = [e["loss"] for e in history if "loss" in e and _number(e.get("step", 0)) and e.get("step", 0) <= step]
    for value in (*exact[-1:], *before[-1:]):
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None


def evaluated_loss(checkpoint: Path, step: int) -> float | None:
    """The loss at a step on all sequences that training evaluates, in nats per token; None where it did not."""
    found = [e["eval_loss"] for e in log_history(checkpoint) if e.get("step") == step and "eval_loss" in e]
    value = found[-1] if found else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def measured(run: Path) -> tuple[int, list[Any]] | None:
    """The last measured step and its rows of the whole model, the last of each metric and baseline, or None."""
    from hf_lowrank.runs.measurements import FILE_NAME, read_measurements

    if not (run / FILE_NAME).is_file():
        return None
    rows = [
        row
        for row in read_measurements(run / FILE_NAME)
        if row.scope == "model" and not {"t", "x"} & row.settings.keys()
    ]
    if not rows:
        return None
    step = max(row.step for row in rows)
    return step, list({(row.metric, row.baseline): row for row in rows if row.step == step}.values())


def scores(run: Path) -> list[dict[str, Any]]:
    """The downstream rows of the last scored step: run, step, task, metric, value, stderr, n."""
    try:
        lines = (run / DOWNSTREAM).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    rows = []
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and _is_score(row):
            rows.append(row)
    last = max((row["step"] for row in rows), default=0)
    return list({(row["task"], row["metric"]): row for row in rows if row["step"] == last}.values())


def _is_score(row: Mapping[str, Any]) -> bool:
    named = isinstance(row.get("task"), str) and isinstance(row.get("metric"), str)
    return named and isinstance(row.get("step"), int) and _number(row.get("value"))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def corpus(data: Mapping[str, Any]) -> str:
    """The text that a run was trained on, in words."""
    source = data.get("source")
    shape = f", in sequences of {data['sequence_length']} tokens" if "sequence_length" in data else ""
    if source == "python-library":
        return f"the Python standard library's sources on the machine that trained it{shape}"
    if source == "hub":
        subset = f", {data['subset']}" if data.get("subset") else ""
        return f"the dataset {data.get('dataset')}{subset}{shape}"
    if source == "files":
        files: Sequence[Any] = data.get("train_files") or ()
        return "local files" + (f" ({', '.join(Path(str(f)).name for f in files[:3])})" if files else "") + shape
    return ""


def costs(run: Path) -> list[dict[str, str]]:
    """Compute and memory, as rows of a table."""
    from hf_lowrank.formats import big_count, byte_size, duration

    facts = read_json(run / "facts.json")
    ways = (
        ("Tokens seen", "tokens_seen", big_count),
        ("Time in training steps", "training_seconds", duration),
        ("Processor time of these", "cpu_seconds", duration),
        ("Time in all", "wall_seconds", duration),
        ("Peak memory of the process", "peak_memory_bytes", byte_size),
        ("Optimizer state", "optimizer_state_bytes", byte_size),
    )
    rows = [{"title": title, "value": way(facts[key])} for title, key, way in ways if _number(facts.get(key))]
    if rows and isinstance(facts.get("device"), str):
        rows.append({"title": "Device", "value": facts["device"]})
    return rows
