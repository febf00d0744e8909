"""Writes the tables of these pages from the methods' entries: `make pages`.

Each method has a page `NAME.md` with a table under "## Settings"; README.md lists the pages.
"""

from __future__ import annotations

import re
from pathlib import Path

from hf_lowrank.methods import METHODS, Method, Setting, settings_of

PAGES = Path(__file__).parent
TABLE = re.compile(r"^\| .*\n(?:\|.*\n)+", re.MULTILINE)


def meaning(setting: Setting) -> str:
    """The description with all choices, as `text: `a` (meaning), `b` (meaning)`."""
    choices = [f"`{choice}`" + (f" ({text})" if text else "") for choice, text in setting.choices.items()]
    return setting.description + (f": {', '.join(choices)}" if choices else "")


def settings_table(method: Method) -> str:
    """The Markdown table of a method's settings."""
    rows = [f"| `{s.name}` | `{s.default}` | {meaning(s)} |" for s in settings_of(method.settings).values()]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows, ""])


def methods_table() -> str:
    """The Markdown table of all methods and their pages."""
    rows = [f"| {m.title} | {m.kind} | [{m.name}.md]({m.name}.md) |" for m in METHODS.values()]
    return "\n".join(["| method | kind | page |", "|---|---|---|", *rows, ""])


def updated(page: Path) -> str:
    """A page's text with its table up to date; pages without a table stay as they are."""
    table = methods_table() if page.stem == "README" else settings_table(METHODS[page.stem])
    return TABLE.sub(lambda _: table, page.read_text(encoding="utf-8"), count=1)


def pages() -> list[Path]:
    """The list of pages, and each method's page."""
    return [PAGES / "README.md", *(PAGES / f"{name}.md" for name in METHODS)]


if __name__ == "__main__":
    for path in pages():
        path.write_text(updated(path), encoding="utf-8")
