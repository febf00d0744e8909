"""SIGTERM during a step: the run saves, stops, and resumes to the bits of an uninterrupted one."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from hf_lowrank.cli import main
from hf_lowrank.errors import STOPPED_STATUS, StoppedError
from hf_lowrank.training import load_recipe, pretrain
from hf_lowrank.training.checkpointing import INTERIM_FILE


@pytest.fixture
def terminate(monkeypatch):
    """Sends SIGTERM during a step of the next run."""

    def within(step):
        compute, calls = Trainer.compute_loss, 0

        def told(self, model, *arguments, **options):
            nonlocal calls
            calls += model.training
            if calls == step:
                calls += 1
                os.kill(os.getpid(), signal.SIGTERM)
            return compute(self, model, *arguments, **options)

        monkeypatch.setattr(Trainer, "compute_loss", told)

    return within


def timeless_log(run):
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    return [{k: v for k, v in e.items() if "runtime" not in k and "second" not in k} for e in state["log_history"]]


@pytest.mark.parametrize(("logging", "step"), [(1, 4), (2, 4), (4, 3), (4, 5)])
def test_a_stopped_run_ends_with_the_same_bits(write_recipe, tmp_path, terminate, logging, step):
    path = write_recipe(
        model__attention_dropout=0.1, training__save_steps=3, training__logging_steps=logging, training__max_steps=6
    )
    whole = pretrain(load_recipe(path), tmp_path / "whole")
    run = tmp_path / "stopped"
    before = signal.getsignal(signal.SIGTERM)
    terminate(step)
    with pytest.raises(StoppedError, match=f"stopped by SIGTERM after step {step}, which is saved"):
        pretrain(load_recipe(path), run)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (run / f"checkpoint-{step}" / INTERIM_FILE).exists() == (step % 3 != 0)
    pretrain(load_recipe(path), run)

    assert {p.name for p in run.glob("checkpoint-*")} == {p.name for p in whole.glob("checkpoint-*")}
    for name in ("checkpoint-3", "checkpoint-6"):
        one, other = (load_file(folder / name / "model.safetensors") for folder in (whole, run))
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
        states = [json.loads((folder / name / "trainer_state.json").read_text()) for folder in (whole, run)]
        assert states[0]["stateful_callbacks"] == states[1]["stateful_callbacks"]
    assert timeless_log(run) == timeless_log(whole)
    assert list(json.loads((run / "facts.json").read_text())["progress"]) == ["3", "6"]


def test_the_command_reports_it_with_its_own_exit_status(write_recipe, tmp_path, terminate, capsys):
    path = write_recipe()
    terminate(2)
    with pytest.raises(SystemExit) as end:
        main(["train", str(path), "--output", str(tmp_path / "run")])
    assert end.value.code == STOPPED_STATUS
    assert "stopped by SIGTERM after step 2" in capsys.readouterr().err.splitlines()[-1]


def test_a_signal_in_the_last_step_changes_nothing(write_recipe, tmp_path, terminate):
    terminate(6)
    run = pretrain(load_recipe(write_recipe()), tmp_path / "run")
    assert not list(run.glob(f"*/{INTERIM_FILE}"))
