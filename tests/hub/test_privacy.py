"""No token, no home path and nothing of the environment in what is sent, stored or logged."""

import json
import logging
import os
import subprocess
import sys

import pytest
import yaml

from hf_lowrank.errors import UserError
from hf_lowrank.hub import push
from hf_lowrank.hub.contents import push_file
from hf_lowrank.hub.privacy import one_line, without_private
from hf_lowrank.storage.checksums import read_sealed_text, sealed, sealed_text, unsealed
from hf_lowrank.storage.parsing import dump_yaml, parse_yaml
from tests.hub.runs import BENCHMARK
from tests.hub.server import TOKEN


@pytest.fixture
def marked(hub, run, tmp_path, monkeypatch):
    """A run full of this machine's private things; the words that must not leave it."""
    home = tmp_path / "home-of-marked-person"
    home.mkdir()
    token = "hf_" + "MarkedTokenMarkedToken" + "x" * 8
    hub.settings.tokens[token] = ("user", True)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MARKED_API_KEY", "marked-environment-value")

    def rewrite(path, change):
        text = change(path.read_text())
        path.unlink()
        path.write_text(text)

    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] = {"source": "files", "train_files": [f"{home}/secret-place/corpus.txt"], "sequence_length": 16}
    recipe["name"] = f"run of {token} in {home}"
    rewrite(run / "recipe.yaml", lambda _: yaml.safe_dump(recipe))
    for step in (10, 20, 30):
        folder = run / f"checkpoint-{step}"
        state = json.loads((folder / "trainer_state.json").read_text())
        state["best_model_checkpoint"] = str(folder)
        state["stateful_callbacks"] = {"x": {"key": "marked-environment-value", "dir": f"{home}/cache"}}
        rewrite(folder / "trainer_state.json", lambda _, state=state: json.dumps(state))
        for name in ("config.json", "tokenizer_config.json"):
            content = {**json.loads((folder / name).read_text()), "_name_or_path": f"{home}/models/base", "t": token}
            rewrite(folder / name, lambda _, content=content: json.dumps(content))
    row = {"run": f"{home}/runs/x", "method": "galore", "seed": 0, "step": 30, "metric": "loss", "value": 3.5}
    row |= {"settings": {"file": f"{home}/eval.txt"}, "reason": f"failed in {home}/x with {token}"}
    (run / "measurements.jsonl").write_text(json.dumps(row) + "\n")
    score = {**BENCHMARK, "run": f"{home}/runs/x", "task_version": token, "subset": f"{home}/sets/{token}"}
    other = {**BENCHMARK, "task": f"{home}/tasks/{token}"}
    (run / "downstream.jsonl").write_text(json.dumps(score) + "\n" + json.dumps(other) + "\n")
    return [token.encode(), b"home-of-marked-person", b"marked-environment-value", str(tmp_path).encode()]


@pytest.mark.parametrize("options", [{"optimizer": True}, {"bucket": "user/states"}], ids=["revisions", "bucket"])
def test_nothing_private_reaches_the_hub(hub, run, marked, tmp_path, caplog, options):

    with caplog.at_level(logging.DEBUG):
        push(run, "user/tiny", **options)
    sent = [request.body for request in hub.requests] + [request.path.encode() for request in hub.requests]
    stored = [file.read_bytes() for file in (tmp_path / "hub-server").rglob("*") if file.is_file()]
    if "bucket" in options:
        # Compressed on the way and on the disk.
        files = hub.store.buckets.files("user/states")
        assert {"downstream.jsonl", "checkpoint-30/trainer_state.json", "checkpoint-30/checksums.json"} <= set(files)
        stored += [hub.store.buckets.content("user/states", path) for path in files]
    main = hub.store.files("user/tiny", "main")
    assert b"allenai/ai2_arc" in hub.store.content(main[".eval_results/hf_lowrank.yaml"])
    assert len(sent) > 60
    assert len(stored) > 30
    # matplotlib tells its debug log where its own caches are.
    said = "".join(r.getMessage() for r in caplog.records if not r.name.startswith("matplotlib"))
    # Bodies of commits are base64: what the server stored of them is looked at instead.
    for word in marked:
        for place in (*sent, *stored, said.encode()):
            assert word not in place, word
    headers = [request.headers for request in hub.requests]
    assert all(header.count(marked[0].decode()) <= 1 for header in headers)


def test_a_token_in_the_vocabulary_is_refused(hub, run):
    for step in (10, 20, 30):
        file = run / f"checkpoint-{step}" / "tokenizer.json"
        text = file.read_text().replace('"w5"', f'"{TOKEN}"')
        file.unlink()
        file.write_text(text)
    with pytest.raises(UserError, match="contains an access token"):
        push(run, "user/tiny")
    assert hub.requests == []


def test_nothing_private_in_what_the_command_says(hub, run, marked):
    code = (
        "import sys\nfrom hf_lowrank.hub import push\nfrom hf_lowrank.errors import UserError\n"
        "try:\n    push(sys.argv[1], sys.argv[2], pauses=(0,))\nexcept UserError as error:\n    print(error)\n"
    )
    from tests.hub.faults import FaultPlan

    hub.fail(FaultPlan(at={6: "500", 9: "lost", 14: "cut", 30: "reject"}))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "tiny-run", "user/tiny"],
        capture_output=True, cwd=run.parent, env=dict(os.environ), timeout=120, check=False,
    )  # fmt: skip
    assert b"rejected the token" in done.stdout
    for word in marked[:3]:
        assert word not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("see /data/set/part/a.txt now", "see a.txt now"),
        ("https://huggingface.co/user/repo/tree/main stays", "https://huggingface.co/user/repo/tree/main stays"),
        ("https://s3.x.com/a/b?X-Amz-Signature=abc&k=1 gone", "https://s3.x.com/a/b gone"),
        ("user/repo and a/b/c stay", "user/repo and a/b/c stay"),
        ("regex .*/mlp/.* stays", "regex .*/mlp/.* stays"),
        ("hf_abcdefghijklmnopqrstuvwxyz", "[removed]"),
        ("1/2/3 steps/s", "1/2/3 steps/s"),
    ],
)
def test_what_is_taken_out(before, after):
    assert without_private(before) == after


def test_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError("")) == "ValueError"


def test_what_is_cleaned_carries_the_checksum_of_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/marked-person")
    row = {"metric": "loss", "value": 1.5, "reason": "/home/marked-person/run: no space"}
    (tmp_path / "measurements.jsonl").write_text(json.dumps(sealed(row)) + "\n")
    (tmp_path / "facts.json").write_text(json.dumps(sealed({"device": "/home/marked-person/cpu"})))
    (tmp_path / "recipe.yaml").write_text(sealed_text("data: /home/marked-person/text\n"))
    sent = {name: push_file(name, tmp_path / name).read().decode() for name in os.listdir(tmp_path)}
    assert "marked-person" not in str(sent)
    assert unsealed(json.loads(sent["measurements.jsonl"]))["value"] == 1.5
    unsealed(json.loads(sent["facts.json"]))
    (tmp_path / "recipe.yaml").write_text(sent["recipe.yaml"])
    assert read_sealed_text(tmp_path / "recipe.yaml").count("checksum") == 1


def test_what_is_cleaned_says_the_same_of_the_rest(tmp_path):
    """Of `/data/text/*.txt` is left what YAML takes for a reference; JSON writes the end of a line as a letter."""
    recipe = {"data": {"train_files": ["/data/text/*.txt", "a.txt"]}, "training": {"learning_rate": 1e-5}}
    (tmp_path / "recipe.yaml").write_text(sealed_text(dump_yaml(recipe) + "# of /home/marked-person/a\n"))
    (tmp_path / "facts.json").write_text(json.dumps({"said": "it ended:\n/home/marked-person/run/a is full"}))
    (tmp_path / "config.json").write_text('{"torn": "/home/marked-person/ru')
    sent = {name: push_file(name, tmp_path / name).read().decode() for name in os.listdir(tmp_path)}
    assert "marked-person" not in str(sent)
    recipe["data"]["train_files"][0] = "*.txt"
    assert parse_yaml(sent["recipe.yaml"]) == recipe
    assert json.loads(sent["facts.json"]) == {"said": "it ended:\na is full"}
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe) + "# as it was\n")
    assert push_file("recipe.yaml", tmp_path / "recipe.yaml").read() == (tmp_path / "recipe.yaml").read_bytes()


@pytest.mark.parametrize(
    ("name", "text", "left"),
    [
        ("facts.json", '{"a":"/home/bob/x","a":1}', {"a": 1}),
        ("facts.json", '{"a":"\\ud800 /home/bob/q/z"}', None),
        ("facts.json", '["/home/bob/x/y","checksum"]', ["y", "checksum"]),
        ("facts.json", '{"/home/bob/a/x":1,"/home/bob/b/x":2}', None),
        ("measurements.jsonl", '{"run": "/home/bob/r"}\n{"run": "r"}\n', None),
        ("recipe.yaml", "a: !!set {/home/bob/x/y}\n", {"a": {"y"}}),
        ("recipe.yaml", "a: [/home/bob/x/y\n", None),
    ],
)
def test_nothing_private_is_left_whatever_the_file_is(tmp_path, name, text, left):
    (tmp_path / name).write_text(text)
    sent = push_file(name, tmp_path / name).read().decode()
    assert "bob" not in sent
    if left is not None:
        assert (parse_yaml(sent) if name.endswith("yaml") else json.loads(sent)) == left


@pytest.mark.parametrize(("name", "text"), [("facts.json", '{"a": 20240101}'), ("recipe.yaml", "port: 20240101\n")])
def test_a_number_that_is_a_secret_is_refused(tmp_path, monkeypatch, name, text):
    monkeypatch.setenv("DB_PASSWORD", "20240101")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: contains an access token or another secret"):
        push_file(name, tmp_path / name)


def test_damage_stays_damage(tmp_path):
    row = json.dumps(sealed({"run": "/home/bob/r", "value": 1.0})).replace("1.0", "9.0")
    (tmp_path / "measurements.jsonl").write_text(row + "\n")
    (tmp_path / "recipe.yaml").write_text(sealed_text("data: /home/bob/text\nseed: 0\n").replace("seed: 0", "seed: 1"))
    sent = {name: push_file(name, tmp_path / name).read().decode() for name in os.listdir(tmp_path)}
    assert "bob" not in str(sent)
    with pytest.raises(ValueError, match="its checksum differs"):
        unsealed(json.loads(sent["measurements.jsonl"]))
    (tmp_path / "recipe.yaml").write_text(sent["recipe.yaml"])
    with pytest.raises(ValueError, match="its checksum differs"):
        read_sealed_text(tmp_path / "recipe.yaml")
