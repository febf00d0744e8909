"""`trainer_state.json` of a checkpoint: its step, the planned last step, and what Trainer logged up to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs.layout import TRAINER_STATE
from hf_lowrank.storage.checksums import checked_names, damage_by_checksums
from hf_lowrank.storage.parsing import parse_json


@dataclass(frozen=True)
class TrainerState:
    """What Trainer wrote with a checkpoint.

    Attributes:
        step: optimizer steps taken; None where the file does not say.
        max_steps: the step at which training ends; None where the file does not say.
        log: the log history, one mapping per entry.
    """

    step: int | None = None
    max_steps: int | None = None
    log: tuple[Mapping[str, Any], ...] = ()

    @property
    def finished(self) -> bool:
        """Whether this is the last step of the training."""
        return self.step is not None and self.max_steps is not None and self.step >= self.max_steps

    def logged(self, key: str) -> dict[int, float]:
        """The finite values of one key by step, in step order; of several entries of a step the last counts."""
        found = {
            int(entry["step"]): float(entry[key])
            for entry in self.log
            if is_number(entry.get(key)) and is_number(entry.get("step"))
        }
        return dict(sorted(found.items()))

    def loss_at(self, step: int) -> float | None:
        """The evaluation loss at a step, else the training loss last logged up to it, in nats per token."""
        training = [loss for at, loss in self.logged("loss").items() if at <= step]
        return self.logged("eval_loss").get(step, training[-1] if training else None)


def is_number(value: object) -> bool:
    """Whether `value` is a finite number, and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_trainer_state(checkpoint: Path) -> TrainerState | None:
    """The state in a checkpoint's folder; None where Trainer left none.

    Raises:
        UserError: it is damaged.
    """
    file = checkpoint / TRAINER_STATE
    damage = damage_by_checksums(checkpoint, [file.name]) if file.name in checked_names(checkpoint) else None
    if damage is not None:
        raise UserError(f"{checkpoint}: damaged: {damage}")
    return parse_trainer_state(file) if file.is_file() else None


def parse_trainer_state(file: Path) -> TrainerState:
    """The state in a file of that name.

    Raises:
        UserError: it is not readable.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(content, Mapping):
            raise ValueError(f"must be a JSON object, got {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable trainer state: {one_line(error)}") from None
    step, max_steps = (_whole(content.get(key)) for key in ("global_step", "max_steps"))
    log = content.get("log_history")
    entries = [entry for entry in log if isinstance(entry, Mapping)] if isinstance(log, list) else []
    return TrainerState(step, max_steps, tuple(entries))


def _whole(value: object) -> int | None:
    return int(value) if is_number(value) else None  # type: ignore[call-overload]
