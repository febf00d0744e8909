"""A study whose process group is killed at random times ends with the results of an uninterrupted one."""

import hashlib
import json
import os
import random
import signal
import time
import traceback

import pytest
import yaml

from hf_lowrank.study import run_study
from hf_lowrank.training import load_recipe
from hf_lowrank.training.corpus import prepare_corpus
from tests.study.tiny import METHODS, study_data, write_recipe


def begin(study, directory, stages):
    """Starts the study in a new process group; returns its process id, which is also the group's."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            log = os.open(directory.with_suffix(".log"), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            for stream in (0, 1, 2):
                os.dup2(log, stream)
            result = run_study(study, output=directory, stages=stages, fork_here=True, say=lambda line: None)
            os.write(log, repr(result.failures).encode())
            status = 3 if result.failures else 0
        except BaseException:
            os.write(log, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return pid


def finish(pid, within):
    """Waits; returns the exit status, or None if the process was killed after `within` seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def results(directory):
    """What must be bitwise equal, by file; rows of tables as sets."""
    found = {}
    # A temporary file that a killed process left, here of the samples of a task, is not a result.
    for path in [path for path in sorted(directory.rglob("*")) if path.suffix != ".tmp"]:
        name = path.relative_to(directory).as_posix()
        if path.name in ("model.safetensors", "evaluation.safetensors", "recipe.yaml"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name in ("claims.json", "prediction.json", "sweep.json"):
            found[name] = without_checksums(json.loads(path.read_text().replace(f"{directory}/", "")))
        elif path.name in ("measurements.jsonl", "downstream.jsonl") or "downstream" in path.parent.parent.name:
            lines = path.read_text().splitlines()
            assert len(lines) == len(set(lines)), f"{name} holds a row twice"
            found[name] = set(lines)
        elif path.name == "trainer_state.json":
            log = json.loads(path.read_text())["log_history"]
            found[name] = [
                {k: v for k, v in entry.items() if "runtime" not in k and "second" not in k} for entry in log
            ]
    return found


def without_checksums(content):
    """A result without its checksum, which depends on the study's folder."""
    if isinstance(content, list):
        return [without_checksums(entry) for entry in content]
    return {key: value for key, value in content.items() if key != "checksum"}


def differences(ours, theirs):
    names = sorted({*ours, *theirs})
    return [name for name in names if ours.get(name) != theirs.get(name)]


def drill(tmp_path, corpus, kills, seed, stages=None, recipe=None, **changes):
    for method in METHODS:
        prepare_corpus(load_recipe(write_recipe(tmp_path, corpus, method, **(recipe or {}))).data)
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(study_data(**changes)))

    began = time.monotonic()
    assert finish(begin(study, tmp_path / "undisturbed", stages), 600) == 0
    takes = time.monotonic() - began
    expected = results(tmp_path / "undisturbed")

    generator, done, studies = random.Random(seed), 0, 0
    while done < kills:
        directory = tmp_path / f"killed{studies}"
        studies += 1
        while True:
            last = done >= kills
            status = finish(begin(study, directory, stages), 600 if last else generator.uniform(0, 0.5 * takes))
            if status is not None:
                assert status == 0
                break
            done += 1
        assert differences(results(directory), expected) == []
    return expected


def test_a_killed_study_ends_like_an_uninterrupted_one(tmp_path, corpus):
    expected = drill(tmp_path, corpus, kills=3, seed=0, stages="train,measure,evaluate,claims")
    names = {name.rpartition("/")[2] for name in expected}
    assert {"model.safetensors", "measurements.jsonl", "downstream.jsonl", "claims.json"} <= names
    assert sum(name.endswith("model.safetensors") for name in expected) == 2 * 2 * 3


@pytest.mark.drill
def test_twenty_kills_of_a_study_with_all_its_stages(tmp_path, corpus):
    changes = {
        "recipe": {
            "model__max_position_embeddings": 128,
            "data": {
                "source": "python-library",
                "sequence_length": 128,
                "vocabulary_size": 2048,
                "evaluation_sequences": 8,
            },
        },
        "seeds": [0, 1, 2, 3],
        "sweep": {"learning_rate": [0.001, 0.004], "seed": 9, "steps": 8},
        "measure": {"settings": {"sequences": 4}, "pairs": "last"},
        "evaluate": {"tasks": "pylib_copy,pylib_bits_per_byte"},
        "predict": {"permutations": 19},
        "jobs": 2,
    }
    expected = drill(tmp_path, corpus, kills=20, seed=1, **changes)
    assert {"sweep.json", "prediction.json"} <= set(expected)
