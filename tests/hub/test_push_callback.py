"""Pushing beside a training: the training never waits, never fails, and nothing is lost."""

import logging
import os
import threading
import time

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import UserError
from hf_lowrank.hub import PushRevisionsCallback, push
from hf_lowrank.hub.callback import Queue
from tests.hub.faults import FaultPlan
from tests.hub.runs import VOCABULARY, make_model, make_tokenizer


def train(folder, callback, steps=6, save_steps=2, **options):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=save_steps,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (16, 8), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(make_model(0), args, train_dataset=data, processing_class=make_tokenizer(), callbacks=[callback])
    trainer.train()
    return trainer


def branches(hub, repo="user/trained"):
    return hub.store.repo(repo)["branches"]


def test_a_trainer_pushes_what_it_saves(hub, tmp_path):
    trainer = train(tmp_path / "out", PushRevisionsCallback("user/trained", first_pause=0.01))
    assert set(branches(hub)) == {"main", "latest", "step-2", "step-4", "step-6"}
    for step in (2, 4, 6):
        files = hub.store.files("user/trained", f"step-{step}")
        saved = (tmp_path / f"out/checkpoint-{step}/model.safetensors").read_bytes()
        assert hub.store.content(files["model.safetensors"]) == saved
    assert trainer.state.global_step == 6
    assert Queue(tmp_path / "out", "user/trained").jobs() == []
    card = hub.store.content(hub.store.files("user/trained", "main")["README.md"]).decode()
    assert "user/trained" in card


def test_rotated_checkpoints_are_pushed_all_the_same(hub, tmp_path):
    hub.fail(FaultPlan(always="refuse"))
    callback = PushRevisionsCallback("user/trained", first_pause=0.01)
    train(tmp_path / "out", callback, save_total_limit=1)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]
    assert [job.step for job in Queue(tmp_path / "out", "user/trained").jobs()] == [2, 4, 6]
    hub.fail(FaultPlan())
    assert [r.step for r in push(tmp_path / "out", "user/trained")] == [2, 4, 6]
    assert Queue(tmp_path / "out", "user/trained").jobs() == []


def test_a_dead_network_is_a_warning(hub, tmp_path, caplog):
    hub.fail(FaultPlan(always="refuse"))
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer = train(tmp_path / "out", PushRevisionsCallback("user/trained", first_pause=0.01))
    assert trainer.state.global_step == 6
    assert "not pushed yet: step-2, step-4, step-6" in caplog.text


def test_a_refused_token_is_a_warning_and_the_next_run_takes_it_up(hub, tmp_path, caplog, monkeypatch):
    good = os.environ["HF_TOKEN"]
    monkeypatch.setenv("HF_TOKEN", "hf_" + "q" * 34)
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        train(tmp_path / "out", PushRevisionsCallback("user/trained", first_pause=0.01))
    assert "rejected the token" in caplog.text
    assert "qqqq" not in caplog.text
    monkeypatch.setenv("HF_TOKEN", good)
    callback = PushRevisionsCallback("user/trained", first_pause=0.01)
    args, control = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True), TrainerControl()
    callback.on_train_begin(args, TrainerState(), control)
    callback.on_train_end(args, TrainerState(), control)
    assert set(branches(hub)) == {"main", "latest", "step-2", "step-4", "step-6"}


def test_faults_on_the_way_are_tried_again(hub, tmp_path, quick_client):
    hub.fail(FaultPlan(at={2: "503", 5: "cut", 9: "forget", 12: "lost", 17: "refuse", 25: "429"}))
    train(tmp_path / "out", PushRevisionsCallback("user/trained", first_pause=0.01))
    assert set(branches(hub)) == {"main", "latest", "step-2", "step-4", "step-6"}
    assert hub.repeated == []


def test_a_save_does_not_wait_for_the_hub(hub, run):
    hub.fail(FaultPlan(always="delay", delay=0.5))
    callback = PushRevisionsCallback("user/trained", wait_at_end=0.01)
    args, state, control = TrainingArguments(output_dir=str(run), use_cpu=True), TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control)
    began = time.perf_counter()
    for state.global_step in (10, 20, 30):
        callback.on_save(args, state, control)
    assert time.perf_counter() - began < 0.5
    callback.on_train_end(args, state, control)
    assert time.perf_counter() - began < 1.5
    hub.fail(FaultPlan())
    for thread in threading.enumerate():
        if thread.name == "push-revisions":
            thread.join(60)


def test_a_damaged_checkpoint_is_set_aside_and_the_others_go(hub, run, caplog):
    queue = Queue(run, "user/trained")
    for step in (10, 20, 30):
        queue.add(run / f"checkpoint-{step}", step)
    weights = queue.folder / "checkpoint-20/model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[:-100])
    callback = PushRevisionsCallback("user/trained", first_pause=0.01)
    args, state, control = TrainingArguments(output_dir=str(run), use_cpu=True), TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control)
    callback.on_train_end(args, state, control)
    assert set(branches(hub)) == {"main", "latest", "step-10", "step-30"}
    assert (queue.folder / "refused-20").is_dir()
    assert "moved to refused-20" in caplog.text


def test_every_second_save_and_wrong_arguments(hub, run):
    callback = PushRevisionsCallback("user/trained", every=2, first_pause=0.01)
    args, state, control = TrainingArguments(output_dir=str(run), use_cpu=True), TrainerState(), TrainerControl()
    for state.global_step in (10, 20, 30):
        callback.on_save(args, state, control)
    callback.on_train_end(args, state, control)
    assert set(branches(hub)) == {"main", "latest", "step-10", "step-30"}
    with pytest.raises(UserError, match="user/name"):
        PushRevisionsCallback("not a name")
    with pytest.raises(UserError, match="every"):
        PushRevisionsCallback("user/x", every=0)


def test_an_entry_in_the_making_is_no_leftover(hub, run, monkeypatch):
    from hf_lowrank.hub import callback as queue_module

    link = queue_module._link

    def slow_link(source, target):
        time.sleep(0.02)
        link(source, target)

    monkeypatch.setattr(queue_module, "_link", slow_link)
    callback = PushRevisionsCallback("user/trained", first_pause=0.01)
    args, state, control = TrainingArguments(output_dir=str(run), use_cpu=True), TrainerState(), TrainerControl()
    for state.global_step in (10, 20, 30):
        callback.on_save(args, state, control)
    callback.on_train_end(args, state, control)
    assert set(branches(hub)) == {"main", "latest", "step-10", "step-20", "step-30"}
