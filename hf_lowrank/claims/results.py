"""What the stages of a study write next to its runs: claims, prediction, sweep and failures, each if it exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hf_lowrank.claims.claim import Claim, parse_claim
from hf_lowrank.errors import UserError, one_line
from hf_lowrank.formats import finite_number
from hf_lowrank.runs.run_files import read_prediction, read_result
from hf_lowrank.storage.tables import row_of

CLAIMS, SWEEP, FAILURES = "claims.json", "sweep.json", "failures.json"
LEARNING_RATE = "training.learning_rate"
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
    """One run of the sweep, an entry of sweep.json.

    Attributes:
        values: what it tried, by recipe key.
        ranges: the member's values and ranges, by recipe key; empty in files that list the learning rate alone.
        loss: held-out, at its end; None for a trial that failed, and `failure` says why.
        extension: whether it is one step beyond an edge.
        edges: of the chosen trial: how many values were tried beyond its own, by key; 0 is an edge.
    """

    member: str
    values: Mapping[str, Any] | None = None
    ranges: Mapping[str, Any] = field(default_factory=dict)
    loss: float | None = None
    failure: str | None = None
    chosen: bool = False
    extension: bool = False
    edges: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    at_edge: bool = False

    def __post_init__(self) -> None:
        if self.values is None and self.learning_rate is not None:  # a file that lists the learning rate alone
            object.__setattr__(self, "values", {LEARNING_RATE: self.learning_rate})
            object.__setattr__(self, "edges", {LEARNING_RATE: 0} if self.at_edge else {})
        if not self.values or not all(isinstance(value, int | float | str) for value in self.values.values()):
            raise ValueError(f"values must be numbers or words by recipe key, got {self.values!r:.80}")
        if LEARNING_RATE in self.tried and not (self.rate or 0) > 0:
            raise ValueError(f"learning_rate must be a positive number, got {self.tried[LEARNING_RATE]!r}")
        if not all(isinstance(count, int) for count in self.edges.values()):
            raise ValueError(f"edges must be counts by recipe key, got {self.edges!r:.80}")

    @property
    def tried(self) -> Mapping[str, Any]:
        """`values`, which every entry has."""
        assert self.values is not None
        return self.values

    @property
    def rate(self) -> float | None:
        """The learning rate that it tried; None where the sweep did not try any."""
        return finite_number(self.tried.get(LEARNING_RATE))

    @property
    def at_edges(self) -> tuple[str, ...]:
        """The keys whose edge its values are at."""
        return tuple(key for key, distance in self.edges.items() if distance == 0)


def value_words(values: Mapping[str, Any]) -> str:
    """`learning rate 0.003, scale 0.25`."""
    return ", ".join(f"{key_words(key)} {value_text(value)}" for key, value in values.items())


def key_words(key: str) -> str:
    """What a recipe key is called in a sentence, e.g. `learning rate`."""
    return key.rpartition(".")[2].replace("_", " ")


def value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def range_text(given: Any) -> str:
    """`0.001, 0.003`, or `0.001 to 0.03`."""
    if not isinstance(given, Mapping):
        return ", ".join(map(value_text, given if isinstance(given, list) else [given]))
    return next((" to ".join(map(value_text, ends)) for ends in given.values() if isinstance(ends, list)), "")


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
        sweep=read_sweep(folder),
        failures=_entries(
            folder / FAILURES, read_result(folder / FAILURES, list) or [], lambda entry: row_of(Failure, entry)
        ),
    )


def read_sweep(folder: Path) -> tuple[Trial, ...]:
    """The trials of a study's sweep; none before it.

    Raises:
        UserError: sweep.json is damaged.
    """
    path = folder / SWEEP
    return _entries(path, read_result(path, list) or [], lambda entry: row_of(Trial, entry))


def _entries(path: Path, entries: Any, parse: Callable[[Any], Entry]) -> tuple[Entry, ...]:
    found = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [None], start=1):
        try:
            found.append(parse(entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = one_line(error)
            raise UserError(f"{path}: entry {number} is not valid ({reason}); rerun that stage of the study") from None
    return tuple(found)
