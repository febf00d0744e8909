"""Members whose runs several processes train together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_lowrank.runs.run_files import read_facts
from hf_lowrank.study.executors import WorkerExecutor
from hf_lowrank.study.units import TrainUnit
from tests.study.test_locks import children_of, is_running

DDP = Path(__file__).parents[2] / "recipes" / "accelerate" / "ddp.yaml"
HALF = "training.per_device_train_batch_size=1"
needs_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="a machine with one core allows no member with two processes"
)


@needs_cores
def test_two_processes_train_as_accelerates_own_launch_does(write_study, tmp_path, run):
    two = {"recipe": "galore.yaml", "processes": 2, "set": [HALF]}
    study = write_study(members={"full_rank": "full_rank.yaml", "two": two}, seeds=[0])
    result, _ = run(study, output=tmp_path / "out", stages="train", jobs=2)
    assert result.failures == []
    ours = tmp_path / "out" / "runs" / "two-seed0"
    assert [member.what for member in result.plan.members] == [
        "full_rank, learning rate 0.003",
        "galore, learning rate 0.003, 2 processes",
    ]
    facts = read_facts(ours)
    assert (facts["processes"], facts["sequences_per_step"]) == (2, 2)

    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DDP), "--num_processes", "2",
        "--main_process_port", "0", "--module", "hf_lowrank", "train", str(tmp_path / "galore.yaml"), "--set", HALF,
        "--seed", "0", "--output", str(tmp_path / "theirs"),
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    weights = "checkpoint-12/model.safetensors"
    assert (ours / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()
    # The next call finds it finished.
    assert run(study, output=tmp_path / "out", stages="train")[1] == []


@needs_cores
def test_the_reason_of_a_failed_process_is_the_units(write_study, tmp_path, run):
    """Here of both: the run began by another recipe."""
    study = write_study(members={"full_rank": "full_rank.yaml"}, seeds=[0], set=["training.max_steps=6"])
    out = tmp_path / "out"
    unit = {"recipe": str(tmp_path / "full_rank.yaml"), "overrides": [], "seed": 0, "folder": "", "name": "a"}
    assert run(study, output=out, stages="train")[0].failures == []
    again = TrainUnit(**unit, output=str(out / "runs" / "full_rank-seed0"), processes=2)
    executor = WorkerExecutor(1)
    executor.start(again, tmp_path / "log", 0)
    (outcome,) = executor.wait(1200)
    executor.stop()
    assert "belongs to another recipe: training.max_steps" in outcome.reason
    assert "belongs to another recipe" in (tmp_path / "log").read_text()


@needs_cores
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_all_processes_end_with_their_unit(write_study, tmp_path):
    write_study()
    unit = TrainUnit(
        name="a",
        recipe=str(tmp_path / "full_rank.yaml"),
        overrides=["training.max_steps=100000", "training.save_steps=50000"],
        seed=0,
        folder="",
        output=str(tmp_path / "run"),
        processes=2,
    )
    executor = WorkerExecutor(1)
    executor.start(unit, tmp_path / "log", 0)
    deadline = time.monotonic() + 1200
    while not (tmp_path / "run" / "checkpoint-0").is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    (performer,) = children_of(executor._running[unit.key].pid)
    (launcher,) = children_of(performer)
    workers = children_of(launcher)
    assert len(workers) == 2
    os.kill(performer, signal.SIGKILL)
    (outcome,) = executor.wait(30)
    assert "SIGKILL" in outcome.reason
    deadline = time.monotonic() + 10
    while any(map(is_running, [launcher, *workers])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, [launcher, *workers]))
    executor.stop()


def test_slots_and_accelerators_of_units(tmp_path):
    """A unit of several processes sees the accelerators of its slots, and others too if it has all the slots."""
    unit = {"recipe": "", "overrides": [], "seed": 0, "folder": "", "output": ""}
    one, two = (TrainUnit(name=str(count), processes=count, **unit) for count in (1, 2))
    executor = WorkerExecutor(1, devices=("4", "5", "7"))
    assert executor._devices_of(one, (2,)) == ["7"]
    assert executor._devices_of(one, (4,)) == ["5"]
    assert executor._devices_of(two, (2, 0)) == ["7", "4"]
    assert executor._devices_of(two, (0,)) == ["4", "5"]
    assert WorkerExecutor(1)._devices_of(two, (0, 1)) == []
