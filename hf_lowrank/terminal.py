"""The terminal: what is printed there, once for all processes of a launch."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

from hf_lowrank.errors import LowRankWarning
from hf_lowrank.locks import is_first_process

if TYPE_CHECKING:
    from rich.console import Console

# Where a terminal says that it has no width at all.
WIDTH = 80


def console() -> Console:
    """Where tables go."""
    from rich.console import Console

    quiet = not is_first_process()
    made = Console(quiet=quiet)
    return made if made.width > 0 else Console(quiet=quiet, width=WIDTH)


def echo(line: str) -> None:
    """Prints a line of a command's outcome."""
    if is_first_process():
        print(line, flush=True)  # noqa: T201


def lose_no_line() -> None:
    """Lets characters that the output's encoding does not have be question marks in place of errors."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # streams that a caller put there
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def no_bars_in_logs() -> None:
    """Keeps the Hub client's bars out of what is no terminal, and to one process."""
    from huggingface_hub.utils import disable_progress_bars

    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ and not (sys.stderr.isatty() and is_first_process()):
        disable_progress_bars()


def warn_in_lines() -> None:
    """Lets this package's own warnings read as everything else that a command says, without the source's line."""
    usual = warnings.formatwarning

    def as_line(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> str:
        if not issubclass(category, LowRankWarning):
            return usual(message, category, filename, *rest)  # type: ignore[arg-type]
        return f"hf-lowrank: {message}\n" if is_first_process() else ""

    warnings.formatwarning = as_line  # type: ignore[assignment]
