"""From run folders to the table of claims."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hf_lowrank.claims.activations import activations
from hf_lowrank.claims.claim import VERDICT_WORDS, VERDICTS, Claim, Detail
from hf_lowrank.claims.landscape import barriers, pca1_sharpness, random_sharpness
from hf_lowrank.claims.order import downstream_order
from hf_lowrank.claims.predicted import prediction_claim
from hf_lowrank.claims.ranks import rank_structure
from hf_lowrank.claims.study import load_study
from hf_lowrank.formats import console, pluralize, significant

if TYPE_CHECKING:
    from rich.table import Table


def examine(
    runs: Iterable[Any],
    *,
    baseline: str = "full_rank",
    prediction: str | os.PathLike[str] | None = None,
    alpha: float = 0.05,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int | None] | None = None,
) -> list[Claim]:
    """The seven claims of arXiv 2605.13652, each tested over the seeds of these runs.

    Reads `measurements.jsonl`, `downstream.jsonl` and the training log. Compares only numbers measured with
    equal settings on the same sequences, at the last step that all methods have (`study.common`), paired by seed.
    Sharpness is compared on dense weights alone; a method that has none is named and left out.
    Missing data make a claim undecided, with the reason; a verdict needs at least three seeds.

    Args:
        runs: run folders, or anything with a `path` to one. A run without a seed is left out.
        baseline: the method that the others are compared with.
        prediction: `prediction.json` as `hf_lowrank.downstream.predict` writes it, or its folder; None, or one that
            is not there, leaves that claim undecided.
        alpha: of every test; intervals have confidence 1 − alpha.
        methods: a name per run, instead of its recipe's method: for studies with several members of one method.
        seeds: a seed per run, instead of its recipe's: for runs that came without a recipe.

    Raises:
        UserError: a folder is not a run or is damaged; two runs have the same method and seed, or were evaluated on
            different sequences (both are named); `prediction` is not valid.
    """
    study = load_study(runs, baseline=baseline, alpha=alpha, methods=methods, seeds=seeds)
    return [
        random_sharpness(study),
        pca1_sharpness(study),
        barriers(study),
        activations(study),
        downstream_order(study),
        prediction_claim(prediction, alpha=alpha),
        rank_structure(study),
    ]


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
    counts = ", ".join(f"{sum(claim.verdict == verdict for claim in claims)} {verdict}" for verdict in VERDICTS)
    title = f"{pluralize(len(claims), 'claim')}: {counts}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", width=room)
    table.add_column("Claim", ratio=3)
    table.add_column("Verdict", min_width=12)
    if wide:
        for name in ("Effect", "p", "n"):
            table.add_column(name, justify="right")
    table.add_column("Found", ratio=5 if wide else 4)
    for claim in claims:
        found = claim.sentence if claim.verdict == "reproduced" else claim.finding
        words = VERDICT_WORDS[claim.verdict].replace(" at", "\nat")
        cells = [Text(claim.statement), Text(words, style=STYLES[claim.verdict])]
        table.add_row(*cells, *(_numbers(claim) if wide else ()), Text(found))
        for part in claim.details:
            if part.verdict is not None:
                cells = [Text(f"  {part.label}"), Text(part.verdict, style=STYLES[part.verdict])]
                table.add_row(*cells, *(_numbers(part) if wide else ()), Text(""))
        table.add_section()
    return table


def _numbers(entry: Claim | Detail) -> tuple[str, str, str]:
    """Effect with interval, p-value and n."""
    if entry.effect is None:
        return "—", "—", str(entry.n) if entry.n else "—"
    effect = significant(entry.effect) + (f" {entry.unit}" if entry.unit else "")
    if entry.ci_low is not None and entry.ci_high is not None:
        effect += f"\n{significant(entry.ci_low)} to {significant(entry.ci_high)}"
    p = "—" if entry.p_value is None else "<0.001" if entry.p_value < 0.001 else f"{entry.p_value:.2g}"
    return effect, p, str(entry.n)
