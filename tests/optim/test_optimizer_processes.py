"""Runs that are killed, and runs on several processes."""

import random
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("optim_worker.py")
STEPS = 14


def start(*arguments):
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    uninterrupted = start("train", whole, STEPS)
    stop = random.randint(2, STEPS - 3)
    process = start("train", cut, STEPS)
    for line in process.stdout:
        if line.strip() == str(stop):
            process.kill()  # SIGKILL, during the next step
            break
    process.wait()
    process.stdout.close()
    left = torch.load(cut / "checkpoint.pt", weights_only=True)["step"]
    assert stop <= left < STEPS
    finish(start("train", cut, STEPS))
    finish(uninterrupted)
    ends = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, cut)]
    for name in ends[0]:
        if name == "step":
            assert ends[0][name] == ends[1][name] == STEPS
            continue
        for key, value in ends[0][name]["model"].items():
            assert torch.equal(value, ends[1][name]["model"][key]), (name, stop)
    eight_bit = ends[0]["galore 8bit"]["optimizer"]["state"]
    assert any(state["exp_avg"].dtype == torch.uint8 for state in eight_bit.values())


def test_two_processes_equal_one(tmp_path):
    """Even if a decomposition has other signs on the second process: all use the basis of the first."""
    for process in [start("parallel", tmp_path, 0, 1), *[start("parallel", tmp_path, rank, 2) for rank in (0, 1)]]:
        finish(process)
    alone, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("rank0of1", "rank0of2", "rank1of2")
    )
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], expected, rtol=1e-6, atol=1e-6), name
