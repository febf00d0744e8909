"""Commands that print the tables of methods and of metrics."""

from textwrap import fill

import typer

from hf_lowrank.cli.app import app
from hf_lowrank.formats import console


@app.command()
def methods() -> None:
    """List the methods that a recipe can name, and their settings."""
    from hf_lowrank.methods import METHODS, setting_sections

    width = console().width

    def show(indent: str, text: str) -> None:
        typer.echo(fill(text, width, initial_indent=indent, subsequent_indent=" " * len(indent)) or indent.rstrip())

    for heading, settings in setting_sections(METHODS):
        show("", heading)
        for setting in settings:
            show(f"    {setting.name:<23} {setting.default!s:<15} ", setting.description)
            for choice, meaning in setting.choices.items():
                show(f"{' ' * 44}{choice:<15} ", meaning)
        typer.echo()


@app.command()
def metrics() -> None:
    """List the metrics by dimension, and their meaning."""
    from hf_lowrank.metrics import METRICS

    for metric in METRICS.values():
        remarks = [metric.dimension, *(["needs a baseline"] if metric.needs_baseline else [])]
        remarks += ["extra"] if metric.extra else []
        typer.echo(f"{metric.id:24} {metric.summary} [{', '.join(remarks)}]")
