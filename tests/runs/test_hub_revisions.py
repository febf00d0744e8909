"""Checkpoints as revisions of a repository, the Hub's answers played by local folders."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure
from hf_lowrank.runs.measurements import read_measurements
from hf_lowrank.runs.trajectory import Trajectory
from tests.measuring.adapted import write_adapted


@pytest.fixture
def hub(two_runs, monkeypatch, tmp_path):
    """`someone/model` with revisions main, step-0, step-10, step-20 and final; records what is downloaded."""
    run = two_runs[1]
    downloads = []

    def list_repo_refs(repository):
        assert repository == "someone/model"
        branches = [SimpleNamespace(name=name) for name in ("main", "step-0", "step-10", "step-20")]
        return SimpleNamespace(branches=branches, tags=[SimpleNamespace(name="final")])

    def snapshot_download(repository, *, revision, allow_patterns):
        step = 20 if revision == "final" else int(revision.removeprefix("step-"))
        folder = tmp_path / "cache" / revision
        folder.mkdir(parents=True, exist_ok=True)
        for file in (run / f"checkpoint-{step}").iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, folder / file.name)
                downloads.append(f"{revision}/{file.name}")
        return str(folder)

    def hf_hub_download(repository, file, *, revision):
        if not (run / file).is_file():
            raise EntryNotFoundError(file)
        return str(run / file)

    for function in (list_repo_refs, snapshot_download, hf_hub_download):
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    return SimpleNamespace(downloads=downloads, run=run)


def test_revisions_are_steps_and_only_what_is_needed_comes(hub):
    run = Trajectory("someone/model")
    assert run.steps == [0, 10, 20]
    assert run.run.method == "galore"
    assert run.config.num_hidden_layers == 2
    assert hub.downloads == ["step-0/config.json", "step-0/generation_config.json"]
    run.dense_weight(10, run.targets[0])
    assert "step-10/model.safetensors" in hub.downloads
    assert not any(name.startswith("step-20") for name in hub.downloads)
    assert run.where(10) == "someone/model@step-10"


def test_one_revision_or_a_pattern(hub):
    assert Trajectory("someone/model@step-10").steps == [10]
    assert Trajectory("someone/model@final").steps == [0]
    assert Trajectory("someone/model", revisions="step-?0").steps == [10, 20]
    with pytest.raises(UserError, match=r"no revision matches 'global\*'; there are: main, step-0"):
        Trajectory("someone/model", revisions="global*")


def test_measuring_a_repository(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = measure("someone/model", metrics="loss,update_norm", steps=20)
    assert {row.metric for row in rows} == {"loss", "update_norm"}
    assert read_measurements(tmp_path / "someone--model") == rows
    local = measure(hub.run, metrics="loss", steps=20)
    assert [row.value for row in rows if row.metric == "loss"] == [row.value for row in local]


def test_landscapes_of_an_adapted_repository_are_of_its_dense_weights(hub, two_runs, tmp_path, monkeypatch):
    shutil.rmtree(hub.run)
    write_adapted(hub.run, two_runs[0], "relora")
    monkeypatch.chdir(tmp_path)
    settings = {"random": {"draws": 2, "steps": 1}, "pca": {"count": 2}, "path": {"points": 1}}
    options = {"metrics": "random_sharpness,pca1_sharpness,step_barrier", "steps": 20, "settings": settings}
    there, here = measure("someone/model", **options), measure(hub.run, **options)
    assert [(row.metric, row.settings, row.value) for row in there] == [
        (row.metric, row.settings, row.value) for row in here
    ]
    assert {row.settings["space"] for row in there} == {"dense"}


def test_what_the_hub_refuses_is_one_line(monkeypatch):
    def refuse(repository):
        raise HfHubHTTPError("no\nnetwork", response=SimpleNamespace(headers={}, request=None, status_code=503))

    monkeypatch.setattr(huggingface_hub, "list_repo_refs", refuse)
    with pytest.raises(UserError, match="the Hub cannot be reached: no network"):
        Trajectory("someone/model")
