"""One process at a time works on a study and on a run, and none outlives its study."""

import os
import signal
import time
from pathlib import Path

import pytest

from hf_lowrank.downstream import evaluate
from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure
from hf_lowrank.storage.locks import all_locked, locked
from hf_lowrank.study import run_study
from hf_lowrank.training import load_recipe, pretrain
from tests.study.tiny import write_recipe


@pytest.fixture
def holder():
    """Starts processes that hold locks until the test ends; gives their process ids."""
    pids = []

    def hold(folder, purpose):
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with locked(folder, purpose):
                    os.write(tell, b"1")
                    time.sleep(600)
            finally:
                os._exit(1)
        pids.append(pid)
        assert os.read(ready, 1) == b"1"
        os.close(ready)
        os.close(tell)
        return pid

    yield hold
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_folder_is_held_by_one_process(tmp_path, holder):
    pid = holder(tmp_path / "a", "train")
    with (
        pytest.raises(UserError, match=rf"a: is in use by another hf-lowrank process \(pid {pid}\)"),
        locked(tmp_path / "a", "train"),
    ):
        pass
    with locked(tmp_path / "a", "measure"), locked(tmp_path / "b", "train"):
        pass  # another purpose, another folder


@pytest.mark.parametrize(("world_size", "held"), [("2", False), (None, True)])
def test_the_first_process_of_a_launch_holds_the_lock(tmp_path, monkeypatch, world_size, held):
    """A rank without a launch, as some batch systems set it, is a process of its own."""
    monkeypatch.setenv("RANK", "1")
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with locked(tmp_path, "train"):
        assert (tmp_path / ".train.lock").exists() == held


def test_a_lock_is_free_when_its_holder_is_killed(tmp_path, holder):
    pid = holder(tmp_path, "train")
    os.kill(pid, signal.SIGKILL)
    with locked(tmp_path, "train", wait=5):
        assert (tmp_path / ".train.lock").read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_process_can_hold_a_lock_twice_and_several_locks(tmp_path):
    with locked(tmp_path, "train"), locked(tmp_path, "train"), all_locked([tmp_path, tmp_path / "."], "measure"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".measure.lock", ".train.lock"]
    assert list(tmp_path.iterdir()) == []


def test_the_content_of_a_lock_is_shown_only_if_it_is_a_number(tmp_path, holder):
    holder(tmp_path, "train")
    (tmp_path / ".train.lock").write_bytes(b"\x1b[2J\xff")
    with pytest.raises(UserError, match="in use by another hf-lowrank process; wait"), locked(tmp_path, "train"):
        pass


def test_a_run_is_trained_measured_and_evaluated_by_one_process(tmp_path, corpus, holder):
    recipe = load_recipe(write_recipe(tmp_path, corpus, "full_rank"))
    run = pretrain(recipe, tmp_path / "run")
    new = tmp_path / "new"
    for folder, purpose, call in (
        (new, "train", lambda: pretrain(recipe, new)),
        (run, "train", lambda: pretrain(recipe, run)),
        (run, "measure", lambda: measure(run, metrics="loss")),
        (run, "evaluate", lambda: evaluate(run, tasks="pylib_bits_per_byte", limit=2, steps="last")),
    ):
        pid = holder(folder, purpose)
        with pytest.raises(UserError, match=rf"{folder}: is in use .*pid {pid}"):
            call()
    assert [path.name for path in new.iterdir()] == [".train.lock"]
    assert not (run / "measurements.jsonl").exists()


def test_leftovers_of_a_process_killed_at_its_start_are_not_another_run(tmp_path, corpus):
    run = tmp_path / "run"
    run.mkdir()
    for name in (".train.lock", ".recipe.yaml.abc.tmp"):
        (run / name).write_text("x")
    recipe = load_recipe(write_recipe(tmp_path, corpus, "full_rank", training__max_steps=1))
    assert (pretrain(recipe, run) / "checkpoint-1").is_dir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="must be a run directory or empty"):
        pretrain(recipe, tmp_path / "other")


def test_a_study_is_run_by_one_process(write_study, tmp_path, holder, monkeypatch):
    monkeypatch.setattr("hf_lowrank.study.engine.LOCK_SECONDS", 0.2)
    pid = holder(tmp_path / "out", "study")
    with pytest.raises(UserError, match=rf"is in use by another hf-lowrank process \(pid {pid}\)"):
        run_study(write_study(), output=tmp_path / "out", fork_here=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".study.lock"]


def children_of(pid):
    """Process ids of a process's children."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_workers_end_with_a_parent_that_is_killed(write_study, tmp_path, run):
    study = write_study(
        seeds=[0], set=["training.max_steps=4000", "training.save_steps=500"], measure={"metrics": "loss"}
    )
    pid = os.fork()
    if pid == 0:
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nothing, stream)
            run_study(study, output=tmp_path / "out", stages="train", fork_here=True, jobs=2)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out/runs/*/checkpoint-0"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = children_of(pid)
    assert len(workers) == 2
    os.kill(pid, signal.SIGKILL)  # the parent alone
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, workers))
    with locked(tmp_path / "out", "study"), locked(tmp_path / "out" / "runs" / "galore-seed0", "train"):
        pass
