"""The command line: one thin function per stage. All logic is in the functions that they call.

What the commands need is imported inside them, so that help and errors in the arguments come at once.
"""

import sys
from typing import NoReturn

import typer

from hf_lowrank.cli import catalogue, look, publish, train  # their commands register with `app`
from hf_lowrank.cli.app import app, prepare
from hf_lowrank.errors import STOPPED_STATUS, StoppedError, UserError
from hf_lowrank.formats import print_own_warnings_as_lines, replace_unencodable
from hf_lowrank.storage.files import refusal_of

__all__ = ["app", "catalogue", "look", "main", "prepare", "publish", "train"]

# typer may vendor click, so the base class of click's usage errors is taken from a public subclass.
UsageFault: type[Exception] = typer.BadParameter.__mro__[2]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. User errors are one line on stderr and exit status 2."""
    command = typer.main.get_command(app)
    given = sys.argv[1:] if arguments is None else arguments
    replace_unencodable()
    print_own_warnings_as_lines()
    try:
        status = command.main(args=given or ["--help"], prog_name="hf-lowrank", standalone_mode=False)
    except UserError as error:
        _stop(str(error))
    except UsageFault as error:
        context = getattr(error, "ctx", None)
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        message = message.replace(": Value error, ", ": ")  # typer's
        _stop(f"{message} (see {context.command_path} --help)" if context else message)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("hf-lowrank: interrupted", err=True)
        sys.exit(130)
    except StoppedError as stop:
        typer.echo(f"hf-lowrank: {stop}", err=True)
        sys.exit(STOPPED_STATUS)
    except OSError as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        _stop(refusal)
    sys.exit(status if isinstance(status, int) else 0)


def _stop(message: str) -> NoReturn:
    typer.echo("hf-lowrank: " + " ".join(message.split()), err=True)
    sys.exit(2)
