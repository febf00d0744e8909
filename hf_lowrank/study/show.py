"""What a study says in the terminal, before and after."""

from __future__ import annotations

from typing import Any

from hf_lowrank.study.engine import StudyResult
from hf_lowrank.study.plan import Plan, plan_tables


def print_plan(plan: Plan, console: Any) -> None:
    """What will run."""
    for table in plan_tables(plan):
        console.print(table)


def print_result(result: StudyResult, console: Any) -> None:
    """The claims, the answer's table, where the page is, and what failed."""
    from hf_lowrank.claims import claims_table, read_claims
    from hf_lowrank.report import terminal_table

    claims = result.directory / "claims.json"
    if result.page is not None and claims.is_file():
        found = read_claims(claims)
        if any(claim.verdict != "undecided" for claim in found):
            console.print(claims_table(found))
        else:
            print(f"{len(found)} claims of the paper were tested, all undecided at this scale; the page says why")  # noqa: T201
    if result.page is not None:
        console.print(terminal_table(result.runs, study=result.directory))
        print(f"page: {result.page}")  # noqa: T201
    alike: dict[tuple[str, str], list[str]] = {}
    for failure in result.failures:
        alike.setdefault((failure.stage, failure.reason), []).append(failure.what)
    for (stage, reason), what in alike.items():
        print(f"failed: {stage} {', '.join(what)}: {reason}")  # noqa: T201
