"""What a study prints to the terminal, before and after it runs."""

from typing import Any

from hf_lowrank.claims.results import CLAIMS
from hf_lowrank.formats import byte_size, duration, pluralize
from hf_lowrank.study.engine import StudyResult
from hf_lowrank.study.plan import Plan


def print_plan(plan: Plan, console: Any) -> None:
    """What will run, and what it takes."""
    for table in plan_tables(plan):
        console.print(table)


def print_result(result: StudyResult, console: Any) -> None:
    """The claims, the table of methods, where the page is, and what failed."""
    from hf_lowrank.claims import claims_table, read_claims
    from hf_lowrank.report.terminal import sweep_table, terminal_table

    claims = result.directory / CLAIMS
    if result.page is not None and claims.is_file():
        found = read_claims(claims)
        if any(claim.verdict != "undecided" for claim in found):
            console.print(claims_table(found))
        else:
            print(f"{len(found)} claims of the paper tested, all undecided at this scale; the page explains why")  # noqa: T201
    if result.page is not None:
        tuning = sweep_table(result.runs, result.directory)
        if tuning is not None:
            console.print(tuning)
        console.print(terminal_table(result.runs, study=result.directory))
        print(f"page: {result.page}")  # noqa: T201
    units: dict[tuple[str, str], list[str]] = {}
    for failure in result.failures:
        units.setdefault((failure.stage, failure.reason), []).append(failure.what)
    for (stage, reason), names in units.items():
        print(f"failed: {stage} {', '.join(names)}: {reason}")  # noqa: T201


def result_document(result: StudyResult) -> dict[str, Any]:
    """The plan and, of what has been run, failures, claims and the answer, for JSON."""
    from hf_lowrank.claims import read_claims
    from hf_lowrank.report.terminal import answer_document

    claims = result.directory / CLAIMS
    shown = result.page is not None
    return {
        "directory": result.directory,
        "plan": result.plan,
        "seconds": result.plan.seconds,
        "left": result.plan.left,
        "failures": result.failures,
        "page": result.page,
        "claims": read_claims(claims) if shown and claims.is_file() else [],
        "answer": answer_document(result.runs, study=result.directory) if shown else [],
    }


def plan_tables(plan: Plan) -> list[Any]:
    """The plan as rich tables and a line."""
    from rich.table import Table

    members = Table(title=f"{plan.name}: members, with time, disk and memory per run", title_justify="left")
    for column in ("member", "what"):
        members.add_column(column, overflow="fold", min_width=10)
    for column in ("trained", "time", "disk", "memory"):
        members.add_column(column, justify="right", no_wrap=True)
    for member in plan.members:
        counts = (f"{member.done} of {member.runs}", _time(member.seconds))
        disk = _size((member.checkpoints or 0) * (member.checkpoint_bytes or 0) or None)
        members.add_row(member.member, member.what, *counts, disk, _size(member.memory_bytes))
    title = f"in {plan.directory}, {plan.jobs} in parallel with {pluralize(plan.threads, 'thread')} each"
    stages = Table(title=title, title_justify="left")
    for column in ("stage", "units", "done", "to do", "takes about"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for stage in plan.stages:
        seconds = None if stage.seconds is None else stage.seconds / min(plan.jobs, max(stage.left, 1))
        takes = f"skipped: {stage.skipped}" if stage.skipped else _time(seconds)
        stages.add_row(stage.stage, str(stage.total), str(stage.done), str(stage.left), takes)
    total = f"about {_time(plan.seconds)} in total, {_size(plan.disk_bytes)} of disk"
    total += f", up to {_size(plan.memory_bytes)} of memory at a time" if plan.memory_bytes else ""
    return [members, stages, total]


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else duration(seconds)


def _size(count: int | None) -> str:
    return "–" if count is None else byte_size(count)
