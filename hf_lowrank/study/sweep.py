"""The sweep: each member gets the values of the trial that ended with the lowest loss."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lowrank.claims.results import SWEEP
from hf_lowrank.errors import UserError
from hf_lowrank.runs.checkpoints import last_resumable_checkpoint
from hf_lowrank.runs.run_files import read_trainer_state
from hf_lowrank.storage.checksums import sealed, unsealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json
from hf_lowrank.study.layout import Study
from hf_lowrank.study.spec import LEARNING_RATE, StudyFile
from hf_lowrank.training.start import is_finished


def final_loss(run: Path) -> float:
    """The held-out loss of a finished run at its end, nats per token; NaN for an unfinished run."""
    checkpoint = last_resumable_checkpoint(run) if is_finished(run) else None
    state = read_trainer_state(checkpoint) if checkpoint is not None else None
    losses = list(state.logged("eval_loss").values()) if state is not None else []
    return losses[-1] if losses else math.nan


def choose(study: Study) -> list[dict[str, Any]]:
    """The rows of sweep.json: every trial, with each member's winner marked; ties go to the lower learning rate."""
    rows: list[dict[str, Any]] = []
    for member in dict.fromkeys(trial.member for trial in study.trials):
        trials = sorted(
            (trial for trial in study.trials if trial.member == member), key=lambda trial: trial.values[LEARNING_RATE]
        )
        losses = [final_loss(trial.folder) for trial in trials]
        finite = [loss for loss in losses if not math.isnan(loss)]
        best = losses.index(min(finite)) if finite else None
        for index, (trial, loss) in enumerate(zip(trials, losses, strict=True)):
            chosen = index == best
            rows.append(
                {
                    "member": member,
                    "learning_rate": trial.values[LEARNING_RATE],
                    "loss": None if math.isnan(loss) else loss,
                    "chosen": chosen,
                    "at_edge": chosen and len(trials) > 1 and index in (0, len(trials) - 1),
                    "run": trial.folder.relative_to(study.directory).as_posix(),
                }
            )
    return rows


def write_sweep(study: Study) -> list[dict[str, Any]]:
    """Chooses the winners and writes sweep.json; returns its rows."""
    rows = choose(study)
    write_text(study.directory / SWEEP, json.dumps([sealed(row) for row in rows], indent=1) + "\n")
    return rows


def read_winners(file: StudyFile, directory: Path) -> dict[str, Mapping[str, float]]:
    """Each member's chosen values according to sweep.json; empty without it.

    A choice from other values than those that the study asks for does not count.

    Raises:
        UserError: the file is damaged.
    """
    path, sweep = directory / SWEEP, file.settings.sweep
    if sweep is None or not path.is_file():
        return {}
    try:
        rows = [unsealed(row) for row in parse_json(path.read_text(encoding="utf-8"))]
        chosen = {row["member"]: float(row["learning_rate"]) for row in rows if row["chosen"]}
        tried: dict[str, set[float]] = {}
        for row in rows:
            tried.setdefault(row["member"], set()).add(float(row["learning_rate"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable sweep ({' '.join(str(error).split())}); remove it") from None
    wanted, members = set(sweep.learning_rate), file.settings.members
    return {
        name: {LEARNING_RATE: rate}
        for name, rate in chosen.items()
        if name in members and members[name].is_swept and tried[name] == wanted
    }
