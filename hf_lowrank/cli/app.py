"""The application that commands register with, its help and exit statuses, and what is set up before each command."""

import logging
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import hf_lowrank
from hf_lowrank.compat import silence_torchao
from hf_lowrank.errors import STOPPED_STATUS
from hf_lowrank.formats import hide_hub_progress_bars, is_first_process

NAME = "hf-lowrank"

# The help's headings with their commands, in order.
GROUPS = {
    "Commands to train": ("train", "study", "memory", "methods"),
    "Commands to look at what was trained": ("measure", "report", "evaluate", "predict", "lm-eval", "metrics"),
    "Commands to publish": ("push", "export"),
    "Commands for the shell": ("completion",),
}

INCOMPLETE_STATUS = 1
WRONG_INPUT_STATUS = 2
CRASHED_STATUS = 70  # an internal software error in sysexits.h
INTERRUPTED_STATUS = 130  # 128 + SIGINT
STATUSES = {
    0: "success; finished work that was skipped counts as success",
    INCOMPLETE_STATUS: "the command ended, but a score or a unit of a study that was asked for is missing",
    WRONG_INPUT_STATUS: "wrong input, a full disk, or training that diverged; one line says what to change",
    CRASHED_STATUS: "an unexpected error, with its traceback",
    STOPPED_STATUS: "stopped by SIGTERM and saved; the same command resumes",
    INTERRUPTED_STATUS: "interrupted by Ctrl-C; the same command resumes",
}


class Command(TyperCommand):
    """A command whose epilog, its examples, is printed line by line."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Commands(TyperGroup):
    """All commands, listed by group, and the exit statuses that they share."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the help."""
        return [name for names in GROUPS.values() for name in names]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading, names in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=200)) for name in names])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Exit status"):
            formatter.write_dl([(str(status), meaning) for status, meaning in STATUSES.items()])
        formatter.write_paragraph()
        formatter.write_text(f"{NAME} COMMAND --help has examples.")


app = typer.Typer(
    name=NAME,
    cls=Commands,
    help="Pre-train with low-rank methods, measure which solution was found, and report it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def command(*examples: str, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
    """Registers a command, which has a place in `GROUPS`, with its examples, a line each."""
    return app.command(name, cls=Command, epilog="\n".join(examples), **options)


def show_version(wanted: bool) -> None:
    """Prints the version and ends."""
    if wanted:
        typer.echo(f"{NAME} {hf_lowrank.__version__}")
        raise typer.Exit


@app.callback()
def prepare(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Pre-train with low-rank methods, measure which solution was found, and report it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    hide_hub_progress_bars()
    silence_torchao()
    logger = logging.getLogger("hf_lowrank")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("hf-lowrank: %(message)s"))
        logger.addHandler(handler)
        # The processes of a launch log the same lines; one of them prints them.
        logger.setLevel(logging.INFO if is_first_process() else logging.WARNING)
