"""Commands that print the tables of methods and of metrics, and a page of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument

from hf_lowrank.cli.app import command
from hf_lowrank.cli.arguments import Json
from hf_lowrank.cli.output import plain, print_json
from hf_lowrank.formats import console

if TYPE_CHECKING:
    from hf_lowrank.methods import Method, Setting
    from hf_lowrank.metrics import Metric

NAME_WIDTH, DEFAULT_WIDTH = 23, 15
BULLET = "  - "
LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")  # of Markdown


def _write(text: str, indent: str = "") -> None:
    """A paragraph whose first line begins with `indent` and whose others are set in as far."""
    width = console().width
    typer.echo(fill(text, width, initial_indent=indent, subsequent_indent=" " * len(indent)) or indent.rstrip())


def _write_settings(settings: Iterable[Setting]) -> None:
    for setting in settings:
        _write(setting.description, f"    {setting.name:<{NAME_WIDTH}} {setting.default!s:<{DEFAULT_WIDTH}} ")
        for choice, meaning in setting.choices.items():
            _write(meaning, f"{'':{NAME_WIDTH + DEFAULT_WIDTH + 6}}{choice:<15} ")


def _write_section(heading: str, paragraphs: Iterable[str], indent: str = "    ") -> None:
    typer.echo(f"\n{heading}")
    for paragraph in paragraphs:
        _write(LINK.sub(r"\1", paragraph), indent)


def _method_names(incomplete: str) -> list[str]:
    from hf_lowrank.methods import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def _metric_names(incomplete: str) -> list[str]:
    from hf_lowrank.metrics import METRICS

    return [name for name in METRICS if name.startswith(incomplete)]


@command(
    "hf-lowrank methods",
    "hf-lowrank methods galore          # formula, settings, memory, notes",
    "hf-lowrank methods --json",
)
def methods(
    name: Annotated[
        str | None,
        Argument(metavar="[NAME]", autocompletion=_method_names, show_default=False, help="Print one page."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods that a recipe can name, and their settings; or print the page of one."""
    from hf_lowrank.methods import METHODS, setting_sections

    chosen = list(METHODS.values()) if name is None else [METHODS[name]]
    if as_json:
        documents = [_method_document(method) for method in chosen]
        print_json(documents if name is None else documents[0])
    elif name is None:
        for heading, settings in setting_sections(METHODS):
            _write(heading)
            _write_settings(settings)
            typer.echo()
    else:
        _write_method(chosen[0])


def _write_method(method: Method) -> None:
    from hf_lowrank.methods import settings_of

    page = method.page
    _write(f"{method.title}: {method.summary}" if page is None else f"{method.title}: {page.idea}")
    if page is not None:
        _write_section("Formula", page.formula)
        _write_section("When to use it", [page.use])
        _write_section("Memory and time", [page.cost])
    typer.echo(f"\nSettings, in a recipe's `method: {{name: {method.name}, ...}}`, with defaults")
    _write_settings(settings_of(method.settings).values())
    if page is not None:
        _write_section("Notes", page.notes, BULLET)
    if method.source:
        _write_section("Source", [method.source])


def _method_document(method: Method) -> dict[str, Any]:
    from hf_lowrank.methods import settings_of

    return {
        "name": method.name,
        "title": method.title,
        "summary": method.summary,
        "kind": method.kind,
        "source": method.source or None,
        "settings": plain(list(settings_of(method.settings).values())),
        **(plain(method.page) if method.page is not None else {}),
    }


@command(
    "hf-lowrank metrics",
    "hf-lowrank metrics random_sharpness          # formula, how to read it, pitfalls, settings",
    "hf-lowrank metrics --json",
)
def metrics(
    name: Annotated[
        str | None,
        Argument(metavar="[NAME]", autocompletion=_metric_names, show_default=False, help="Print one page."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the metrics by dimension, and their meaning; or print the page of one."""
    from hf_lowrank.metrics import METRICS

    chosen = list(METRICS.values()) if name is None else [METRICS[name]]
    if as_json:
        documents = [_metric_document(metric) for metric in chosen]
        print_json(documents if name is None else documents[0])
    elif name is None:
        for metric in METRICS.values():
            remarks = [metric.dimension, *(["needs a baseline"] if metric.needs_baseline else [])]
            remarks += ["extra"] if metric.extra else []
            typer.echo(f"{metric.id:24} {metric.summary} [{', '.join(remarks)}]")
    else:
        _write_metric(chosen[0])


def _write_metric(metric: Metric) -> None:
    from hf_lowrank.metrics.pages import PAGES

    page = PAGES[metric.id]
    _write(f"{metric.title}: {metric.summary}")
    _write_section("Formula", page.formula.splitlines())
    better = "neither" if metric.better is None else metric.better
    asked = "when named, or by --metrics all" if metric.extra else "by default"
    baseline = "; needs a baseline" if metric.needs_baseline else ""
    facts = f"Unit: {metric.unit or 'none'}. Better: {better}. Measured {asked}{baseline}."
    _write_section("How to read it", [page.reading, facts])
    _write_section("Pitfalls", page.pitfalls, BULLET)
    _write_section("Time and memory", [page.cost])
    settings = _metric_settings(page.settings)
    if settings:
        typer.echo("\nSettings, in the file of `measure --settings`, with the values of the presets fast and paper")
        for key, (fast, paper, meaning) in settings.items():
            _write(meaning, f"    {key:<{NAME_WIDTH}} {f'{fast}, {paper}':<{DEFAULT_WIDTH}} ")
    if page.source:
        _write_section("Source", [page.source])


def _metric_document(metric: Metric) -> dict[str, Any]:
    from hf_lowrank.metrics.pages import PAGES

    page = PAGES[metric.id]
    settings = {
        key: {"fast": fast, "paper": paper, "description": meaning}
        for key, (fast, paper, meaning) in _metric_settings(page.settings).items()
    }
    return {**plain(metric), **plain(page), "settings": settings}


def _metric_settings(names: Iterable[str]) -> Mapping[str, tuple[Any, Any, str]]:
    """By key: the value in each preset, and the meaning; for a block of settings all keys of it."""
    from pydantic import BaseModel

    from hf_lowrank.runs.measure_settings import MeasureSettings, resolve_settings

    presets = resolve_settings("fast"), resolve_settings("paper")
    found: dict[str, tuple[Any, Any, str]] = {}
    for name in names:
        fast, paper = (getattr(preset, name) for preset in presets)
        if isinstance(fast, BaseModel):
            for key, field in type(fast).model_fields.items():
                found[f"{name}.{key}"] = getattr(fast, key), getattr(paper, key), field.description or ""
        else:
            found[name] = fast, paper, MeasureSettings.model_fields[name].description or ""
    return found
