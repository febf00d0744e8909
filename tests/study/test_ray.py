"""Studies on a Ray cluster of several nodes on this machine: the results of local processes, whatever happens."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.exceptions import NodeDiedError

from hf_lowrank.errors import UserError
from hf_lowrank.storage.locks import locked
from hf_lowrank.study import ray_driver, run_study
from hf_lowrank.study.cluster import Node, RayExecutor, shares
from hf_lowrank.study.ray_node import perform, versions
from tests.study.test_kills import differences, results
from tests.study.test_study import broken_run
from tests.study.tiny import METHODS, study_data, write_recipe

# A node that is killed is noticed within seconds.
LIMITS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
}
# Hides a folder from every Python process of a node.
HOOK = """
import os, sys

def hide(event, arguments):
    if event == "open" and str(arguments[0]).startswith(os.environ["HIDDEN_FOLDER"]):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])

sys.addaudithook(hide)
"""


def patiently(start):
    """What `start` returns. A node gives up if its helpers take seconds to start, as on a machine that is busy."""
    for _ in range(4):
        try:
            return start()
        except Exception as error:
            print(f"Ray has not started: {error}")
    return start()


@pytest.fixture(scope="module")
def cluster(cache):
    """A head without CPUs and the nodes a and b of one CPU each."""
    folder = tempfile.mkdtemp(prefix="ray-")  # a short path: sockets lie in it
    common = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "include_log_monitor": False}
    head = {"num_cpus": 0, "node_name": "head", "no_monitor": True, **common}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**LIMITS, "RAY_TMPDIR": folder}.items():
            patch.setenv(name, value)
        made = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        nodes = {}

        def settle():
            made.wait_for_nodes(timeout=120)

        def add(name, **environment):
            nodes[name] = patiently(lambda: made.add_node(num_cpus=1, node_name=name, env_vars=environment, **common))
            settle()

        def kill(name):
            made.remove_node(nodes.pop(name), allow_graceful=False)

        try:
            add("a")
            add("b")
            yield SimpleNamespace(address=made.address, add=add, kill=kill, settle=settle)
        finally:
            made.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def on_ray(cluster, study, **options):
    """`run_study` on the cluster; returns the result and the lines it said."""
    said = []
    return run_study(study, ray=cluster.address, say=said.append, **options), said


def node_of(log):
    """The node that a unit ran on last, by its log."""
    return re.findall(r"^on node (\w+)", log.read_text(), re.MULTILINE)[-1] if log.exists() else None


def wait_for(happened, seconds=1200):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def long(tmp_path_factory, corpus):
    """(study file of two runs that take seconds, the results of local processes)."""
    folder = tmp_path_factory.mktemp("long")
    for method in METHODS:
        write_recipe(folder, corpus, method, training__max_steps=240, training__save_steps=30)
    study = folder / "study.yaml"
    study.write_text(yaml.safe_dump(study_data(seeds=[0], measure={"metrics": "loss"}), sort_keys=False))
    result = run_study(study, output=folder / "here", stages="train", fork_here=True, jobs=2, say=lambda line: None)
    assert result.failures == []
    return study, results(folder / "here")


def test_results_are_those_of_local_processes(cluster, write_study, tmp_path, run):
    study, stages = write_study(seeds=[0]), "train,measure,claims"
    assert run(study, output=tmp_path / "here", stages=stages)[0].failures == []
    result, said = on_ray(cluster, study, output=tmp_path / "there", stages=stages)
    assert result.failures == []
    assert (result.plan.jobs, result.plan.threads) == (2, 1)
    here, there = results(tmp_path / "here"), results(tmp_path / "there")
    assert {name.rpartition("/")[2] for name in here} >= {"model.safetensors", "measurements.jsonl", "claims.json"}
    assert differences(here, there) == []
    logs = sorted((tmp_path / "there" / "logs").rglob("*.log"))
    assert len(logs) == 2 * 2 + 1
    assert {node_of(log) for log in logs} == {"a", "b"}
    assert sum(line.startswith("[") for line in said) == len(logs)
    assert not (tmp_path / "there" / ".shared").exists()
    # The next call finds everything done.
    assert on_ray(cluster, study, output=tmp_path / "there", stages="train,measure")[1] == []


def test_a_unit_whose_node_dies_runs_again_elsewhere(cluster, long, tmp_path):
    study, expected = long
    out, killed = tmp_path / "out", []
    log = out / "logs" / "train" / "galore-seed0.log"

    def kill():
        wait_for((out / "runs" / "galore-seed0" / "checkpoint-30").exists)
        killed.append(node_of(log))
        cluster.kill(killed[0])

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result, said = on_ray(cluster, study, output=out, stages="train")
    finally:
        killer.join()
        cluster.settle()
        cluster.add(killed[0])
    assert result.failures == []
    (line,) = [line for line in said if "died" in line]
    assert re.fullmatch(rf"train galore-seed0: (node {killed[0]}.*|its node) died; retrying \(1 of 3\)", line)
    assert node_of(log) != killed[0]
    assert differences(results(out), expected) == []


def test_a_stopped_study_leaves_no_process_and_resumes(cluster, long, tmp_path):
    study, expected = long
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hf_lowrank", "study", str(study), "--output", str(out), "--stages", "train"]
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen(
            [*command, "--ray", cluster.address],
            stdout=said,
            stderr=said,
            start_new_session=True,
            # Tests in the background of a shell ignore it, and so would their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
    try:
        wait_for((out / "runs" / "galore-seed0" / "checkpoint-30").exists)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        assert process.wait(250) == 130, (tmp_path / "said").read_text()
    finally:
        process.kill()
        process.wait()
    assert "hf-lowrank: interrupted" in (tmp_path / "said").read_text()
    assert not (out / ".shared").exists()
    for run in (out / "runs").iterdir():
        with locked(run, "train"):
            pass
    unfinished = [run for run in (out / "runs").iterdir() if not (run / "checkpoint-240").exists()]
    assert unfinished
    result, _ = on_ray(cluster, study, output=out, stages="train")
    assert result.failures == []
    assert differences(results(out), expected) == []


def test_a_unit_that_fails_is_named_and_neither_retried_nor_stops_others(cluster, write_study, tmp_path):
    study, out = write_study(seeds=[0]), tmp_path / "out"
    broken_run(study, out / "runs" / "galore-seed0")
    result, said = on_ray(cluster, study, output=out, stages="train")
    (failure,) = result.failures
    assert (failure.what, failure.stage) == ("galore-seed0", "train")
    assert "evaluation.safetensors" in failure.reason
    log = (out / "logs" / "train" / "galore-seed0.log").read_text()
    assert log.count("on node ") == 1
    assert "evaluation.safetensors" in log
    assert any("train full_rank-seed0: done in" in line for line in said)
    assert (out / "runs" / "full_rank-seed0" / "checkpoint-12").is_dir()


def refused(cluster, study, tmp_path, **options):
    """The error of a study on the cluster; checks that nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        on_ray(cluster, study, output=tmp_path / "out", **options)
    assert sorted(tmp_path.rglob("*")) == before
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_node_without_the_shared_folder_is_named_before_anything_runs(cluster, write_study, tmp_path):
    study, hook = write_study(), tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    paths = os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")])
    cluster.add("nowhere", PYTHONPATH=paths, HIDDEN_FOLDER=str(tmp_path / "out"), PYTHONDONTWRITEBYTECODE="1")
    try:
        message = refused(cluster, study, tmp_path)
    finally:
        cluster.kill("nowhere")
        cluster.settle()
    assert re.match(rf"--ray {cluster.address}: node nowhere\b.* does not see {tmp_path / 'out'}; a study on", message)
    assert " and " not in message.partition(";")[0]  # the other nodes see it


def test_a_node_with_other_versions_is_named(cluster, write_study, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lowrank.study.cluster.versions", lambda: {**versions(), "torch": "0.1"})
    message = refused(cluster, write_study(), tmp_path)
    assert re.search(rf"node [ab]\b.* has torch {versions()['torch']}, this machine has 0\.1 \(and [ab]\b", message)


def test_a_member_that_fits_no_node_is_refused(cluster, write_study, tmp_path):
    two = {"recipe": "galore.yaml", "processes": 2}
    message = refused(cluster, write_study(members={"full_rank": "full_rank.yaml", "two": two}), tmp_path)
    assert "members.two.processes must be fewer: a unit of two needs 2 CPUs, which no node of the cluster" in message
    message = refused(cluster, write_study(), tmp_path, threads=2)
    assert "threads must be fewer: a unit of full_rank needs 2 CPUs" in message


def test_a_cluster_of_another_version_is_named(cluster, write_study, tmp_path):
    client = GcsClient(address=cluster.address)
    place = {"namespace": b"cluster"}
    known = client.internal_kv_get(b"CLUSTER_METADATA", **place)
    other = {**json.loads(known), "ray_version": "1.2.3", "python_version": "3.1.4"}
    client.internal_kv_put(b"CLUSTER_METADATA", json.dumps(other).encode(), True, **place)
    try:
        message = refused(cluster, write_study(), tmp_path)
    finally:
        client.internal_kv_put(b"CLUSTER_METADATA", known, True, **place)
    assert message.startswith(f"--ray {cluster.address}: Version mismatch")
    for part in ("1.2.3", "3.1.4", sys.version.split()[0]):
        assert part in message


@pytest.mark.parametrize("address", ["", "auto:", "localhost", "ray://localhost:10001", "local", "localhost:0"])
def test_an_address_that_is_none(address):
    with pytest.raises(UserError, match="--ray must be auto or HOST:PORT, got"):
        RayExecutor(address)


def test_an_address_that_nobody_answers(write_study, tmp_path, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        nobody = SimpleNamespace(address=f"127.0.0.1:{listener.getsockname()[1]}")
        message = refused(nobody, write_study(), tmp_path)
        assert message == f"--ray {nobody.address}: cannot be reached: Connection refused; is the cluster running?"
        # Somebody who takes the connection and says nothing.
        listener.listen()
        monkeypatch.setattr("hf_lowrank.study.cluster.CONNECT_SECONDS", 8.0)
        monkeypatch.setattr("hf_lowrank.study.cluster.STOP_SECONDS", 1.0)
        began = time.monotonic()
        message = refused(nobody, write_study(), tmp_path)
        assert message.startswith(f"--ray {nobody.address}: ")
        assert time.monotonic() - began < 60


def test_without_the_extra_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr("hf_lowrank.study.cluster.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--ray needs Ray: pip install 'hf-lowrank\[ray\]', on every node$"):
        RayExecutor("auto")


def test_a_unit_whose_nodes_all_die_is_named_after_three_retries(monkeypatch):
    monkeypatch.setattr(ray_driver, "RETRY_SECONDS", 0.0)
    reports, begun = [], []
    driver = ray_driver.Driver(reports.append)
    driver._names["1234abcd"] = "a"

    def die(order):
        begun.append(order["key"])
        raise NodeDiedError("The node IP: 1.2.3.4, node ID: 1234abcd.")

    monkeypatch.setattr(driver, "_perform", die)
    driver._run({"key": "train x"})
    assert begun == ["train x"] * 4
    assert [report["say"] for report in reports[:-1]] == [
        f"train x: node a died; retrying ({count} of 3)" for count in (1, 2, 3)
    ]
    assert reports[-1] == {"outcome": {"key": "train x", "reason": "its node died each of 4 times", "note": None}}


def test_a_node_that_joins_late_is_checked_before_its_first_unit(tmp_path):
    wanted = {"token": str(tmp_path / "a"), "secret": "s", "inputs": [str(tmp_path / "none")], "versions": {}}
    (tmp_path / "a").write_text("s")
    outcome = perform({"key": "train x", "check": wanted}, "late")
    assert outcome["reason"] == f"node late does not see {tmp_path / 'none'}"


CPU, GPU = Node(name="c", cpus=8, gpus=0), Node(name="g", cpus=16, gpus=4)


@pytest.mark.parametrize(
    ("nodes", "given", "expected"),
    [
        ([CPU, CPU], (None, None), (2, 8)),
        ([CPU, Node(name="d", cpus=2, gpus=0)], (None, None), (2, 2)),
        ([CPU, CPU], (3, None), (3, 4)),
        ([CPU, CPU], (40, None), (40, 1)),
        ([CPU, CPU], (None, 3), (4, 3)),
        ([CPU, CPU], (1, None), (1, 8)),
        ([CPU, GPU], (None, None), (4, 4)),
        ([GPU, GPU], (3, 2), (3, 2)),
        ([Node(name="few", cpus=2, gpus=4)], (None, None), (4, 1)),
    ],
)
def test_a_clusters_shares(nodes, given, expected):
    assert shares(nodes, *given) == expected


def test_ray_is_loaded_by_its_own_process_alone():
    package = Path(ray_driver.__file__).parents[1]
    importing = [
        file.name for file in package.rglob("*.py") if re.search(r"^\s*(import|from) ray\b", file.read_text(), re.M)
    ]
    assert importing == ["ray_driver.py"]
