"""Arguments that several commands share, and the checks that need nothing but the argument.

The functions behind a command make these checks, too, but load more for it.
"""

import os
import re
from collections.abc import Callable
from typing import Annotated, Any

from typer import Argument, Option

from hf_lowrank.errors import UserError

# A test compares them with the study's own.
STAGES = ("sweep", "train", "measure", "evaluate", "predict", "claims", "report")


def each(fault: Callable[[Any], str | None]) -> Callable[[Any], Any]:
    """A check of an argument, or of each of its values: `fault` says what is wrong with one, or None."""

    def check(given: Any) -> Any:
        for value in given if isinstance(given, list) else [given]:
            message = None if value is None else fault(value)
            if message is not None:
                raise UserError(message)
        return given

    return check


def existing_file(kind: str) -> Callable[[Any], Any]:
    """A check that files exist; `kind` names them in the message."""
    return each(lambda path: None if path.is_file() else f"{path}: no such {kind} file")


def existing_folder(kind: str) -> Callable[[Any], Any]:
    """A check that folders exist; `kind` names them in the message."""
    return each(lambda path: None if os.path.isdir(path) else f"{path}: no such {kind}")


@each
def check_runs(run: str) -> str | None:
    if os.path.isdir(run) or (run.count("/") == 1 and not run.startswith((".", "/", "~"))):
        return None
    return f"{run}: no such folder; give a run directory, a folder of checkpoints, or user/repo"


@each
def check_steps(steps: str) -> str | None:
    valid = re.fullmatch(r"all|last|\s*\d+\s*(,\s*\d+\s*)*", steps)
    return None if valid else f"steps must be all, last or numbers such as 100,200, got {steps!r}"


@each
def check_metrics(names: str) -> None:
    from hf_lowrank.metrics import METRICS

    METRICS.select(names)


@each
def check_stages(names: str) -> str | None:
    wrong = [name for name in names.split(",") if name.strip() not in STAGES] if names else []
    return f"stages must be some of {','.join(STAGES)}, got {wrong[0]!r}" if wrong else None


Recipe = Argument(metavar="RECIPE", callback=existing_file("recipe"), help="A recipe, e.g. recipes/nano/galore.yaml.")
Runs = Annotated[
    list[str],
    Argument(
        metavar="RUN...",
        callback=check_runs,
        help="Run directories, folders of checkpoints, or Hub repositories (user/repo@step-N).",
    ),
]
Overrides = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override one recipe key; repeatable.")
]
Revisions = Annotated[str | None, Option(metavar="PATTERN", help="Which revisions are checkpoints, e.g. 'step*'.")]
Steps = Annotated[
    str | None, Option(callback=check_steps, help="all, last, or numbers such as 100,200; default: all.")
]
Json = Annotated[bool, Option("--json", help="Print one JSON document instead of tables.")]
