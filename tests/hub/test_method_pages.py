"""Each method has a page, whose table of settings is the one of the method's entry."""

import re
import runpy
import typing
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_lowrank.hub.metadata import HUB_ID, TAG
from hf_lowrank.methods import METHODS

PAGES = Path(__file__).parents[2] / "model_cards"
UPDATE = runpy.run_path(str(PAGES / "update.py"))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_page_has_every_setting_with_its_default(name):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    method = METHODS[name]
    assert ModelCard(page).text.startswith(f"\n# {method.title}\n")
    assert method.source in page
    rows = {
        line.split("|")[1].strip(" `"): line.split("|")[2].strip(" `") for line in page.splitlines() if "| `" in line
    }
    assert rows == {setting: str(field.default) for setting, field in method.settings.model_fields.items()}
    for heading in ("## When to use it", "## Cost", "## Settings", "## Notes"):
        assert heading in page


@pytest.mark.parametrize("page", UPDATE["pages"](), ids=lambda page: page.stem)
def test_tables_are_those_that_make_pages_writes(page):
    assert page.read_text(encoding="utf-8") == UPDATE["updated"](page)


@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda page: page.relative_to(PAGES).as_posix())
def test_every_page_has_metadata_that_the_hub_takes(page):
    """Without the Hub: what its client reads, and what it writes again; a fault of the results is an error here."""
    card = ModelCard(page.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    data = card.data.to_dict()
    assert data["license"] in {"apache-2.0", "unknown"}
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"hf_lowrank", "low-rank"} <= set(data["tags"])
    assert not [tag for tag in data["tags"] if TAG.search(tag)]
    assert all(HUB_ID.fullmatch(dataset) for dataset in data.get("datasets", []))
    assert ModelCard(str(card)).data.to_dict() == data
    assert not set(data) - {
        "license", "library_name", "pipeline_tag", "tags", "datasets", "base_model", "model-index",
    }  # fmt: skip


def test_the_list_names_all_pages():
    listed = (PAGES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.md)" in listed for name in METHODS)


def options(annotation):
    """The words that a setting allows; empty where it is no choice of words."""
    if typing.get_origin(annotation) is typing.Literal:
        return {word for word in typing.get_args(annotation) if isinstance(word, str)}
    return {word for inner in typing.get_args(annotation) for word in options(inner)}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_page_names_the_options_of_this_method_and_no_others(name):
    everywhere: dict[str, set[str]] = {}
    for method in METHODS.values():
        for setting, field in method.settings.model_fields.items():
            everywhere.setdefault(setting, set()).update(options(field.annotation))
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    for setting, field in METHODS[name].settings.model_fields.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{setting}` |")]
        meaning = row.split("|")[3]
        named = set(re.findall(r"`([^`]+)`", meaning)) & everywhere[setting]
        if options(field.annotation):
            assert named == options(field.annotation), setting
