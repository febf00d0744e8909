"""Trackers: what they are given by a run, and that a run without one loads none and opens no connection."""

import json
import socket
import sqlite3
import sys

import pytest

from hf_lowrank.memory import memory_recorder
from hf_lowrank.runs.run_files import read_facts
from hf_lowrank.training import load_recipe, pretrain
from tests.training.test_pretrain import state_of, trained

TRACKERS = {"trackio", "wandb", "tensorboard", "tensorboardX", "mlflow", "comet_ml", "clearml", "neptune", "swanlab"}
METHODS = {
    "galore": {"name": "galore", "rank": 4, "update_proj_gap": 2},
    "relora": {"name": "relora", "r": 4, "restart_every": 2, "restart_warmup_steps": 1},
}
GIVEN = {
    "galore": {"train/subspace/captured_energy", "train/subspace/subspace_overlap"},
    "relora": {"train/relora_restarts"},
}


def loaded_trackers():
    return {name for name in sys.modules if name.partition(".")[0] in TRACKERS}


@pytest.fixture(autouse=True)
def none_loaded(monkeypatch):
    """Forgets trackers that other tests have loaded."""
    for name in loaded_trackers():
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def sockets(monkeypatch):
    """The sockets that are opened, of which each is refused."""
    opened = []

    class Refused(socket.socket):
        def __init__(self, *args, **options):
            opened.append(args)
            raise OSError("no network")

    monkeypatch.setattr(socket, "socket", Refused)
    return opened


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Trackio's folder."""
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "SYSTEM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path / "trackio"


def rows_of(store, run):
    """What the only project in trackio's store holds of a run, in order."""
    (file,) = store.glob("*.db")
    with sqlite3.connect(file) as database:
        found = database.execute("SELECT metrics FROM metrics WHERE run_name = ? ORDER BY id", (run,)).fetchall()
    return [json.loads(metrics) for (metrics,) in found]


@pytest.mark.parametrize("method", METHODS)
def test_trackios_own_store_holds_a_runs_metrics_and_ours(write_recipe, tmp_path, store, sockets, method):
    path = write_recipe(method=METHODS[method], training__report_to="trackio")
    run = pretrain(load_recipe(path), tmp_path / "tracked", recorder=memory_recorder)
    assert "trackio" in loaded_trackers()
    assert sockets == []
    rows = rows_of(store, "tracked")
    history = state_of(run, 6)["log_history"]
    for key, name in (("loss", "train/loss"), ("learning_rate", "train/learning_rate"), ("eval_loss", "eval/loss")):
        expected = {entry["step"]: entry[key] for entry in history if key in entry}
        assert {row["train/global_step"]: row[name] for row in rows if name in row} == pytest.approx(expected)
        assert len(expected) == (2 if key == "eval_loss" else 6)
    facts = read_facts(run)
    last = rows[-1]
    assert GIVEN[method] <= set(last)
    assert last["train/memory/optimizer_state_bytes"] == facts["optimizer_state_bytes"]
    assert last["train/memory/measured_peak_bytes"] == facts["memory"]["measured_peak"]
    assert last["train/memory/estimated_peak_bytes"] == facts["memory"]["estimated_peak"]
    assert 0 < last["train/memory/peak_bytes"] <= facts["peak_memory_bytes"]
    if method == "galore":
        assert 0 < last["train/subspace/captured_energy"] <= 1
        assert 0 <= last["train/subspace/subspace_overlap"] <= 1 + 1e-6
    else:
        restarts = {row["train/global_step"]: row["train/relora_restarts"] for row in rows}
        assert restarts == {step: step // 2 for step in range(1, 7)}


def test_a_resumed_run_goes_on_in_the_trackers_run(write_recipe, tmp_path, store):
    run = trained(write_recipe(training__report_to="trackio"), tmp_path / "run")
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    trained(write_recipe(training__report_to="trackio"), run)
    steps = [row["train/global_step"] for row in rows_of(store, "run") if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_without_a_tracker_none_is_loaded_and_no_socket_opened(write_recipe, tmp_path, sockets):
    recipe = load_recipe(write_recipe())
    assert recipe.arguments(tmp_path / "run").report_to == []
    run = pretrain(recipe, tmp_path / "run", recorder=memory_recorder)
    assert loaded_trackers() == set()
    assert sockets == []
    assert not any("memory" in key for entry in state_of(run, 6)["log_history"] for key in entry)


def test_an_opened_socket_would_be_seen(sockets):
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("127.0.0.1", 9))
    assert len(sockets) == 1


def test_diagnostics_change_no_weight(write_recipe, tmp_path, store):
    """A tracker turns them on."""
    path = write_recipe(method=METHODS["galore"])
    plain = trained(path, tmp_path / "plain")
    tracked = trained(path, tmp_path / "tracked", "training.report_to=trackio")
    for step in (3, 6):
        one, other = ((run / f"checkpoint-{step}" / "model.safetensors").read_bytes() for run in (plain, tracked))
        assert one == other
