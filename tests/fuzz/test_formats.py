"""Every file that the package reads, fuzzed: what is wrong is said in one line, and nothing else happens.

A handful of examples each in every run; `make drill` gives each format ten thousand, `python -m benchmarks.fuzzing`
does so bit by bit and records it.
"""

import os
import tempfile
from pathlib import Path

import pytest

from tests.fuzz.engine import contents_of, fresh, fuzz
from tests.fuzz.formats import FORMATS

SHORT, LONG = 40, int(os.environ.get("HF_LOWRANK_FUZZ", "10000"))


@pytest.fixture(scope="session")
def scratch():
    """A folder for the whole session: hypothesis runs many examples within one test."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_valid_documents_are_read(name, scratch, monkeypatch):
    monkeypatch.setenv("HF_LOWRANK_CACHE", "")  # comes back as it was
    _, write, read = FORMATS[name]
    for content in contents_of(name) if write is not None else contents_of(name)[:1]:
        read(fresh(scratch / name), content)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_wrong_is_said_in_one_line(name, scratch):
    fuzz(name, SHORT, scratch / name)


@pytest.mark.drill
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_of_each(name, scratch):
    accepted = fuzz(name, LONG, scratch / name)
    print(f"{name}: {LONG} inputs, {accepted} of them readable")
