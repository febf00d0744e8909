"""Adding geometry and spectra to perplexity predicts downstream scores better."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lowrank.claims.claim import Claim, Detail, Verdict
from hf_lowrank.formats import finite_number, p_text, pluralize, significant
from hf_lowrank.runs.layout import PREDICTION
from hf_lowrank.runs.run_files import read_prediction

TEST = (
    "Two ridge regressions on checkpoints, log-perplexity alone against log-perplexity and the metrics, judged on "
    "runs left out (`hf-lowrank predict`). The gain in R² has a 95 % bootstrap interval over runs and a permutation "
    "p-value that exchanges geometry between runs. Reproduced if the interval lies above zero and p < {alpha:g}; "
    "contradicted if the interval lies below zero: with these metrics the scores of unseen runs are predicted "
    "worse; else undecided."
)

SINGLE = "single metric"


def prediction_claim(path: str | os.PathLike[str] | None, *, alpha: float = 0.05) -> Claim:
    """The claim from a `prediction.json` (or the folder that holds it); undecided without one.

    Raises:
        UserError: the file is there and is no prediction.
    """
    statement = "Adding geometry and spectra to perplexity predicts downstream scores better."
    common: dict[str, Any] = {
        "id": "prediction", "statement": statement, "unit": "R²", "test": TEST.format(alpha=alpha),
    }  # fmt: skip
    content = None if path is None else read_prediction(Path(path))
    if content is None:
        reason = "nothing was predicted" + ("" if path is None else f": no {PREDICTION}")
        return Claim(**common, verdict="undecided", reason=reason, sentence=f"Not tested: {reason}.")
    gain, low, high, p = (finite_number(content.get(key)) for key in ("gain", "gain_low", "gain_high", "p_value"))
    runs = content.get("runs")
    runs = runs if isinstance(runs, int) else 0
    verdict: Verdict = "undecided"
    if gain is None or low is None or high is None or p is None:
        reason = "the prediction lacks a gain with interval and p-value"
    elif low > 0 and p < alpha:
        verdict, reason = "reproduced", "the gain's interval lies above zero, and permuted geometry does not reach it"
    elif high < 0:
        verdict, reason = "contradicted", "the gain's interval lies below zero"
    elif low > 0:
        reason = f"the interval lies above zero, but permuted geometry gains as much ({p_text(p)})"
    else:
        reason = "the gain's interval includes zero" + (f", though {p_text(p)}" if p < alpha else f" ({p_text(p)})")
    alone, both = (finite_number(content.get(key)) for key in ("r2_perplexity", "r2_both"))
    sentence = f"Not tested: {reason}."
    if gain is not None:
        bounds = "" if low is None or high is None else f" (95 % interval {significant(low)} to {significant(high)})"
        change = "" if alone is None or both is None else f" from {significant(alone)} to {significant(both)}"
        sentence = (
            f"With geometry in addition to perplexity, R² on runs left out changes{change}: "
            f"{significant(gain)} more{bounds}, {p_text(p)} by permutation, {pluralize(runs, 'run')}."
        )
    ranking = content.get("ranking")
    details = [
        Detail(label=str(one.get("metric")), effect=finite_number(one.get("gain")), n=runs, unit="R²", reason=SINGLE)
        for one in (ranking if isinstance(ranking, list) else [])
        if isinstance(one, Mapping)
    ]
    return Claim(
        **common, verdict=verdict, effect=gain, ci_low=low, ci_high=high, p_value=p, n=runs, reason=reason,
        sentence=sentence, details=tuple(details),
    )  # fmt: skip
