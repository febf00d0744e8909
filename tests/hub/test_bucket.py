"""Runs stored in a bucket through the unmodified client, which also reads them back."""

import json
import logging

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import http_backoff

from hf_lowrank.errors import UserError
from hf_lowrank.hub import PushRevisionsCallback, push
from hf_lowrank.hub.bucket import Bucket
from hf_lowrank.hub.callback import Queue
from hf_lowrank.runs.checkpoints import why_incomplete, why_not_resumable
from hf_lowrank.runs.trajectory import Trajectory
from tests.hub.faults import FaultPlan
from tests.hub.runs import BENCHMARK
from tests.hub.server import TOKEN
from tests.hub.test_push_callback import branches, train

BUCKET = "user/states"
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def stored(hub, path):
    return hub.store.buckets.content(BUCKET, path)


def whole_steps(hub, run, folder=""):
    """The steps whose every byte is in the bucket."""
    files = hub.store.buckets.files(BUCKET)
    return [
        step
        for step in (10, 20, 30)
        if f"{folder}checkpoint-{step}/checksums.json" in files
        and all(
            f"{folder}checkpoint-{step}/{name}" in files
            and stored(hub, f"{folder}checkpoint-{step}/{name}") == (run / f"checkpoint-{step}/{name}").read_bytes()
            for name in ("model.safetensors", "tokenizer.json", *STATES)
        )
    ]


def test_a_bucket_takes_every_checkpoint_and_revisions_the_chosen_ones(hub, run):
    result = push(run, "user/tiny", steps=[20], bucket=BUCKET)
    assert [(r.step, r.state) for r in result] == [(20, "sent")]
    assert set(branches(hub, "user/tiny")) == {"main", "latest", "step-20"}
    assert not {"optimizer.pt"} & set(hub.store.files("user/tiny", "step-20"))
    assert whole_steps(hub, run) == [10, 20, 30]
    assert hub.store.buckets.bucket(BUCKET)["private"]
    files = hub.store.buckets.files(BUCKET)
    assert {"run.json", "recipe.yaml", "evaluation.safetensors", "facts.json", "tokenizer/tokenizer.json"} <= set(
        files
    )
    assert not [path for path in files if "training_args" in path]
    # Xet's own storage is never sent the Hub's token.
    assert not [r for r in hub.requests if r.path.startswith(("/__cas__", "/__xorb__")) and "Bearer hf_" in r.headers]


def test_places_of_streams_and_marks_of_stopped_runs_go_along(hub, run):
    (run / "checkpoint-20" / "stream.json").write_text("{}")
    (run / "checkpoint-30" / "interim.json").write_text("{}")
    push(run, "user/tiny", steps=[20], bucket=BUCKET)
    assert stored(hub, "checkpoint-20/stream.json") == stored(hub, "checkpoint-30/interim.json") == b"{}"


def test_a_checkpoint_whose_states_are_sharded_is_refused_rather_than_stored_without_them(hub, run):
    (run / "checkpoint-20" / "optimizer_0").mkdir()
    with pytest.raises(UserError, match="sharded over processes"):
        push(run, "user/tiny", steps=[10], bucket=BUCKET)
    queue = Queue(run, f"hf://buckets/{BUCKET}")
    with pytest.raises(UserError, match="sharded over processes"):
        queue.add(run / "checkpoint-20", 20, optimizer=True)
    assert queue.jobs() == []


def test_what_the_client_downloads_is_a_run_directory(hub, run, tmp_path):
    push(run, "user/tiny", steps=[20], bucket=f"{BUCKET}/a/run")
    HfApi().sync_bucket(f"hf://buckets/{BUCKET}/a/run", str(tmp_path / "again"), quiet=True)
    here, there = Trajectory(run), Trajectory(tmp_path / "again")
    assert there.steps == here.steps == [10, 20, 30]
    assert there.run.recipe == here.run.recipe
    assert there.evaluation_set().fingerprint == here.evaluation_set().fingerprint
    assert [there.fingerprint(step) for step in there.steps] == [here.fingerprint(step) for step in here.steps]
    for step in there.steps:
        folder = tmp_path / f"again/checkpoint-{step}"
        assert why_incomplete(folder, weights=True) is None
        assert why_not_resumable(folder) is None
        for name in ("model.safetensors", *STATES):
            assert (folder / name).read_bytes() == (run / f"checkpoint-{step}" / name).read_bytes()
    # Its checksums find damage.
    (tmp_path / "again/checkpoint-20/optimizer.pt").write_bytes(b"")
    assert "optimizer.pt has 0 bytes" in why_not_resumable(tmp_path / "again/checkpoint-20")


def test_again_sends_nothing_and_a_change_only_itself(hub, run):
    push(run, "user/tiny", bucket=BUCKET)
    before = hub.store.buckets.files(BUCKET)
    hub.requests.clear()
    push(run, "user/tiny", bucket=BUCKET)
    assert hub.store.buckets.files(BUCKET) == before
    assert not [r for r in hub.requests if r.method == "POST" and ("/batch" in r.path or "__cas__" in r.path)]
    (run / "downstream.jsonl").write_text(json.dumps(BENCHMARK) + "\n")
    file = run / "checkpoint-20/optimizer.pt"
    content = file.read_bytes()[::-1]
    file.unlink()
    file.write_bytes(content)
    push(run, "user/tiny", bucket=BUCKET)
    after = hub.store.buckets.files(BUCKET)
    changed = {path for path in after if after[path]["xetHash"] != before.get(path, {}).get("xetHash")}
    assert changed == {"downstream.jsonl", "checkpoint-20/optimizer.pt", "checkpoint-20/checksums.json"}
    assert stored(hub, "checkpoint-20/optimizer.pt") == content
    assert hub.repeated == []


def test_checksums_go_before_what_they_are_of_and_come_after_it(hub, run):
    push(run, "user/tiny", steps=[10], bucket=BUCKET)
    file = run / "checkpoint-10/optimizer.pt"
    content = file.read_bytes()[::-1]
    file.unlink()
    file.write_bytes(content)
    hub.requests.clear()
    push(run, "user/tiny", steps=[10], bucket=BUCKET)
    batches = [json.loads(line) for r in hub.requests if r.path.endswith("/batch") and "buckets" in r.path
               for line in r.body.splitlines()]  # fmt: skip
    assert [(each["type"], each["path"]) for each in batches] == [
        ("deleteFile", "checkpoint-10/checksums.json"),
        ("addFile", "checkpoint-10/optimizer.pt"),
        ("addFile", "checkpoint-10/checksums.json"),
    ]


def test_a_file_of_ours_that_a_checkpoint_no_longer_has_goes_and_others_stay(hub, run):
    push(run, "user/tiny", steps=[10], bucket=BUCKET)
    api = HfApi()
    api.batch_bucket_files(BUCKET, add=[(b"a", "checkpoint-10/model-00001-of-00002.safetensors"), (b"b", "notes.txt")])
    push(run, "user/tiny", steps=[10], bucket=BUCKET)
    files = hub.store.buckets.files(BUCKET)
    assert "checkpoint-10/model-00001-of-00002.safetensors" not in files
    assert stored(hub, "notes.txt") == b"b"


def test_a_bucket_of_another_run_or_of_something_else_is_refused(hub, run, made_run, tmp_path):
    push(run, "user/tiny", steps=[10], bucket=BUCKET)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").unlink()
    (run / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match="taken: it holds the run 'nano-galore' with another recipe"):
        push(run, "user/other", bucket=BUCKET)
    assert not hub.store.exists("user/other")
    hub.store.buckets.create("user/full", True)
    HfApi().batch_bucket_files("user/full", add=[(b"a", "checkpoint-10/model.safetensors")])
    with pytest.raises(UserError, match=r"taken: it holds other files, such as checkpoint-10/model\.safetensors"):
        push(run, "user/other", bucket="user/full")
    push(run, "user/other", steps=[10], bucket="user/full/runs/one")
    assert "runs/one/checkpoint-10/optimizer.pt" in hub.store.buckets.files("user/full")


@pytest.mark.parametrize(
    "address", ["states", "user/", "user/states/../x", "user/.hidden", "hf://user/x", "a/b c", ""]
)
def test_a_malformed_address_is_one_line_and_nothing_is_sent(hub, run, address):
    with pytest.raises(UserError, match="not a bucket; it must be user/bucket or user/bucket/folder"):
        push(run, "user/tiny", bucket=address)
    assert hub.requests == []


def test_states_go_to_one_place(hub, run):
    with pytest.raises(UserError, match="choose optimizer or bucket"):
        push(run, "user/tiny", bucket=BUCKET, optimizer=True)
    with pytest.raises(UserError, match="choose optimizer or bucket"):
        PushRevisionsCallback("user/tiny", bucket=BUCKET, optimizer=True)
    assert Bucket("hf://buckets/user/states/").address == "hf://buckets/user/states"
    assert hub.requests == []


def test_somebody_elses_bucket_is_refused(hub, run):
    with pytest.raises(UserError, match="no write access"):
        push(run, "user/tiny", bucket="other/states")
    assert not hub.store.exists("user/tiny")


@pytest.mark.parametrize("kind", ["503", "cut-request", "lost", "forget"])
def test_what_is_not_whole_is_named_and_completed_by_the_next_push(hub, run, quick_client, kind):
    push(run, "user/tiny", steps=[10])
    hub.fail(FaultPlan(at=dict.fromkeys(range(30, 4000), kind)))
    with pytest.raises(UserError, match=r"of 3 checkpoints are complete; incomplete: checkpoint-\d+ .*repeat the com"):
        push(run, "user/tiny", bucket=BUCKET, pauses=())
    assert whole_steps(hub, run) != [10, 20, 30]
    hub.fail(FaultPlan())
    push(run, "user/tiny", bucket=BUCKET)
    assert whole_steps(hub, run) == [10, 20, 30]


def test_the_clients_own_retry_of_a_batch_does_not_count_as_sent_again(hub, run, quick_client):
    push(run, "user/tiny", steps=[10], bucket=BUCKET)
    name = hub.store.buckets.files(BUCKET)["checkpoint-10/optimizer.pt"]["xetHash"]
    body = json.dumps({"type": "addFile", "path": "copy.pt", "xetHash": name, "mtime": 0}).encode()

    def send(**options):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        http_backoff("POST", f"{hub.url}/api/buckets/{BUCKET}/batch", headers=headers, content=body, **options)

    hub.fail(FaultPlan(at={0: "lost", 1: "503", 2: "lost"}))
    send()
    assert [r.fault for r in hub.requests if r.body == body] == ["lost", "503", "lost", None]
    assert hub.repeated == []
    send()
    assert hub.repeated == [f"{BUCKET}/copy.pt"]
    # Whoever has listed the bucket knows what it holds.
    for kind in ("cut", "lost"):
        hub.fail(FaultPlan(at={0: kind}))
        with pytest.raises(HTTPError):
            send(max_retries=0)
        hub.repeated.clear()
        assert "copy.pt" in Bucket(BUCKET).files()
        send()
        assert hub.repeated == [f"{BUCKET}/copy.pt"]


def test_a_trainer_stores_every_save_and_publishes_every_other(hub, tmp_path):
    callback = PushRevisionsCallback("user/trained", every=2, bucket=BUCKET, first_pause=0.01)
    train(tmp_path / "out", callback, save_total_limit=1)
    assert set(branches(hub)) == {"main", "latest", "step-2", "step-6"}
    files = hub.store.buckets.files(BUCKET)
    assert {f"checkpoint-{step}/{name}" for step in (2, 4, 6) for name in (*STATES, "checksums.json")} <= set(files)
    last = tmp_path / "out/checkpoint-6"
    assert stored(hub, "checkpoint-6/optimizer.pt") == (last / "optimizer.pt").read_bytes()
    assert Queue(tmp_path / "out", f"hf://buckets/{BUCKET}").jobs() == []


def test_a_dead_network_leaves_both_queues_and_the_next_push_empties_them(hub, tmp_path, caplog):
    hub.fail(FaultPlan(always="refuse"))
    callback = PushRevisionsCallback("user/trained", every=2, bucket=BUCKET, first_pause=0.01)
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        train(tmp_path / "out", callback, save_total_limit=1)
    assert "not pushed yet: step-2, step-6" in caplog.text
    assert "not pushed yet: checkpoint-2, checkpoint-4, checkpoint-6" in caplog.text
    hub.fail(FaultPlan())
    assert [r.step for r in push(tmp_path / "out", "user/trained", bucket=BUCKET)] == [2, 6]
    files = hub.store.buckets.files(BUCKET)
    assert {f"checkpoint-{step}/{name}" for step in (2, 4, 6) for name in (*STATES, "checksums.json")} <= set(files)
    assert Queue(tmp_path / "out", f"hf://buckets/{BUCKET}").jobs() == []
    assert Queue(tmp_path / "out", "user/trained").jobs() == []
