"""Pushing runs to the loopback Hub through the unmodified client, and what is there afterwards."""

import hashlib
import json

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from hf_lowrank.errors import UserError
from hf_lowrank.hub import push
from hf_lowrank.hub.push import log_spaced_steps


def branches(hub, repo="user/tiny"):
    return hub.store.repo(repo)["branches"]


def content(hub, revision, path, repo="user/tiny"):
    return hub.store.content(hub.store.files(repo, revision)[path])


def test_every_checkpoint_is_a_revision(hub, run):
    result = push(run, "user/tiny")
    assert [(r.step, r.revision, r.state) for r in result] == [
        (10, "step-10", "sent"),
        (20, "step-20", "sent"),
        (30, "step-30", "sent"),
    ]
    assert set(branches(hub)) == {"main", "latest", "step-10", "step-20", "step-30"}
    assert hub.store.repo("user/tiny")["private"]
    assert branches(hub)["latest"] == branches(hub)["step-30"]
    for step in (10, 20, 30):
        files = hub.store.files("user/tiny", f"step-{step}")
        assert (
            content(hub, f"step-{step}", "model.safetensors")
            == (run / f"checkpoint-{step}" / "model.safetensors").read_bytes()
        )
        assert {"config.json", "tokenizer.json", "recipe.yaml", "evaluation.safetensors", "README.md"} <= set(files)
        assert not {"optimizer.pt", "training_args.bin", "rng_state.pth"} & set(files)
    assert content(hub, "main", "model.safetensors") == content(hub, "step-30", "model.safetensors")
    assert hub.repeated == []


def test_again_sends_nothing(hub, run):
    push(run, "user/tiny")
    before = branches(hub)
    hub.requests.clear()
    assert {r.state for r in push(run, "user/tiny")} == {"there"}
    assert branches(hub) == before
    assert not [r for r in hub.requests if r.method == "PUT" or "/commit/" in r.path or "/branch/" in r.path]


def test_commit_messages_say_step_loss_and_recipe(hub, run):
    push(run, "user/tiny", steps=[20])
    commit = HfApi().list_repo_commits("user/tiny", revision="step-20")[0]
    assert commit.title == "Step 20, loss 3.9000: nano-galore"
    assert "name: galore" in commit.message


def test_later_pushes_of_earlier_steps_leave_latest_and_main(hub, run):
    push(run, "user/tiny", steps=[10, 30])
    before = branches(hub)
    push(run, "user/tiny", steps=[20])
    after = branches(hub)
    assert after["latest"] == before["latest"] == after["step-30"]
    assert content(hub, "main", "model.safetensors") == content(hub, "step-30", "model.safetensors")
    assert content(hub, "step-20", "model.safetensors") == (run / "checkpoint-20/model.safetensors").read_bytes()
    assert not [name for name in after if name.startswith("incoming")]


def test_optimizer_state_goes_on_its_own_branch(hub, run):
    push(run, "user/tiny", steps=[30], optimizer=True)
    assert set(branches(hub)) == {"main", "latest", "step-30", "optimizer-step-30"}
    files = hub.store.files("user/tiny", "optimizer-step-30")
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(files)
    assert "model.safetensors" not in files
    assert content(hub, "optimizer-step-30", "optimizer.pt") == (run / "checkpoint-30/optimizer.pt").read_bytes()


def test_public_only_when_asked(hub, run):
    push(run, "user/open", steps=[30], public=True)
    assert not hub.store.repo("user/open")["private"]


def test_shared_files_are_sent_once(hub, run):
    push(run, "user/tiny")
    sent = [json.loads(line) for r in hub.requests if "/commit/latest" in r.path for line in r.body.splitlines()]
    assert [line["value"]["path"] for line in sent if line["key"] == "file"].count("tokenizer.json") == 0


def test_sharded_weights_and_leftover_shards(hub, run):
    from tests.hub.runs import make_model

    push(run, "user/tiny", steps=[10, 20])
    shards = run / "checkpoint-30"
    (shards / "model.safetensors").unlink()
    make_model(5).save_pretrained(shards, max_shard_size="8KB")
    push(run, "user/tiny")
    files = hub.store.files("user/tiny", "main")
    assert "model.safetensors" not in files
    assert "model.safetensors.index.json" in files


def test_multipart_uploads_and_paged_trees(hub, run):
    hub.settings.part_size, hub.settings.page_size = 5000, 3
    push(run, "user/tiny")
    data = content(hub, "step-20", "model.safetensors")
    assert (
        hashlib.sha256(data).digest()
        == hashlib.sha256((run / "checkpoint-20/model.safetensors").read_bytes()).digest()
    )
    assert {r.state for r in push(run, "user/tiny")} == {"there"}


def test_a_changed_checkpoint_replaces_its_revision(hub, run):
    from safetensors.torch import load_file, save_file

    push(run, "user/tiny")
    file = run / "checkpoint-20/model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    states = {r.step: r.state for r in push(run, "user/tiny")}
    assert states == {10: "there", 20: "sent", 30: "there"}
    assert content(hub, "step-20", "model.safetensors") == file.read_bytes()


def test_choosing(hub, run):
    assert [r.step for r in push(run, "user/a", every=2)] == [10, 30]
    assert [r.step for r in push(run, "user/b", log_spaced=1)] == [30]
    assert log_spaced_steps([0, 1, 2, 4, 8, 16, 32, 64, 100], 3) >= {0, 100}
    assert len(log_spaced_steps(list(range(0, 1000, 10)), 5)) == 5


def refused(run, repo="user/tiny", **options):
    with pytest.raises(UserError) as caught:
        push(run, repo, **{"pauses": (), **options})
    line = str(caught.value)
    assert "\n" not in line
    return line


def nothing_written(hub):
    return not [r for r in hub.requests if r.method in ("PUT", "POST", "DELETE") and r.status == 200]


@pytest.mark.parametrize("name", ["tiny", "user/ti ny", "a/b/c", "user/-x", "", "user/" + "x" * 120, "../etc"])
def test_malformed_names(hub, run, name):
    assert "user/name" in refused(run, name)
    assert hub.requests == []


def test_somebody_elses_name(hub, run):
    assert "no write access" in refused(run, "other/tiny")
    assert not hub.store.exists("other/tiny")


def test_a_token_that_may_only_read(hub, run, monkeypatch):
    from tests.hub.server import READ_TOKEN

    hub.store.create("user/tiny", False)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "no write access" in refused(run)
    assert list(branches(hub)) == ["main"]


def test_a_refused_token(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "z" * 34)
    line = refused(run)
    assert "rejected the token" in line
    assert "zzz" not in line
    assert nothing_written(hub)


def test_no_network(hub, run, quick_client):
    with pytest.raises(
        UserError, match=r"^user/tiny: the Hub was not reached or failed, and no checkpoint was sent: "
    ):
        push(run, "user/tiny", endpoint="http://127.0.0.1:9", token="x", pauses=())


def test_nobody_logged_in(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused(run)
    assert nothing_written(hub)


def test_taken_by_something_else(hub, run):
    hub.store.create("user/tiny", True)
    hub.store.commit("user/tiny", "main", [{"key": "file", "path": "train.py", "data": b"x"}], "mine", "", None)
    assert "taken" in refused(run)
    assert list(branches(hub)) == ["main"]


def test_taken_by_another_run(hub, run, tmp_path):
    from tests.hub.runs import make_run

    push(run, "user/tiny", steps=[10])
    before = branches(hub)
    assert "another recipe" in refused(make_run(tmp_path / "another", seed=7))
    assert branches(hub) == before


def test_steps_that_are_not_there(hub, run):
    assert "10, 20, 30" in refused(run, steps=[15])
    assert "one way" in refused(run, steps=[10], every=2)
    assert hub.requests == []


def test_a_run_without_checkpoints(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "checkpoint" in refused(tmp_path / "empty")
    assert "no such run" in refused(tmp_path / "nowhere")
    assert hub.requests == []


def test_weights_that_do_not_match_their_configuration(hub, run):
    file = run / "checkpoint-20/config.json"
    config = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps({**config, "hidden_size": 32, "intermediate_size": 64}))
    line = refused(run)
    assert "checkpoint-20" in line
    assert "do not match config.json" in line
    assert hub.requests == []


def test_truncated_weights(hub, run):
    file = run / "checkpoint-20/model.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: len(data) // 2])
    assert "checkpoint-20" in refused(run)
    assert hub.requests == []


def test_what_is_not_whole_is_named(hub, run, quick_client):
    from tests.hub.faults import FaultPlan

    push(run, "user/tiny", steps=[10])
    hub.fail(FaultPlan(at=dict.fromkeys(range(8, 400), "503")))
    line = refused(run, pauses=(0, 0))
    assert "1 of 3 revisions are complete" in line
    assert "step-20" in line
    assert "step-30" in line
    hub.fail(FaultPlan())
    assert {r.step: r.state for r in push(run, "user/tiny")} == {10: "there", 20: "sent", 30: "sent"}


def test_the_card_is_valid(hub, run):
    push(run, "user/tiny", license="apache-2.0")
    card = ModelCard(content(hub, "main", "README.md").decode())
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert torch.__version__
