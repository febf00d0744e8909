"""The command line: one thin verb per stage. All logic is in the functions that the verbs call."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from hf_lowrank.errors import UserError

# typer may carry a click of its own, so the base of its usage errors is reached through a public name.
UsageFault: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="hf-lowrank",
    help="Pre-train with low-rank methods, measure what kind of solution came out, and report it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def quiet_libraries() -> None:
    """Pre-train with low-rank methods, measure what kind of solution came out, and report it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


Runs = Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories or folders of checkpoints.")]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as recipes/nano/galore.yaml.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key; can be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="The run directory.")] = None,
) -> None:
    """Train by a recipe; an interrupted run continues from its last whole checkpoint."""
    from hf_lowrank.training import load_recipe, pretrain

    run = pretrain(load_recipe(recipe, overrides=set_ or (), seed=seed), output=output)
    typer.echo(f"run directory: {run}")


@app.command()
def methods() -> None:
    """List the methods that a recipe can name, with their settings."""
    from hf_lowrank.methods import METHODS

    for method in METHODS.values():
        typer.echo(f"{method.name:12} {method.summary}" + (f" [{method.source}]" if method.source else ""))
        for name, field in method.settings.model_fields.items():
            typer.echo(f"{'':14}{name} = {field.default!r}" + (f"  {field.description}" if field.description else ""))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; user errors are one line on stderr and exit status 2."""
    command = typer.main.get_command(app)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        status = command.main(args=given or ["--help"], prog_name="hf-lowrank", standalone_mode=False)
    except UserError as error:
        _stop(str(error))
    except UsageFault as error:
        context = getattr(error, "ctx", None)
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        _stop(f"{message} ({context.command_path} --help lists what is there)" if context else message)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("hf-lowrank: interrupted", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _stop(message: str) -> NoReturn:
    typer.echo("hf-lowrank: " + " ".join(message.split()), err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
