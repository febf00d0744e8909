"""Each method has its page, and the page says what the method really takes."""

from pathlib import Path

import pytest

from hf_lowrank.methods import METHODS

PAGES = Path(__file__).parents[2] / "model_cards"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_page_has_every_setting_with_its_default(name):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    method = METHODS[name]
    assert page.startswith(f"# {method.title}\n")
    assert method.source in page
    rows = {
        line.split("|")[1].strip(" `"): line.split("|")[2].strip(" `") for line in page.splitlines() if "| `" in line
    }
    assert rows == {setting: str(field.default) for setting, field in method.settings.model_fields.items()}
    for heading in ("## When to take it", "## Cost", "## Settings", "## Notes"):
        assert heading in page


def test_the_list_names_all_pages():
    listed = (PAGES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.md)" in listed for name in METHODS)
