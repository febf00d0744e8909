"""The command line itself; what the verbs do is tested with the functions that they call."""

import runpy
import sys

import pytest

from hf_lowrank.cli import main
from hf_lowrank.methods import METHODS


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_help_names_every_verb(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for verb in ("train", "measure", "report", "methods", "metrics"):
        assert verb in out


def test_it_is_a_module_for_launchers(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf_lowrank", "methods"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("hf_lowrank", run_name="__main__")
    assert end.value.code == 0
    assert "galore" in capsys.readouterr().out


def test_methods_lists_the_table(capsys):
    status, out, _ = run(capsys, "methods")
    assert status == 0
    for name in METHODS:
        assert name in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("no_such_verb",),
        ("train",),
        ("train", "recipe.yaml", "--no-such-option"),
        ("train", "no/such/recipe.yaml"),
        ("measure", "no/such/run"),
        ("report", "no/such/run", "--output", "x"),
        ("train", "recipe.yaml", "--seed", "many"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("hf-lowrank: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
