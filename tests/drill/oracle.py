"""What must be bitwise equal between a run that went through faults and one that did not."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_lowrank.runs.checkpoints import why_not_resumable
from hf_lowrank.storage.checksums import damage_by_checksums

# Depends on the clock, the machine or the run's folder.
OWN = ("training_args.bin", "checksums.json")
TIMELY = ("runtime", "second", "memory", "checksum", "time", "peak", "versions", "torch")


def snapshot(run: Path) -> dict[str, Any]:
    """The contents of a run directory by file, without hidden files and what differs between equal runs."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_file() and path.name not in OWN and not any(part.startswith(".") for part in Path(name).parts):
            found[name] = _content(path)
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The files that differ."""
    return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]


def _content(path: Path) -> Any:
    try:
        if path.suffix == ".jsonl" and "downstream" not in path.parent.parent.name:
            return Counter(json.dumps(_timeless(json.loads(line)), sort_keys=True) for line in _last_rows(path))
        if path.name in ("trainer_state.json", "facts.json") or path.parent.name == "study":
            return _timeless(json.loads(path.read_text()))
    except (ValueError, UnicodeDecodeError) as error:
        return f"unreadable: {error}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _last_rows(path: Path) -> list[str]:
    """The rows that count: the last of each key, without failures that a later row mends."""
    if path.name == "measurements.jsonl":
        from hf_lowrank.runs.measurements import read_measurements

        return [row.to_line() for row in read_measurements(path)]
    if path.name == "downstream.jsonl":
        from hf_lowrank.runs.scores import read_scores

        return [json.dumps(asdict(row)) for row in read_scores(path)]
    return path.read_text().splitlines()


def _timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _timeless(v) for k, v in content.items() if not any(word in str(k) for word in TIMELY)}
    return [_timeless(value) for value in content] if isinstance(content, list) else content


def not_finite(run: Path) -> list[str]:
    """The complete checkpoints with non-finite weights."""
    found = []
    for path in sorted(run.glob("checkpoint-*/model.safetensors")):
        if path.parent.name != "checkpoint-0" and why_not_resumable(path.parent) is not None:
            continue
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):
            continue
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            found.append(path.parent.name)
    return found


def damaged_checkpoints(run: Path) -> dict[str, str]:
    """The checkpoints of a run whose damage is detected, and what it is."""
    found = {}
    for folder in sorted(run.glob("checkpoint-*")):
        # The first checkpoint has weights only.
        damage = damage_by_checksums(folder) if folder.name == "checkpoint-0" else why_not_resumable(folder)
        if damage is not None:
            found[folder.name] = damage
    return found
