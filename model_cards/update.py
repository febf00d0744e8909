"""Writes the methods' pages, with their metadata, and their list from the methods' entries: `make pages`.

The page `NAME.md` of a method is made whole. Of an entry without a page, the table of settings is; in README.md, the
list of pages. The metadata are those of a model card, so that a page can stand on the Hub as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCardData

from hf_lowrank.methods import METHODS, Method, MethodPage, Setting, settings_of

PAGES = Path(__file__).parent
TABLE = re.compile(r"^\| .*\n(?:\|.*\n)+", re.MULTILINE)
METADATA = re.compile(r"\A(?:---\n.*?\n---\n\n)?", re.DOTALL)


def meaning(setting: Setting) -> str:
    """The description with all choices, as `text: `a` (meaning), `b` (meaning)`."""
    choices = [f"`{choice}`" + (f" ({text})" if text else "") for choice, text in setting.choices.items()]
    return setting.description + (f": {', '.join(choices)}" if choices else "")


def settings_table(method: Method) -> str:
    """The Markdown table of a method's settings."""
    rows = [f"| `{s.name}` | `{s.default}` | {meaning(s)} |" for s in settings_of(method.settings).values()]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def methods_table() -> str:
    """The Markdown table of all methods and their pages."""
    rows = [f"| {m.title} | {m.kind} | [{m.name}.md]({m.name}.md) |" for m in METHODS.values()]
    return "\n".join(["| method | kind | page |", "|---|---|---|", *rows, ""])


def metadata(page: Path) -> str:
    """The metadata of a page, which is about a method, an option of the model, or all of them."""
    about = [] if page.stem == "README" else [page.stem]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_lowrank", "low-rank", "pre-training", *about],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def method_page(method: Method, page: MethodPage) -> str:
    """The whole page of a method."""
    parts = [
        f"# {method.title}",
        page.idea,
        *([f"Source: {method.source}."] if method.source else []),
        "## Formula",
        "\n".join(["```text", *page.formula, "```"]),
        "## When to use it",
        page.use,
        "## Cost",
        page.cost,
        "## Settings",
        f"Keys of a recipe's `method:` block, next to `name: {method.name}`.",
        settings_table(method),
        "## Notes",
        "\n".join(f"- {note}" for note in page.notes),
    ]
    return "\n\n".join(parts) + "\n"


def updated(page: Path) -> str:
    """A page's text as it should be."""
    return metadata(page) + _text(page)


def _text(page: Path) -> str:
    if page.stem in METHODS and METHODS[page.stem].page is not None:
        return method_page(METHODS[page.stem], METHODS[page.stem].page)
    text = METADATA.sub("", page.read_text(encoding="utf-8"), count=1)
    if page.stem == "README":
        return TABLE.sub(lambda _: methods_table(), text, count=1)
    if page.stem in METHODS:
        return TABLE.sub(lambda _: f"{settings_table(METHODS[page.stem])}\n", text, count=1)
    return text


def pages() -> list[Path]:
    """The list of pages, each method's page, and the page of an option of the model."""
    return [PAGES / "README.md", *(PAGES / f"{name}.md" for name in METHODS), PAGES / "layernorm_scaling.md"]


if __name__ == "__main__":
    for path in pages():
        path.write_text(updated(path), encoding="utf-8")
