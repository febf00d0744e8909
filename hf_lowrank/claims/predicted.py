"""Adding geometry and spectra to perplexity predicts downstream scores better."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lowrank.claims.claim import Claim, Detail, Verdict
from hf_lowrank.claims.results import QUESTIONS
from hf_lowrank.formats import finite_number, p_text, pluralize, significant
from hf_lowrank.runs.layout import PREDICTION
from hf_lowrank.runs.measurements import NOT_DENSE
from hf_lowrank.runs.run_files import read_prediction

TEST = (
    "Two ridge regressions on checkpoints, log-perplexity with its square against the same and the metrics, are "
    "evaluated on methods left out in turn (`hf-lowrank predict`): all seeds of a method are one observation. The "
    "gain in R² has a 95 % jackknife interval over methods, and a permutation p-value that exchanges the methods' "
    "geometry. Reproduced if the interval lies above zero and p < {alpha:g}; contradicted if the interval lies below "
    "zero: with these metrics the scores of unseen methods are predicted worse; else undecided. The gain for unseen "
    "runs of known methods is stated next to it and decides nothing."
)


def prediction_claim(path: str | os.PathLike[str] | None, *, alpha: float = 0.05) -> Claim:
    """The claim from a `prediction.json` (or the folder that holds it); undecided without one.

    Raises:
        UserError: the file is there and is not a prediction.
    """
    statement = "Adding geometry and spectra to perplexity predicts downstream scores better."
    common: dict[str, Any] = {
        "id": "prediction", "statement": statement, "unit": "R²", "test": TEST.format(alpha=alpha),
    }  # fmt: skip
    content = None if path is None else read_prediction(Path(path))
    if content is None:
        reason = "nothing was predicted" + ("" if path is None else f": no {PREDICTION}")
        return Claim(**common, verdict="undecided", reason=reason, sentence=f"Not tested: {reason}.")
    of_method, of_run = (content.get(name) for name in QUESTIONS)
    if not isinstance(of_method, Mapping) or not isinstance(of_run, Mapping):
        reason = f"{PREDICTION} is from an earlier version, which treated seeds as independent; predict again"
        return Claim(**common, verdict="undecided", reason=reason, sentence=f"Not tested: {reason}.")
    gain, low, high, p = (finite_number(of_method.get(key)) for key in ("gain", "gain_low", "gain_high", "p_value"))
    verdict: Verdict = "undecided"
    if gain is None or low is None or high is None or p is None:
        reason = str(of_method.get("reason") or "the prediction lacks a gain with interval and p-value")
    elif low > 0 and p < alpha:
        verdict, reason = "reproduced", "the gain's interval lies above zero, and permuted geometry does not reach it"
    elif high < 0:
        verdict, reason = "contradicted", "the gain's interval lies below zero"
    elif low > 0:
        reason = f"the interval lies above zero, but permuted geometry gains as much ({p_text(p)})"
    else:
        reason = "the gain's interval includes zero" + (f", though {p_text(p)}" if p < alpha else f" ({p_text(p)})")
    methods, runs = _count(of_method, "methods"), _count(of_run, "runs")
    sentence = (
        f"Methods left out ({pluralize(methods, 'method')}): {_gain_text(of_method)} "
        f"Runs of known methods left out ({pluralize(runs, 'run')}): {_gain_text(of_run)}"
    )
    notes = content.get("notes")
    for note in notes if isinstance(notes, list) else ():
        if isinstance(note, str) and note.startswith(NOT_DENSE):
            sentence += f" {note[0].upper()}{note[1:]}."
    details = [
        Detail(label=f"{one.get('metric')} ({label})", effect=finite_number(one.get("gain")), n=n, unit="R²",
               reason="single metric")
        for answer, label, n in ((of_method, "unseen methods", methods), (of_run, "unseen runs", runs))
        for one in _ranking(answer)
    ]  # fmt: skip
    return Claim(
        **common, verdict=verdict, effect=gain, ci_low=low, ci_high=high, p_value=p, n=methods, reason=reason,
        sentence=sentence, details=tuple(details),
    )  # fmt: skip


def _ranking(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = answer.get("ranking")
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _count(answer: Mapping[str, Any], key: str) -> int:
    count = answer.get(key)
    return count if isinstance(count, int) else 0


def _gain_text(answer: Mapping[str, Any]) -> str:
    """The answer to one question as the rest of a sentence."""
    gain, low, high, p = (finite_number(answer.get(key)) for key in ("gain", "gain_low", "gain_high", "p_value"))
    if gain is None or low is None or high is None or p is None:
        return f"not tested, {answer.get('reason') or 'no gain is known'}."
    alone, both = (finite_number(answer.get(key)) for key in ("r2_perplexity", "r2_both"))
    change = "" if alone is None or both is None else f" from {significant(alone)} to {significant(both)}"
    return (
        f"geometry changes R²{change}, a gain of {significant(gain)} "
        f"(95 % interval {significant(low)} to {significant(high)}, {p_text(p)} by permutation)."
    )
