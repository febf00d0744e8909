"""Which learning rate a member gets: the one whose run ended with the lowest loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.runs.checkpoints import last_resumable_checkpoint
from hf_lowrank.runs.trainer_state import read_trainer_state
from hf_lowrank.storage.checksums import sealed, unsealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json
from hf_lowrank.study.layout import Study, is_swept
from hf_lowrank.study.spec import StudyFile
from hf_lowrank.training.start import is_finished

FILE_NAME = "sweep.json"


def final_loss(run: Path) -> float:
    """The held-out loss at the end of a finished run, nats per token; NaN for a run that did not get there."""
    checkpoint = last_resumable_checkpoint(run) if is_finished(run) else None
    state = read_trainer_state(checkpoint) if checkpoint is not None else None
    losses = list(state.logged("eval_loss").values()) if state is not None else []
    return losses[-1] if losses else math.nan


def choose(study: Study) -> list[dict[str, Any]]:
    """The rows of sweep.json: every attempt, the chosen one of each member marked; of equal ones the smaller rate."""
    rows: list[dict[str, Any]] = []
    for member in dict.fromkeys(attempt.member for attempt in study.attempts):
        attempts = sorted((a for a in study.attempts if a.member == member), key=lambda a: a.learning_rate)
        losses = [final_loss(attempt.folder) for attempt in attempts]
        finite = [loss for loss in losses if not math.isnan(loss)]
        best = losses.index(min(finite)) if finite else None
        for place, (attempt, loss) in enumerate(zip(attempts, losses, strict=True)):
            chosen = place == best
            rows.append(
                {
                    "member": member,
                    "learning_rate": attempt.learning_rate,
                    "loss": None if math.isnan(loss) else loss,
                    "chosen": chosen,
                    "at_edge": chosen and len(attempts) > 1 and place in (0, len(attempts) - 1),
                    "run": attempt.folder.relative_to(study.directory).as_posix(),
                }
            )
    return rows


def write_sweep(study: Study) -> list[dict[str, Any]]:
    """Chooses and writes sweep.json; returns its rows."""
    rows = choose(study)
    write_text(study.directory / FILE_NAME, json.dumps([sealed(row) for row in rows], indent=1) + "\n")
    return rows


def chosen_rates(file: StudyFile, directory: Path) -> dict[str, float]:
    """The rates that sweep.json says were chosen among those that the study asks for; none without it.

    Raises:
        UserError: the file is damaged.
    """
    path = directory / FILE_NAME
    if file.settings.sweep is None or not path.is_file():
        return {}
    try:
        rows = [unsealed(row) for row in parse_json(path.read_text(encoding="utf-8"))]
        chosen = {row["member"]: float(row["learning_rate"]) for row in rows if row["chosen"]}
        tried: dict[str, set[float]] = {}
        for row in rows:
            tried.setdefault(row["member"], set()).add(float(row["learning_rate"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable sweep ({' '.join(str(error).split())}); remove it") from None
    # Another grid may choose another rate: what was chosen from it does not count.
    grid = set(file.settings.sweep.learning_rate)
    members = file.settings.members
    return {
        name: rate
        for name, rate in chosen.items()
        if name in members and is_swept(members[name]) and tried[name] == grid
    }
