"""What the stages of a study write next to its runs: claims, prediction, sweep and failures, each if it exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hf_lowrank.claims.claim import Claim, parse_claim
from hf_lowrank.errors import UserError, one_line
from hf_lowrank.formats import finite_number
from hf_lowrank.runs.run_files import read_prediction, read_result
from hf_lowrank.storage.tables import row_of

CLAIMS, SWEEP, FAILURES = "claims.json", "sweep.json", "failures.json"
Entry = TypeVar("Entry")

# The questions of `hf-lowrank predict`, in order: title and explanation.
QUESTIONS = {
    "unseen_method": (
        "A method not seen",
        "Each method is left out in turn, with all its runs: its seeds are one observation. This gives the verdict.",
    ),
    "unseen_run": (
        "A run not seen, of a known method",
        "Everything is centred within its method, and each run is left out in turn.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of the learning-rate sweep."""

    member: str
    learning_rate: float
    loss: float | None = None
    chosen: bool = False
    at_edge: bool = False

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate!r}")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What of a study failed: which unit, at which stage, and why."""

    what: str
    stage: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """A study's results; `prediction` as `hf-lowrank predict` writes it."""

    folder: Path | None = None
    claims: tuple[Claim, ...] = ()
    alpha: float | None = None
    prediction: Mapping[str, Any] | None = None
    sweep: tuple[Trial, ...] = ()
    failures: tuple[Failure, ...] = ()


def load_results(folder: Path | None) -> StudyResults:
    """Reads a study's folder; None gives empty results.

    Raises:
        UserError: it is not a folder, or one of its files is damaged.
    """
    if folder is None:
        return StudyResults()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such study folder; give the folder that holds runs/ and {CLAIMS}")
    claims = read_result(folder / CLAIMS) or {}
    prediction = read_prediction(folder) or {}
    predicted = all(isinstance(prediction.get(name), Mapping) for name in QUESTIONS)
    return StudyResults(
        folder=folder,
        claims=_entries(folder / CLAIMS, claims.get("claims", []), parse_claim),
        alpha=finite_number(claims.get("alpha")),
        prediction=prediction if predicted else None,
        sweep=_entries(folder / SWEEP, read_result(folder / SWEEP, list) or [], lambda entry: row_of(Trial, entry)),
        failures=_entries(
            folder / FAILURES, read_result(folder / FAILURES, list) or [], lambda entry: row_of(Failure, entry)
        ),
    )


def _entries(path: Path, entries: Any, parse: Callable[[Any], Entry]) -> tuple[Entry, ...]:
    found = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [None], start=1):
        try:
            found.append(parse(entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = one_line(error)
            raise UserError(f"{path}: entry {number} is not valid ({reason}); rerun that stage of the study") from None
    return tuple(found)
