"""Tiny studies, written and run."""

import logging

import pytest
import yaml

from hf_lowrank.study import run_study
from hf_lowrank.study.plan import Costs
from tests.study.tiny import METHODS, study_data, write_corpus, write_recipe


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """A cache folder for this session."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_LOWRANK_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with a text to train on and one to evaluate on."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def write_study(tmp_path, corpus):
    """Writes recipes and a study with changes by top-level key; returns the study file."""

    def write(file="study.yaml", **changes):
        for method in METHODS:
            if not (tmp_path / f"{method}.yaml").exists():
                write_recipe(tmp_path, corpus, method)
        path = tmp_path / file
        path.write_text(yaml.safe_dump(study_data(**changes), sort_keys=False))
        return path

    return write


@pytest.fixture(autouse=True, scope="module")
def no_estimates():
    """Neither probes steps nor estimates memory, which takes seconds; both have their own tests."""

    def unknown(*_, **__):
        raise NotImplementedError("not in these tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_lowrank.memory.recorder.estimate", unknown)
        patch.setattr("hf_lowrank.study.plan.probe", lambda recipe, threads: Costs())
        yield


@pytest.fixture
def run():
    """`run_study` with units forked from this process; returns the result and the lines it said."""

    def run_here(path, **options):
        said = []
        result = run_study(path, fork_here=True, say=said.append, **options)
        return result, said

    return run_here


@pytest.fixture(autouse=True)
def no_handlers():
    """Removes the command line's log handler, which holds this test's stderr."""
    yield
    logging.getLogger("hf_lowrank").handlers.clear()
