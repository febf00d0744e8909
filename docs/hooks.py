"""What the build of the documentation adds to the pages in this folder.

- The pages of the methods and the card of the nano study, from `model_cards/`, so that they exist once.
- The API reference: a page for each public package, with every public name. A name without a docstring is a warning,
  which the strict build turns into an error.
- A check that no page loads anything from elsewhere.
- Formulas: blocks of the language `math`, as on GitHub, become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import ast
import logging
import posixpath
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import griffe
import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.hooks.hf_lowrank")
ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
PACKAGE = "hf_lowrank"

# The public packages and modules, in the order of the reference, each with what it is about.
REFERENCE = {
    PACKAGE: "the names that most programs need",
    f"{PACKAGE}.optim": "optimizers",
    f"{PACKAGE}.optim.reference": "each method's step for one matrix",
    f"{PACKAGE}.adapters": "layers",
    f"{PACKAGE}.targets": "which matrices a method acts on",
    f"{PACKAGE}.methods": "the table of methods",
    f"{PACKAGE}.training": "recipes and pre-training",
    f"{PACKAGE}.memory": "memory estimates",
    f"{PACKAGE}.runs.trajectory": "checkpoints of a run",
    f"{PACKAGE}.runs.measurements": "the table of measurements",
    f"{PACKAGE}.runs.evaluation_set": "held-out sequences",
    f"{PACKAGE}.runs.export": "dense export",
    f"{PACKAGE}.metrics": "the table of metrics",
    f"{PACKAGE}.geometry": "metrics as functions of tensors",
    f"{PACKAGE}.measuring": "measuring runs",
    f"{PACKAGE}.evaluate_modules": "modules of evaluate",
    f"{PACKAGE}.downstream": "evaluation and prediction",
    f"{PACKAGE}.claims": "claims as tests over seeds",
    f"{PACKAGE}.report": "tables and the page",
    f"{PACKAGE}.study": "studies",
    f"{PACKAGE}.hub": "publishing",
    f"{PACKAGE}.errors": "errors",
}
# Methods that torch, transformers and peft define and document, and call by these names.
FOREIGN = re.compile(r"on_\w+|get_lr|step|state_dict|load_state_dict|inject_adapter|forward")


# The API reference


def public_names(module: str) -> list[str]:
    """The names that a package exports, and those that a module defines: functions, classes, documented constants."""
    folder = ROOT.joinpath(*module.split("."))
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    reexported = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    ]
    listed = [
        constant.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for constant in ast.walk(node.value)
        if isinstance(constant, ast.Constant) and constant.value != "__version__"
    ]
    own = [
        name for node, after in zip(tree.body, [*tree.body[1:], None], strict=True) for name in _defined(node, after)
    ]
    names = [*reexported, *listed, *(name for name in own if not name.startswith("_"))]
    return list(dict.fromkeys(names)) if not folder.is_dir() else sorted(set(names), key=str.lower)


def _defined(node: ast.stmt, after: ast.stmt | None) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    target = (
        node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
    )
    return [target.id] if documented and isinstance(target, ast.Name) else []


def documented_names(module: str, package: griffe.Module) -> Iterator[tuple[str, bool]]:
    """The public names of a module with a page, and whether each has a docstring."""
    parent = package if module == PACKAGE else package[module.removeprefix(f"{PACKAGE}.")]
    for name in public_names(module):
        found = parent[name]
        yield name, (found.final_target if found.is_alias else found).has_docstring


def undocumented_members(target: griffe.Class) -> list[str]:
    """The public methods and properties of a class that have no docstring here, in a base class, or elsewhere."""
    found = []
    for name, member in target.members.items():
        if name.startswith("_") or member.is_alias or FOREIGN.fullmatch(name):
            continue
        if not (member.is_function or "property" in member.labels) or member.has_docstring:
            continue
        if not any(name in base.members and base.members[name].has_docstring for base in target.mro()):
            found.append(name)
    return found


def faults_of_reference() -> Iterator[str]:
    """What is public and undocumented, one line each."""
    package = _load()
    for module in REFERENCE:
        for name, documented in documented_names(module, package):
            if not documented:
                yield f"{module}.{name} is public and has no docstring"
            found = package[f"{module}.{name}".removeprefix(f"{PACKAGE}.")]
            target = found.final_target if found.is_alias else found
            if isinstance(target, griffe.Class):
                for member in undocumented_members(target):
                    yield f"{target.path}.{member} is public and has no docstring"


_loaded: list[griffe.Module] = []


def _load() -> griffe.Module:
    if not _loaded:
        found = griffe.load(PACKAGE, search_paths=[ROOT], allow_inspection=False)
        assert isinstance(found, griffe.Module)
        _loaded.append(found)
    return _loaded[0]


def reference_page(module: str) -> str:
    """The Markdown of a page of the reference."""
    package = _load()
    parent = package if module == PACKAGE else package[module.removeprefix(f"{PACKAGE}.")]
    summary = parent.docstring.value.strip() if parent.docstring else ""
    names = [name for name, _ in documented_names(module, package)]
    return "\n\n".join([f"# {module}", summary, *(f"::: {module}.{name}" for name in names), ""])


# Pages from model_cards/


def method_pages() -> list[str]:
    """The methods with a page, in the order of `model_cards/README.md`, and the options of a model."""
    text = (CARDS / "README.md").read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r"\((\w+)\.md\)", text)))


def title_of(page: Path) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, page
    return found[1]


def _without_front_matter(text: str) -> str:
    return re.sub(r"\A---\n.*?^---\n", "", text, flags=re.DOTALL | re.MULTILINE)


LINK = re.compile(r"(?<=\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def relinked(text: str, source: Path, page: str) -> str:
    """A page's text with the links to files of the repository replaced by links to their pages.

    Args:
        source: the Markdown file.
        page: where its page is, relative to the root of the site.
    """

    def replaced(match: re.Match[str]) -> str:
        link = match[1]
        if re.match(r"[a-z]+:", link):
            return match[0]
        file = (source.parent / link).resolve()
        if (ROOT / "docs") in file.parents:
            return match[0]
        target = PLACES.get(file.relative_to(ROOT).as_posix()) if ROOT in file.parents else None
        return match[0] if target is None else posixpath.relpath(target, posixpath.dirname(page) or ".") + match[2]

    return LINK.sub(replaced, text)


# Where files of the repository are in the site.
PLACES: dict[str, str] = {
    **{f"model_cards/{name}.md": f"methods/{name}.md" for name in method_pages()},
    "model_cards/nano/README.md": "results/nano.md",
    "model_cards/nano/report.html": "results/report.html",
    **{
        picture.relative_to(ROOT).as_posix(): f"results/pictures/{picture.name}"
        for picture in sorted((CARDS / "nano" / "pictures").iterdir())
    },
    **{
        file.relative_to(ROOT).as_posix(): f"results/{file.name}"
        for file in sorted((CARDS / "nano").iterdir())
        if file.suffix in (".csv", ".json", ".png")
    },
}


# Formulas


def math(source: str, language: str, *_: Any, **__: Any) -> str:
    """A block of the language `math` as MathML."""
    formulas = [latex2mathml.converter.convert(line, display="block") for line in source.split("\\\\\n")]
    return f'<div class="formula" role="math" aria-label="{escape(source.strip())}">{"".join(formulas)}</div>'


# What MkDocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    fences = [{"name": "math", "class": "math", "format": math}]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = fences
    filled: dict[str, list[dict[str, str]]] = {
        "Methods": [{title_of(CARDS / f"{name}.md"): f"methods/{name}.md"} for name in method_pages()],
        "API reference": [{module: f"reference/{module}.md"} for module in REFERENCE],
    }
    for section in config.nav or ():
        for title, entries in section.items():
            if isinstance(entries, list):
                section[title] = filled.get(title, entries)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for fault in faults_of_reference():
        logger.warning(fault)
    for module in REFERENCE:
        files.append(File.generated(config, f"reference/{module}.md", content=reference_page(module)))
    for source, place in PLACES.items():
        path = ROOT / source
        if path.suffix == ".md":
            text = _without_front_matter(path.read_text(encoding="utf-8"))
            files.append(File.generated(config, place, content=relinked(text, path, place)))
        else:
            files.append(File.generated(config, place, content=path.read_bytes()))
    return files


LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?([a-z]*:?//[^"' >]+)|<link\b(?=[^>]*\brel=["']?"""
    r"""(?:stylesheet|icon|preload|preconnect))[^>]*\bhref=["']?([a-z]*:?//[^"' >]+)""",
    re.IGNORECASE,
)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    for match in LOADED.finditer(output):
        logger.warning(f"{page.file.src_uri} loads {match[1] or match[2]} from elsewhere")
    return output


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.generated_by:
        return markdown
    return relinked(markdown, ROOT / "docs" / page.file.src_uri, page.file.src_uri)
