"""The command line: one thin function per stage. All logic is in the functions that they call.

What the commands need is imported inside them, so that help and errors in the arguments come at once.
"""

import os
import sys
import traceback
from typing import NoReturn

import typer

from hf_lowrank.cli import catalogue, look, publish, shell, train  # their commands register with `app`
from hf_lowrank.cli.app import CRASHED_STATUS, INTERRUPTED_STATUS, NAME, WRONG_INPUT_STATUS, app, prepare
from hf_lowrank.errors import STOPPED_STATUS, StoppedError, UserError
from hf_lowrank.formats import print_own_warnings_as_lines, replace_unencodable
from hf_lowrank.storage.files import refusal_of

__all__ = ["app", "catalogue", "look", "main", "prepare", "publish", "shell", "train"]

# typer may vendor click, so the base class of click's usage errors is taken from a public subclass.
UsageFault: type[Exception] = typer.BadParameter.__mro__[2]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with one of `STATUSES`. User errors are one line on stderr."""
    if shell.COMPLETION in os.environ:
        shell.register_shells()
    command = typer.main.get_command(app)
    given = sys.argv[1:] if arguments is None else arguments
    replace_unencodable()
    print_own_warnings_as_lines()
    try:
        status = command.main(args=given or ["--help"], prog_name=NAME, standalone_mode=False)
    except UserError as error:
        _stop(str(error))
    except UsageFault as error:
        context = getattr(error, "ctx", None)
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        message = message.replace(": Value error, ", ": ")  # typer's
        _stop(f"{message} (see {context.command_path} --help)" if context else message)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED_STATUS  # as newer versions of typer return it
    except StoppedError as stop:
        typer.echo(f"hf-lowrank: {stop}", err=True)
        sys.exit(STOPPED_STATUS)
    except OSError as error:
        refusal = refusal_of(error)
        if refusal is None:
            _crash()
        _stop(refusal)
    except Exception:
        _crash()
    if status == INTERRUPTED_STATUS:
        typer.echo("hf-lowrank: interrupted", err=True)
    sys.exit(status if isinstance(status, int) else 0)


def _stop(message: str) -> NoReturn:
    typer.echo("hf-lowrank: " + " ".join(message.split()), err=True)
    sys.exit(WRONG_INPUT_STATUS)


def _crash() -> NoReturn:
    traceback.print_exc()
    typer.echo("hf-lowrank: an unexpected error; please report it with the lines above", err=True)
    sys.exit(CRASHED_STATUS)
