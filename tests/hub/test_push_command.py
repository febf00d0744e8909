"""`hf-lowrank push` against the loopback Hub: what it prints, and the status that it ends with."""

import sys
from types import SimpleNamespace

import pytest

import hf_lowrank.hub  # noqa: F401  its modules are looked up by name
from hf_lowrank.cli import main
from tests.hub.faults import FaultPlan


@pytest.fixture
def command(hub, run, quick_client, monkeypatch, capsys):
    """Calls `hf-lowrank push RUN REPO …`; no pause takes any time. Returns status, stdout and the lines of stderr."""
    # The package's `push` is the function; the module that waits is reached by its full name.
    monkeypatch.setattr(sys.modules["hf_lowrank.hub.push"], "time", SimpleNamespace(sleep=lambda seconds: None))

    def call(*options, folder=run, repo="user/tiny"):
        with pytest.raises(SystemExit) as stop:
            main(["push", str(folder), repo, *options])
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err.splitlines()

    return call


def whole_steps(hub, run, repo="user/tiny"):
    """The steps whose revision holds the very weights of the run's checkpoint."""
    found = []
    for step in (10, 20, 30):
        if f"step-{step}" in hub.store.repo(repo)["branches"]:
            file = hub.store.files(repo, f"step-{step}").get("model.safetensors")
            weights = (run / f"checkpoint-{step}/model.safetensors").read_bytes()
            if file is not None and hub.store.content(file) == weights:
                found.append(step)
    return found


def test_a_push_says_how_many_revisions_are_whole(command, hub, run):
    status, out, _ = command("--every", "2")
    assert (status, out) == (0, "2 revisions of user/tiny are complete\n")
    assert whole_steps(hub, run) == [10, 30]
    status, out, _ = command()
    assert (status, out) == (0, "3 revisions of user/tiny are complete\n")
    assert hub.store.repo("user/tiny")["private"]


@pytest.mark.parametrize("kind", ["503", "cut-request", "forget"])
def test_what_is_not_whole_is_named_with_a_status_and_completed_by_the_next_push(command, hub, run, kind):
    assert command("--steps", "10")[0] == 0
    hub.fail(FaultPlan(at=dict.fromkeys(range(8, 4000), kind)))
    status, out, errors = command()
    assert status != 0
    assert out == ""
    line = errors[-1]
    missing = [step for step in (10, 20, 30) if step not in whole_steps(hub, run)]
    assert missing
    assert f"{3 - len(missing)} of 3 revisions are complete" in line
    assert all(f"step-{step}" in line for step in missing)
    assert "step-10" not in line
    assert "repeat the command to complete them" in line
    hub.fail(FaultPlan())
    assert command()[:2] == (0, "3 revisions of user/tiny are complete\n")
    assert whole_steps(hub, run) == [10, 20, 30]
    assert not [name for name in hub.store.repo("user/tiny")["branches"] if name.startswith("incoming")]


def test_wrong_input_is_one_line_and_nothing_is_sent(command, hub, run, tmp_path):
    for options, said in (
        ({"repo": "no/such/name"}, "user/name"),
        ({"folder": tmp_path / "nowhere"}, "no such run directory"),
        ({"repo": "other/tiny"}, "no write access"),
    ):
        status, out, errors = command(**options)
        assert (status, out, len(errors)) == (2, "", 1)
        assert said in errors[0]
    for options in (("--steps", "15"), ("--steps", "ten"), ("--steps", "10", "--every", "2"), ("--dense", "both")):
        status, out, errors = command(*options)
        assert (status, out, len(errors)) == (2, "", 1)
    assert not hub.store.exists("user/tiny")
