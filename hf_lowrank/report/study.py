"""What a study wrote beside its runs: claims, prediction, sweep and failures, each only where it is there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_lowrank.errors import UserError
from hf_lowrank.runs.layout import PREDICTION
from hf_lowrank.storage.checksums import unsealed
from hf_lowrank.storage.parsing import parse_json

Verdict = Literal["reproduced", "contradicted", "undecided"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "contradicted", "undecided")


@dataclass(frozen=True)
class Effect:
    """An effect with its interval, None where there is none; `part` and `verdict` as in `hf_lowrank.claims.Detail`."""

    label: str
    effect: float | None
    low: float | None
    high: float | None
    p_value: float | None
    n: int | None
    unit: str = ""
    part: str = ""
    verdict: Verdict | None = None
    reason: str = ""


@dataclass(frozen=True)
class Claim:
    """One claim of the study this package repeats, and what became of it."""

    id: str
    statement: str
    verdict: Verdict
    whole: Effect
    test: str
    reason: str
    sentence: str
    details: tuple[Effect, ...]


@dataclass(frozen=True)
class Rate:
    """A run of the learning-rate sweep."""

    member: str
    learning_rate: float
    loss: float | None
    chosen: bool
    at_edge: bool


@dataclass(frozen=True)
class Failure:
    what: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Study:
    """A study's results as they lie on disk; `prediction` as `hf-lowrank predict` writes it."""

    folder: Path | None = None
    claims: tuple[Claim, ...] = ()
    alpha: float | None = None
    prediction: Mapping[str, Any] | None = None
    sweep: tuple[Rate, ...] = ()
    failures: tuple[Failure, ...] = field(default=())


def load_study(folder: Path | None) -> Study:
    """Reads a study directory; without one, an empty study.

    Raises:
        UserError: it is no folder, or one of its files is damaged.
    """
    if folder is None:
        return Study()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such study folder; give the folder that holds runs/ and claims.json")
    claims = _content(folder / "claims.json", dict) or {}
    prediction = _content(folder / PREDICTION, dict)
    return Study(
        folder=folder,
        claims=tuple(_each(folder / "claims.json", claims.get("claims", []), _claim)),
        alpha=_number(claims.get("alpha")),
        prediction=prediction if prediction and _is_prediction(prediction) else None,
        sweep=tuple(_each(folder / "sweep.json", _content(folder / "sweep.json", list) or [], _rate)),
        failures=tuple(_each(folder / "failures.json", _content(folder / "failures.json", list) or [], _failure)),
    )


def _content(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        for entry in content if isinstance(content, list) else [content]:
            unsealed(entry if isinstance(entry, dict) else {})
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path}: not readable as JSON: {said}; run that stage of the study again") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: must hold a JSON {'object' if kind is dict else 'list'}; run that stage again")
    return content


def _each(path: Path, entries: Any, make: Any) -> Iterator[Any]:
    for place, entry in enumerate(entries if isinstance(entries, list) else [None]):
        try:
            yield make(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"{path}: entry {place + 1} is not as expected ({said}); run that stage again") from None


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _effect(entry: Mapping[str, Any], label: str) -> Effect:
    n = entry.get("n")
    effect, low, high, p_value = (_number(entry.get(key)) for key in ("effect", "ci_low", "ci_high", "p_value"))
    verdict = entry.get("verdict")
    return Effect(
        label=label,
        effect=effect,
        low=low,
        high=high,
        p_value=p_value,
        n=n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else None,
        unit=str(entry.get("unit") or ""),
        part=str(entry.get("part") or ""),
        verdict=verdict if verdict in VERDICTS else None,
        reason=str(entry.get("reason") or ""),
    )


def _claim(entry: Mapping[str, Any]) -> Claim:
    if entry["verdict"] not in VERDICTS:
        raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {entry['verdict']!r}")
    return Claim(
        id=str(entry["id"]),
        statement=str(entry["statement"]),
        verdict=entry["verdict"],
        whole=_effect(entry, "Overall"),
        test=str(entry.get("test") or ""),
        reason=str(entry.get("reason") or ""),
        sentence=str(entry.get("sentence") or ""),
        details=tuple(_effect(detail, str(detail["label"])) for detail in entry.get("details") or []),
    )


def _rate(entry: Mapping[str, Any]) -> Rate:
    rate = _number(entry["learning_rate"])
    if rate is None or rate <= 0:
        raise ValueError(f"learning_rate must be a positive number, got {entry['learning_rate']!r}")
    loss = _number(entry.get("loss"))
    return Rate(str(entry["member"]), rate, loss, bool(entry.get("chosen")), bool(entry.get("at_edge")))


def _failure(entry: Mapping[str, Any]) -> Failure:
    return Failure(*(str(entry.get(key) or "") for key in ("what", "stage", "reason")))


def _is_prediction(content: Mapping[str, Any]) -> bool:
    return _number(content.get("gain")) is not None and isinstance(content.get("seen"), list)
