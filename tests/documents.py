"""What the documents are checked by: their snippets run, and the commands and files that they name are there."""

import re
from pathlib import Path

import pytest

from hf_lowrank.cli import main

ROOT = Path(__file__).parents[1]
# Copied from the package by docs/update.py: not for running.
QUOTED = re.compile(r"^<!-- code: .*\n```\w+\n.*?^```$", re.DOTALL | re.MULTILINE)
FOLDERS = "benchmarks|docs|examples|hf_lowrank|model_cards|recipes|tests"


def blocks(text, language):
    """The blocks of a language, without those that are quoted from the package."""
    return re.findall(rf"^```{language}\n(.*?)^```", QUOTED.sub("", text), flags=re.DOTALL | re.MULTILINE)


def shell_lines(text):
    """The lines of the shell blocks, with continued ones joined and without comments."""
    joined = "".join(blocks(text, "bash")).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in joined.splitlines() if line.strip()]


def run_python(text, names, file):
    """Runs the Python blocks of a document in order in one namespace; returns how many there are."""
    snippets = blocks(text, "python")
    for number, snippet in enumerate(snippets, 1):
        exec(compile(snippet, f"{file}, Python block {number}", "exec"), names)
    return len(snippets)


def command_of(line):
    """The arguments of `hf-lowrank` in a line of a shell, also behind a launcher; None for another program."""
    found = re.match(r"(?:hf-lowrank|.*--module hf_lowrank) (.+)", line)
    return found[1].split() if found else None


_HELP = {}


def help_of(verb, capsys):
    """What `hf-lowrank VERB --help` prints."""
    if verb not in _HELP:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0, verb
        _HELP[verb] = capsys.readouterr().out
    return _HELP[verb]


def check_commands(text, capsys):
    """Every `hf-lowrank` command has its verb and options; returns how many there are."""
    commands = [command for command in map(command_of, shell_lines(text)) if command]
    for verb, *rest in commands:
        for option in (part for part in rest if part.startswith("--")):
            name = re.escape(option.partition("=")[0])
            assert re.search(rf"(?<![\w-]){name}(?![\w-])", help_of(verb, capsys)), (verb, option)
        assert help_of(verb, capsys)
    return len(commands)


def check_shell(text):
    """Every target of make, and every file that is given to Python, is there."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in shell_lines(text):
        if line.startswith("make "):
            assert line.split()[1] in targets, line
        for file in re.findall(r"\S+\.py\b", line):
            assert (ROOT / file).is_file(), line


def check_files(text):
    """Every file or folder of the repository that a document names is there."""
    for path in re.findall(rf"(?<![\w./-])(?:\.\./)*((?:{FOLDERS})/[\w./*-]*[\w*])", text):
        assert list(ROOT.glob(path)), path
