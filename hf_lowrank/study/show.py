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
    """The answer's table, the claims, where the page is, and what failed."""
    from hf_lowrank.claims import claims_table, read_claims
    from hf_lowrank.report import terminal_table

    if result.page is not None:
        console.print(terminal_table(result.runs, study=result.directory))
    claims = result.directory / "claims.json"
    if result.page is not None and claims.is_file():
        console.print(claims_table(read_claims(claims)))
    if result.page is not None:
        print(f"page: {result.page}")  # noqa: T201
    alike: dict[tuple[str, str], list[str]] = {}
    for failure in result.failures:
        alike.setdefault((failure.stage, failure.reason), []).append(failure.what)
    for (stage, reason), what in alike.items():
        print(f"failed: {stage} {', '.join(what)}: {reason}")  # noqa: T201
