"""Jinja2 for Markdown: every inserted value is escaped, so that a name can never act as markup.

HTML's autoescape does not cover Markdown's own characters. Here each character that could begin markup, HTML or a link
becomes a character reference, which Markdown displays and never reads as structure.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_lowrank.hub.privacy import without_private

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = re.compile(r"[<>&\"'`|\\*_\[\](){}#!~$@^]|:(?=\S)")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


class Markdown(str):
    """Text that is already Markdown and is inserted unescaped."""

    __slots__ = ()


def escape(value: object) -> str:
    """One line of plain text as Markdown that displays exactly this text."""
    if isinstance(value, Markdown):
        return value
    # Private parts first: they would not be recognised once escaped.
    text = " ".join(CONTROL.sub("", without_private(str(value))).split())
    text = SPECIAL.sub(lambda match: "\\_" if match[0] == "_" else f"&#{ord(match[0])};", text)
    return re.sub(r"(?i)\bwww\.", "www&#46;", text)


def fenced(text: str, language: str = "") -> Markdown:
    """A code block whose fence is longer than any run of backticks in it."""
    text = CONTROL.sub("", without_private(text).replace("\r", ""))
    fence = _fence(text, 3)
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def inline_code(text: object) -> Markdown:
    """Inline code, with a fence longer than any run of backticks in it."""
    content = " ".join(CONTROL.sub("", without_private(str(text))).split()).replace("|", "¦") or " "
    fence = _fence(content, 1)
    pad = " " if "`" in content else ""
    return Markdown(f"{fence}{pad}{content}{pad}{fence}")


def _fence(text: str, shortest: int) -> str:
    return "`" * max(shortest, 1 + max((len(row) for row in re.findall(r"`+", text)), default=0))


@cache
def _environment() -> Environment:
    # Jinja2's autoescape is for HTML; `finalize` escapes every value instead.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(fenced=fenced)
    environment.filters.update(code=inline_code)
    return environment


def render(template: str, **values: Any) -> str:
    """A filled template of this package, ending in one newline."""
    text = _environment().get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
