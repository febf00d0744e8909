"""Units that several processes of one machine perform together, started by accelerate's launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hf_lowrank.errors import UserError

UNIT, CONFIG = "unit.json", "accelerate.yaml"
# Instead of the user's own configuration of accelerate, on which results would depend. Without accelerators accelerate
# starts the processes in the same way, and they connect by gloo.
CONTENT = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "num_machines": 1,
    "mixed_precision": "no",
}


def outcome_file(folder: Path, rank: int) -> Path:
    """Where a process leaves how it ended."""
    return folder / f"outcome-{rank}.json"


def perform_in_processes(plain: dict[str, Any], count: int) -> str | None:
    """Performs a unit, given as plain data, in `count` processes; returns the note of the first one.

    Raises:
        UserError: a process failed, with the reason of the one that failed first.
    """
    with TemporaryDirectory(prefix="hf-lowrank-") as name:
        folder = Path(name)
        (folder / UNIT).write_text(json.dumps(plain), encoding="utf-8")
        (folder / CONFIG).write_text(json.dumps({**CONTENT, "num_processes": count}), encoding="utf-8")
        launch = [sys.executable, "-m", "hf_lowrank.study.launched", "launch", str(os.getpid()), name]
        status = subprocess.run([*launch, str(count), str(torch.get_num_threads())], check=False).returncode
        written = sorted(folder.glob("outcome-*.json"), key=lambda file: file.stat().st_mtime_ns)
        outcomes = [json.loads(file.read_text(encoding="utf-8")) for file in written]
        reasons = [outcome["reason"] for outcome in outcomes if outcome["reason"] is not None]
        if reasons:
            raise UserError(reasons[0])
        if status or len(outcomes) < count:
            raise UserError(f"one of its {count} processes ended early; its log says more")
        return json.loads(outcome_file(folder, 0).read_text(encoding="utf-8"))["note"]
