"""A claim of the paper with its verdict, and the file of claims."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.storage.checksums import sealed, unsealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import null_non_finite, parse_json
from hf_lowrank.storage.tables import row_of

Verdict = Literal["reproduced", "contradicted", "undecided"]
VERDICT_WORDS: dict[Verdict, str] = {
    "reproduced": "reproduced",
    "contradicted": "contradicted",
    "undecided": "undecided at this scale",
}
"""What tables and pages call each verdict."""
VERDICTS = tuple(VERDICT_WORDS)
VERDICT_MEANING: dict[Verdict, str] = {
    "reproduced": "the interval of the effect lies on the claim's side",
    "contradicted": "it lies on the other side",
    "undecided": "these runs allow neither",
}


@dataclass(frozen=True, kw_only=True)
class Detail:
    """One comparison of a claim: a method, a pair of methods, a layer, a step.

    Attributes:
        label: what is compared, readable by itself.
        effect, ci_low, ci_high: as for the claim; None where there is none.
        p_value: two-sided, by Student's t, not corrected for the other comparisons; None where nothing is tested.
        p_sign_flip: the exact two-sided sign-flip p-value of the same differences.
        n: seeds.
        unit: of the effect.
        part: the part of the claim that it belongs to; empty where the claim has one part.
        verdict: of the whole part; None for a single comparison.
        reason: why there is no number, or a remark on one.
    """

    label: str
    effect: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p_value: float | None = None
    p_sign_flip: float | None = None
    n: int = 0
    unit: str = ""
    part: str = ""
    verdict: Verdict | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim and its verdict.

    Attributes:
        id: `random_sharpness`, `pca1_sharpness`, `barriers`, `activations`, `downstream_order`, `prediction`,
            `rank_structure`.
        statement: the claim in a sentence.
        verdict: "undecided" is to be read as "at this scale", see VERDICT_WORDS.
        effect, ci_low, ci_high: what decides the verdict, with its interval of confidence 1 − α; None for a claim of
            several parts, which have theirs among the details.
        unit: of the effect.
        p_value: that the claim does not hold; of a contradicted claim, that it is not the other way round.
        n: seeds of the comparison with the fewest; of the prediction, runs.
        test: how it was tested, and what each verdict means.
        reason: why this verdict.
        sentence: what was found, with numbers.
        details: every comparison.
    """

    id: str
    statement: str
    verdict: Verdict
    effect: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    unit: str = ""
    p_value: float | None = None
    n: int = 0
    test: str = ""
    reason: str = ""
    sentence: str = ""
    details: tuple[Detail, ...] = ()

    @property
    def finding(self) -> str:
        """The sentence, followed by the reason as one of its own unless the sentence contains it."""
        if self.reason in self.sentence:
            return self.sentence
        return f"{self.sentence} {self.reason[:1].upper()}{self.reason[1:]}.".strip()

    @property
    def overall(self) -> Detail:
        """The deciding effect, as a comparison."""
        return Detail(
            label="Overall", effect=self.effect, ci_low=self.ci_low, ci_high=self.ci_high, p_value=self.p_value,
            n=self.n, unit=self.unit, reason=self.reason or None,
        )  # fmt: skip


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path) / "claims.json" if Path(path).is_dir() else Path(path)


def write_claims(claims: Sequence[Claim], path: str | os.PathLike[str], *, alpha: float = 0.05) -> Path:
    """Writes `{"claims": [...], "alpha": …}`; a folder gets `claims.json`. Numbers that are not finite become null.

    Raises:
        UserError: the file cannot be written.
    """
    file = _file(path)
    content = {"claims": [null_non_finite(asdict(claim)) for claim in claims], "alpha": alpha}
    try:
        write_text(file, json.dumps(sealed(content), ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{file}: claims cannot be written: {error.strerror or error}") from None
    return file


def read_claims(path: str | os.PathLike[str]) -> list[Claim]:
    """The claims of a file, or of a folder's `claims.json`; unknown keys are ignored.

    Raises:
        UserError: the file cannot be read or is not valid.
    """
    file = _file(path)
    try:
        content = unsealed(parse_json(file.read_text(encoding="utf-8")))
        return [parse_claim(entry) for entry in content["claims"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = one_line(error)
        raise UserError(f"{file}: not a valid claims file ({reason}); rerun the claims stage of the study") from None


def parse_claim(entry: Mapping[str, Any]) -> Claim:
    """The claim that an entry of the file describes.

    Raises:
        ValueError, TypeError or AttributeError: it is not valid.
    """
    details = tuple(row_of(Detail, detail) for detail in entry.get("details") or ())
    claim = row_of(Claim, {**entry, "details": details})
    for verdict in (claim.verdict, *(detail.verdict for detail in details if detail.verdict is not None)):
        if verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {verdict!r:.80}")
    return claim
