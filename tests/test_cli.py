"""The command line itself; what the commands do is tested with the functions that they call."""

import io
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from hf_lowrank.cli import main
from hf_lowrank.cli.arguments import STAGES
from hf_lowrank.errors import LowRankWarning
from hf_lowrank.formats import console, echo, hide_hub_progress_bars, is_first_process, print_own_warnings_as_lines
from hf_lowrank.methods import METHODS
from hf_lowrank.study import spec


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
    for name, method in METHODS.items():
        assert f"{name}: {method.title}" in out
        for setting in method.settings.model_fields:
            assert f"    {setting} " in out


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


# attr is what rich imports before version 15.
LIGHT = {
    "annotated_doc", "annotated_types", "attr", "hf_lowrank", "markdown_it", "mdurl", "pydantic", "pydantic_core",
    "pygments", "rich", "shellingham", "typer", "typing_extensions", "typing_inspection", "colorama", "click",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("--help", 0, "Commands"),
        ("measure --help", 0, "--preset"),
        ("methods", 0, "galore"),
        ("metrics", 0, "pcak_sharpness"),
        ("--version", 0, "hf-lowrank "),
        ("completion bash", 0, "complete "),
        ("methods galore", 0, "top r singular vectors"),
        ("methods no_such", 2, "unknown method 'no_such'"),
        ("metrics no_such", 2, "unknown metric 'no_such'"),
        ("completion tcsh", 2, "'tcsh' is not one of 'bash'"),
        ("no_such_command", 2, "no_such_command"),
        ("train", 2, "RECIPE"),
        ("train no/such.yaml", 2, "no/such.yaml: no such recipe file"),
        ("train no/such.yaml --no-such-option", 2, "--no-such-option"),
        ("memory no/such.yaml", 2, "no/such.yaml: no such recipe file"),
        ("study no/such.yaml", 2, "no/such.yaml: no such study file"),
        ("study Makefile --stages traim", 2, "stages must be some of sweep,train"),
        ("measure no/such/run", 2, "no/such/run: no such folder"),
        ("measure . --metrics no_such", 2, "unknown metric 'no_such'"),
        ("measure . --steps some", 2, "steps must be all, last or numbers such as 100,200, got 'some'"),
        ("measure . --preset slow", 2, "'slow' is not one of 'fast', 'paper'"),
        ("measure . --settings no.yaml", 2, "no.yaml: no such settings file"),
        ("report no/such --output x", 2, "no/such: no such run directory"),
        ("push no/such user/repo", 2, "no/such: no such run directory"),
        ("predict . --metrics no_such", 2, "unknown metric 'no_such'"),
    ],
)
def test_help_and_wrong_arguments_load_no_library(arguments, status, words):
    code = (
        "import sys\n"
        "from hf_lowrank.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    others = {name.split('.')[0] for name in sys.modules if name[0] != '_'} - sys.stdlib_module_names\n"
        "    print('LOADED', len(sys.modules), *sorted(others))\n"
    )
    command = [sys.executable, "-c", code, *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    *lines, loaded = result.stdout.splitlines()
    assert result.returncode == status
    assert words in ("\n".join(lines) if status == 0 else result.stderr)
    count, *others = loaded.removeprefix("LOADED ").split()
    assert set(others) <= LIGHT
    assert int(count) < 400


def test_stages_are_those_of_a_study():
    assert spec.STAGES == STAGES


def test_torchao_says_nothing_of_its_import():
    def lines(prepare):
        code = f"from hf_lowrank import cli; {prepare}; import torchao.quantization"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return [line for line in result.stderr.splitlines() if "torchao" in line or "Enum subclass" in line]

    pytest.importorskip("torchao")
    assert lines("cli.prepare()") == []


@pytest.mark.parametrize("columns", ["0", "60"])
def test_a_terminal_without_a_width_shows_tables_all_the_same(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    console().print("some words")
    assert "some words" in capsys.readouterr().out


def test_later_processes_of_a_launch_say_nothing_again(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    console().print("some words")
    echo("more words")
    assert capsys.readouterr().out == ""


def test_own_warnings_are_one_line_of_the_first_process(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    print_own_warnings_as_lines()
    message = LowRankWarning("a is left out")
    assert warnings.formatwarning(message, LowRankWarning, "targets.py", 3) == "hf-lowrank: a is left out\n"
    assert "UserWarning: old" in warnings.formatwarning(UserWarning("old"), UserWarning, "targets.py", 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert warnings.formatwarning(message, LowRankWarning, "targets.py", 3) == ""


@pytest.mark.parametrize(
    ("rank", "world", "first"),
    [("0", "2", True), ("1", "2", False), ("1", "", True), ("1", "1", True), ("", "2", True), ("x", "y", True)],
)
def test_the_first_process_of_a_launch_speaks(monkeypatch, rank, world, first):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert is_first_process() is first


@pytest.mark.parametrize(("tty", "rank", "shown"), [(True, "0", True), (False, "0", False), (True, "1", False)])
def test_the_hubs_bars_are_for_a_terminal(monkeypatch, tty, rank, shown):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: tty))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    enable_progress_bars()
    hide_hub_progress_bars()
    assert are_progress_bars_disabled() is not shown


def test_an_encoding_without_a_character_costs_that_character_alone(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as end:
        main(["methods"])
    sys.stdout.flush()
    assert end.value.code == 0
    assert b"galore" in raw.getvalue()


def test_what_lm_eval_finds_wrong_with_its_arguments_is_one_line(capsys):
    for arguments, said in ((("--tasks", "no_such_task"), "no_such_task"), (("--config", "no/such.yaml"), "no/such")):
        status, _, err = run(capsys, "lm-eval", "run", *arguments)
        assert status == 2
        assert err.splitlines()[-1].startswith("hf-lowrank: ")
        assert said in err.splitlines()[-1]
        assert "Traceback" not in err
