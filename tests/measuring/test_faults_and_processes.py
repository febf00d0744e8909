"""Killed and shared measuring ends with the same rows as undisturbed measuring."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from accelerate import PartialState

import hf_lowrank.measuring.runner as measure_module
from hf_lowrank.errors import UserError
from hf_lowrank.geometry import TokenLoss
from hf_lowrank.measuring import measure
from hf_lowrank.processes import placement
from hf_lowrank.runs.measurements import read_measurements
from tests.distributed.pairs import FORK, PATIENCE, in_two, lose_one

WANTED = {
    "metrics": "loss,random,spectra,step,method,activations",
    "settings": {"random": {"draws": 2, "steps": 1}, "path": {"points": 1}},
}


def rows_of(runs):
    rows = [row for run in runs for row in read_measurements(run)]
    return {row.key: (row.value if row.value == row.value else None, row.reason) for row in rows}


@pytest.fixture
def undisturbed(two_runs, tmp_path):
    output = tmp_path / "undisturbed"
    measure(list(two_runs), **WANTED, output=output)
    return rows_of(output / run.name for run in two_runs)


def test_two_processes_give_the_same_rows_as_one(two_runs, undisturbed):
    in_two(partial(measure, list(two_runs), **WANTED))
    got = rows_of(two_runs)
    assert got.keys() == undisturbed.keys()
    for key, (value, reason) in undisturbed.items():
        assert got[key][1] == reason
        assert (got[key][0] is None) == (value is None)
        assert value is None or got[key][0] == pytest.approx(value, rel=1e-5, abs=1e-7)
    assert not list(two_runs[0].glob(".measurements*"))


EVERYTHING = {"metrics": "all", "steps": 10, "settings": WANTED["settings"] | {
    "random": {"draws": 3, "steps": 1}, "pca": {"count": 3, "steps": 1}, "plane": {"steps": 1},
    "hessian": {"iterations": 4, "probes": 3}, "sequences": 4, "noise": {"batches": 4},
    "curve": {"steps": 2, "batch": 2, "points": 2}, "path": {"points": 2},
}}  # fmt: skip


def test_one_checkpoint_is_measured_by_both_to_the_bit(two_runs, tmp_path, monkeypatch):
    evaluate, done = TokenLoss.__call__, 0

    def counting(self, model):
        nonlocal done
        done += 1
        return evaluate(self, model)

    def counted(name):
        measure(two_runs[1], **EVERYTHING, baseline=two_runs[0], output=tmp_path / name)
        (tmp_path / f"{name}-{os.environ.get('RANK', '0')}.count").write_text(str(done))

    monkeypatch.setattr(TokenLoss, "__call__", counting)
    counted("one")
    done = 0
    in_two(partial(counted, "two"))
    one, two = (
        {row.to_line() for row in read_measurements(tmp_path / name / two_runs[1].name)} for name in ("one", "two")
    )
    assert len(one) > 100
    assert two == one
    measured = {row.metric for row in read_measurements(tmp_path / "two" / two_runs[1].name) if row.has_value}
    assert measured >= {"curved_method_barrier", "gradient_noise_scale", "intrinsic_dimension", "random_draw"}
    # What goes from one evaluation to the next (the critical sharpness) and the centres are evaluated by both.
    (alone,), both = (
        [int(file.read_text()) for file in sorted(tmp_path.glob(f"{n}-*.count"))] for n in ("one", "two")
    )
    shared_by_both = sum(both) - alone
    assert alone > 40
    assert shared_by_both < 0.5 * alone, (alone, both)
    assert abs(both[0] - both[1]) <= 10, both


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_a_fault_of_one_reaches_the_other(two_runs, tmp_path, kind):
    def failing():
        evaluate = TokenLoss.__call__

        def fail(self, model):
            if os.environ["RANK"] == "1" and "random_curve" in [frame.function for frame in inspect.stack()]:
                raise kind("out of paper")
            return evaluate(self, model)

        TokenLoss.__call__ = fail
        measure(two_runs[1], metrics="loss,random", steps=10, settings=WANTED["settings"])

    in_two(failing)
    rows = {row.metric: row for row in read_measurements(two_runs[1])}
    assert rows["loss"].value == rows["loss"].value
    assert f"process 1: {kind.__name__}: out of paper" in rows["random_sharpness"].reason


def test_processes_that_see_different_rows_do_the_work_that_the_first_sees(two_runs, tmp_path, undisturbed):
    def measured():
        if os.environ["RANK"] == "1":  # as one whose file system lags behind
            measure_module.missing_units = lambda *_: []
        measure(list(two_runs), **WANTED)

    in_two(measured)
    assert rows_of(two_runs).keys() == undisturbed.keys()


def test_a_process_that_fails_while_the_others_are_ahead(two_runs, tmp_path, monkeypatch):
    """It cannot tell them; it gives up with its reason, and they notice that it is gone."""
    monkeypatch.setattr(placement, "PEER_TIMEOUT_SECONDS", 2.0)

    def measured():
        load = placement.Placement.model

        def model(self, trajectory, step, **options):
            if os.environ["RANK"] == "1" and step != 10:
                raise MemoryError("no room")
            return load(self, trajectory, step, **options)

        placement.Placement.model = model
        try:
            measure(two_runs[1], metrics="step", steps=10, settings=WANTED["settings"])
        except UserError as error:
            (tmp_path / os.environ["RANK"]).write_text(str(error))

    in_two(measured)
    assert "only process 1 failed: MemoryError: no room" in (tmp_path / "1").read_text()
    assert "another process is gone" in (tmp_path / "0").read_text()


@pytest.mark.parametrize("lost", [0, 1])
def test_one_of_those_that_measure_together_is_lost(two_runs, tmp_path, lost):
    """What was measured is there, the other process says in one line what became of it."""
    said = tmp_path / "said"

    def measured():
        try:
            measure(two_runs[1], metrics="loss,random,plane", steps=10, settings={"plane": {"steps": 20}})
        except UserError as error:
            said.write_text(str(error))
            raise

    part = two_runs[1] / ".measurements-0.part.jsonl"
    ended = lose_one(measured, lost, lambda: any(r.metric == "random_sharpness" for r in read_measurements(part)))
    assert ended not in (0, None)
    if lost == 1:
        ended_so = (
            r"measuring with several processes stopped: another process is gone .*; finished rows are saved, rerun to "
            r"resume"
        )
        assert re.fullmatch(ended_so, said.read_text())
    assert any(row.metric == "random_sharpness" for row in read_measurements(part))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_command_with_what_it_had_written(two_runs, undisturbed, lost):
    parts = [two_runs[rank] / f".measurements-{rank}.part.jsonl" for rank in range(2)]
    ended = lose_one(partial(measure, list(two_runs), **WANTED), lost, lambda: len(read_measurements(parts[lost])) > 1)
    assert ended not in (0, None)
    left = [{row.key for row in read_measurements(part)} for part in parts]
    shares = [{key for key in undisturbed if key[0] == run.name} for run in two_runs]
    assert left[lost] < shares[lost]
    assert left[1 - lost] == shares[1 - lost]
    assert not any(read_measurements(run) for run in two_runs)
    measure(list(two_runs), **WANTED)
    assert rows_of(two_runs) == undisturbed
    assert not any(part.exists() for part in parts)


def test_a_launcher_starts_two_that_share(two_runs, undisturbed, tmp_path):
    """Nothing is prepared for them here: as a user starts them, where there is no accelerator."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps(WANTED["settings"]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["--module", "hf_lowrank", "measure", *map(str, two_runs), "--metrics", WANTED["metrics"]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, *command, "--settings", str(settings)], env=environment, check=True, timeout=PATIENCE)
    assert rows_of(two_runs) == undisturbed
    for run in two_runs:  # two that do not know of each other write every row twice
        assert len((run / "measurements.jsonl").read_text().splitlines()) == len(read_measurements(run))


def test_processes_that_cannot_be_joined_are_not_left_to_the_same_work(two_runs, monkeypatch):
    PartialState._reset_state()
    PartialState(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="accelerate cannot join 2 processes on cpu"):
        measure(two_runs[0], metrics="loss")
    PartialState._reset_state()


def test_what_was_measured_beside_a_baseline_stays_without_it(two_runs, caplog):
    wanted = {"metrics": "method", "steps": 10, "settings": WANTED["settings"]}
    measure(list(two_runs), **wanted)
    before = (two_runs[1] / "measurements.jsonl").read_bytes()
    measure(two_runs[1], **wanted)
    assert (two_runs[1] / "measurements.jsonl").read_bytes() == before
    assert "its earlier values are kept: no baseline" in caplog.text


def test_killed_at_any_moment_and_started_again(two_runs, undisturbed):
    for least in (1, 40, 60, 200):
        child = FORK.Process(target=measure, args=(list(two_runs),), kwargs=WANTED)
        child.start()
        deadline = time.monotonic() + 60
        while len(rows_of(two_runs)) < least and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.003)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert set(rows_of(two_runs)) < set(undisturbed)
    measure(list(two_runs), **WANTED)
    assert rows_of(two_runs) == undisturbed


def test_parts_that_a_killed_process_left_are_merged(two_runs, undisturbed):
    measure(list(two_runs), **WANTED)
    table = two_runs[1] / "measurements.jsonl"
    lines = table.read_bytes().splitlines(keepends=True)
    table.write_bytes(b"".join(lines[:50]))
    part = two_runs[1] / ".measurements-1.part.jsonl"
    part.write_bytes(b"".join(lines[50:]) + b'{"run": "torn')
    size = table.stat().st_size
    measure(list(two_runs), **WANTED)
    assert not part.exists()
    assert table.stat().st_size > size
    assert rows_of(two_runs) == undisturbed


def test_a_run_that_cannot_be_written_does_not_stop_the_others(two_runs):
    (two_runs[0] / "measurements.jsonl").symlink_to(two_runs[0] / "nowhere" / "x.jsonl")
    with pytest.raises(UserError, match=r"full_rank-0.*cannot be written"):
        measure(list(two_runs), metrics="loss")
    assert len(read_measurements(two_runs[1])) == 3
