"""The claims as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_lowrank.claims.claim import VERDICT_WORDS, VERDICTS, Claim, Detail
from hf_lowrank.formats import console, pluralize, significant

if TYPE_CHECKING:
    from rich.table import Table

# From so many columns on, numbers have columns of their own.
WIDE = 120
STYLES = {"reproduced": "green", "contradicted": "red", "undecided": "yellow"}


def claims_table(claims: Sequence[Claim], width: int | None = None) -> Table:
    """Claim, verdict and what was found; parts of a claim have rows of their own.

    Args:
        width: characters; None: this terminal's. From 120 on effect, p-value and n have columns.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    room = console().width if width is None else width
    wide = room >= WIDE
    table = Table(box=box.SIMPLE_HEAD, title=_title(claims), title_justify="left", width=room)
    table.add_column("Claim", ratio=3)
    table.add_column("Verdict", min_width=12)
    if wide:
        for name in ("Effect", "p", "n"):
            table.add_column(name, justify="right")
    table.add_column("Found", ratio=5 if wide else 4)
    for claim in claims:
        found = claim.sentence
        if claim.verdict != "reproduced" and claim.reason not in found:
            found += f"{' ' if found else ''}{claim.reason[:1].upper()}{claim.reason[1:]}."
        words = VERDICT_WORDS[claim.verdict].replace(" at", "\nat")
        cells = [Text(claim.statement), Text(words, style=STYLES[claim.verdict])]
        table.add_row(*cells, *(_numbers(claim) if wide else ()), Text(found))
        for part in claim.details:
            if part.verdict is not None:
                cells = [Text(f"  {part.label}"), Text(part.verdict, style=STYLES[part.verdict])]
                table.add_row(*cells, *(_numbers(part) if wide else ()), Text(""))
        table.add_section()
    return table


def _title(claims: Sequence[Claim]) -> str:
    counts = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in VERDICTS}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"{pluralize(len(claims), 'claim')}: {said}"


def _numbers(entry: Claim | Detail) -> tuple[str, str, str]:
    """Effect with interval, p-value and n."""
    if entry.effect is None:
        return "—", "—", str(entry.n) if entry.n else "—"
    effect = significant(entry.effect) + (f" {entry.unit}" if entry.unit else "")
    if entry.ci_low is not None and entry.ci_high is not None:
        effect += f"\n{significant(entry.ci_low)} to {significant(entry.ci_high)}"
    p = "—" if entry.p_value is None else "<0.001" if entry.p_value < 0.001 else f"{entry.p_value:.2g}"
    return effect, p, str(entry.n)
