"""What the command line says of itself: groups, examples, statuses, completion, pages of methods and metrics."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from hf_lowrank import cli
from hf_lowrank.cli.app import GROUPS, STATUSES
from hf_lowrank.cli.output import plain, print_json
from hf_lowrank.errors import StoppedError, UserError
from hf_lowrank.methods import METHODS, settings_of
from hf_lowrank.metrics import METRICS
from hf_lowrank.metrics.pages import PAGES
from hf_lowrank.runs.measure_settings import MeasureSettings

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(cli.app).commands
EXAMPLES = [(name, line) for name, command in COMMANDS.items() for line in command.epilog.splitlines()]


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def words(text):
    return " ".join(text.split())


def test_every_command_is_in_one_group(capsys):
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)
    _, out, _ = run(capsys, "--help")
    places = [out.index(f"\n{heading}:\n") for heading in GROUPS]
    assert places == sorted(places)
    for start, end, names in zip(places, [*places[1:], out.index("\nExit status:\n")], GROUPS.values(), strict=True):
        assert re.findall(r"^  (\S+)", out[start:end], flags=re.MULTILINE) == list(names)


def test_help_and_documentation_name_the_statuses(capsys):
    _, out, _ = run(capsys, "--help")
    documented = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    for status, meaning in STATUSES.items():
        assert f" {status} " in out
        assert words(meaning) in words(out)
        assert f"| {status} | {meaning} |" in documented


UNEXPECTED = "hf-lowrank: an unexpected error; please report it with the lines above"


@pytest.mark.parametrize(
    ("error", "status", "last"),
    [
        (UserError("a is wrong"), 2, "hf-lowrank: a is wrong"),
        (StoppedError("stopped at step 3"), 75, "hf-lowrank: stopped at step 3"),
        (KeyboardInterrupt(), 130, "hf-lowrank: interrupted"),
        (ZeroDivisionError("no such"), 70, UNEXPECTED),
        (OSError(28, "No space left on device", "f"), 2, "hf-lowrank: f: No space left on device"),
        (OSError(9, "Bad file descriptor"), 70, UNEXPECTED),
    ],
)
def test_each_error_has_its_status(capsys, monkeypatch, error, status, last):
    def raises(_):
        raise error

    monkeypatch.setattr("hf_lowrank.cli.catalogue._write_metric", raises)
    found, out, err = run(capsys, "metrics", "loss")
    assert (found, out) == (status, "")
    assert err.splitlines()[-1] == last
    assert ("Traceback" in err) == (status == 70)
    assert status in STATUSES


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"hf-lowrank {version('hf-lowrank')}\n", "")


@pytest.mark.parametrize(("name", "line"), EXAMPLES)
def test_examples_are_commands(name, line):
    """Each begins with its command, and has only options and recipes that are there."""
    if name == "completion":
        (shell,) = re.findall(r"hf-lowrank completion (\w+)", line)
        assert shell in ("bash", "zsh", "fish", "powershell")
        return
    given = shlex.split(line.split(" # ")[0])
    place = given.index("hf-lowrank") if "hf-lowrank" in given else given.index("hf_lowrank")
    assert given[place + 1] == name
    arguments = given[place + 2 :]
    for argument in arguments:
        assert not argument.startswith("recipes/") or (ROOT / argument).is_file()
    # Without its callbacks, which look for the runs.
    COMMANDS[name].make_context(name, arguments, resilient_parsing=True)


def test_every_command_has_examples_in_its_help(capsys):
    for name, line in EXAMPLES:
        if name != "lm-eval":  # its help is lm-eval's own
            assert f"\n  {line}\n" in run(capsys, name, "--help")[1]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("hf-lowrank me", ["measure", "memory", "methods", "metrics"]),
        ("hf-lowrank methods gal", ["galore"]),
        ("hf-lowrank metrics weight_s", ["weight_spectral_gap", "weight_stable_rank", "weight_sv_fraction"]),
        ("hf-lowrank measure --pre", ["--preset"]),
        ("hf-lowrank measure --preset f", ["fast"]),
    ],
)
def test_bash_completes(tmp_path, typed, completed):
    command = tmp_path / "hf-lowrank"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hf_lowrank "$@"\n')
    command.chmod(0o755)
    script = f"""
eval "$(hf-lowrank completion bash)"
COMP_WORDS=({typed}); COMP_CWORD={len(typed.split()) - 1}
_hf_lowrank_completion hf-lowrank
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    shell = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env={**os.environ, **paths}, cwd=tmp_path
    )
    assert sorted(shell.stdout.split()) == completed
    assert shell.stderr == ""


# The pages of methods and metrics


@pytest.mark.parametrize("name", list(METHODS))
def test_the_page_of_a_method(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = run(capsys, "methods", name)
    assert (status, err) == (0, "")
    method = METHODS[name]
    if method.page is not None:
        for line in method.page.formula:
            assert f"    {line}\n" in out
        assert words(method.page.cost) in words(out)
    for setting in settings_of(method.settings).values():
        assert re.search(rf"^    {setting.name} +{re.escape(str(setting.default))} ", out, flags=re.MULTILINE)
    assert method.source in out
    assert "](" not in out


def test_a_method_without_a_page_has_that_of_its_entry(capsys, monkeypatch):
    bare = METHODS["galore"].__class__(
        name="bare", title="Bare", summary="Nothing.", kind="optimizer", settings=METHODS["galore"].settings
    )
    monkeypatch.setitem(METHODS._methods, "bare", bare)
    status, out, _ = run(capsys, "methods", "bare")
    assert status == 0
    assert out.startswith("Bare: Nothing.\n\nSettings, in a recipe's `method: {name: bare, ...}`")
    assert json.loads(run(capsys, "methods", "bare", "--json")[1])["name"] == "bare"


def test_every_metric_has_a_page():
    assert list(PAGES) == list(METRICS)
    for page in PAGES.values():
        assert page.formula
        assert page.reading.endswith(".")
        assert page.cost.endswith(".")
        assert page.pitfalls
        assert all(pitfall.endswith(".") for pitfall in page.pitfalls)
        assert set(page.settings) <= set(MeasureSettings.model_fields)
        assert page.source == "" or re.fullmatch(r"arXiv \d{4}\.\d{5}", page.source)


@pytest.mark.parametrize("name", list(METRICS))
def test_the_page_of_a_metric(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = run(capsys, "metrics", name)
    assert (status, err) == (0, "")
    for line in PAGES[name].formula.splitlines():
        assert f"    {line}\n" in out
    for pitfall in PAGES[name].pitfalls:
        assert words(pitfall) in words(out)
    assert ("needs a baseline" in out) == METRICS[name].needs_baseline
    assert ("Settings, in" in out) == bool(PAGES[name].settings)


def test_settings_of_a_metric_are_those_of_the_presets(capsys):
    document = json.loads(run(capsys, "metrics", "pcak_sharpness", "--json")[1])
    assert document["settings"]["pca.count"] == {
        "fast": 5, "paper": 10, "description": "Directions K of pcak_sharpness.",
    }  # fmt: skip
    assert document["settings"]["sequences"]["paper"] == 1000


# JSON


def test_the_catalogue_as_json(capsys):
    found = json.loads(run(capsys, "methods", "--json")[1])
    assert [entry["name"] for entry in found] == list(METHODS)
    assert all({"name", "kind", "settings"} <= set(entry) for entry in found)
    assert {"formula", "use", "cost", "notes"} <= set(found[0])
    assert json.loads(run(capsys, "methods", "fira", "--json")[1]) in found
    metrics = json.loads(run(capsys, "metrics", "--json")[1])
    assert [entry["id"] for entry in metrics] == list(METRICS)
    assert json.loads(run(capsys, "metrics", "loss", "--json")[1]) in metrics


def test_json_has_no_nan_and_plain_types(capsys):
    np = pytest.importorskip("numpy")
    print_json({"a": math.nan, 1: (Path("x"), np.array([1.5, math.inf])), "b": [np.float64(2.0), None, True]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "1": ["x", [1.5, None]], "b": [2.0, None, True]}
    assert plain(METRICS["loss"])["id"] == "loss"
