"""Runs a study's units on a Ray cluster.

A process of its own, `ray_driver`, holds the connection: Ray's threads, signal handlers, log lines and hard exits do
not reach the study's process. The two exchange lines of JSON.
"""

import json
import queue
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from os import getpid
from pathlib import Path
from typing import IO, Any, cast

from hf_lowrank.errors import UserError
from hf_lowrank.formats import join_words
from hf_lowrank.storage.files import write_text
from hf_lowrank.study.executors import Outcome, close_input, exit_reason
from hf_lowrank.study.ray_node import versions
from hf_lowrank.study.spec import StudyFile
from hf_lowrank.study.units import Unit

# In the study's directory while it runs: what every node must see.
TOKEN = ".shared"
REACH_SECONDS = 10.0  # for the cluster's head to accept a connection
CONNECT_SECONDS = 90.0  # for Ray to connect; it gives up after some 60 itself
CHECK_SECONDS = 180.0  # for all nodes to answer; the driver waits for each less long
STOP_SECONDS = 30.0  # for the units of a stopped study to end


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that takes units, with the CPUs and GPUs that it offers."""

    name: str
    cpus: int
    gpus: int


def shares(nodes: Sequence[Node], jobs: int | None, threads: int | None) -> tuple[int, int]:
    """(units in parallel, threads of each process), where not given.

    One unit per GPU, or per node of a cluster without any, each with an equal share of the node's CPUs; with `jobs`
    units and no GPUs as many threads as let all of them run at a time.
    """
    hosts = [node for node in nodes if node.gpus]
    if hosts:
        threads = threads or max(1, min(node.cpus // node.gpus for node in hosts))
        return jobs or sum(node.gpus for node in hosts), threads
    if threads is None:
        wanted, most = jobs or len(nodes), min(node.cpus for node in nodes)
        fitting = (count for count in range(most, 1, -1) if sum(node.cpus // count for node in nodes) >= wanted)
        threads = next(fitting, 1)
        return wanted, threads
    return jobs or max(1, sum(node.cpus // threads for node in nodes)), threads


def parse_address(address: str) -> tuple[str, int] | None:
    """Host and port of a cluster's head; None for `auto`.

    Raises:
        UserError: the address is neither.
    """
    if address == "auto":
        return None
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--ray must be auto or HOST:PORT, got {address!r}; start the study on a node of the cluster, with the "
            "address that ray start --head has printed"
        )
    return host, int(port)


class RayExecutor:
    """Sends units to a Ray cluster.

    A unit whose node dies runs again elsewhere, from what it has saved; one that fails by itself does not.

    Args:
        address: `auto` for the cluster of this machine, or `HOST:PORT`.

    Attributes:
        nodes: the nodes that can run units when the study starts.
        say: receives a line about a node that died.

    Raises:
        UserError: Ray is not installed, no cluster answers, or its versions of Ray or Python are others.
    """

    def __init__(self, address: str) -> None:
        if find_spec("ray") is None:
            raise UserError("--ray needs Ray: pip install 'hf-lowrank[ray]', on every node")
        where = parse_address(address)
        if where is not None:
            try:
                socket.create_connection(where, timeout=REACH_SECONDS).close()
            except OSError as error:
                reason = error.strerror or "it does not answer"
                raise UserError(f"--ray {address}: cannot be reached: {reason}; is the cluster running?") from None
        self.say: Callable[[str], None] = lambda line: None
        self._address, self._threads = address, 1
        self._token: Path | None = None
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `stop`)
        self._driver = subprocess.Popen(
            [sys.executable, "-m", "hf_lowrank.study.ray_driver", str(getpid()), address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            start_new_session=True,  # Ctrl-C is for the study, which ends its units
        )
        self._reports: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            nodes = self._answer("nodes", CONNECT_SECONDS)
            self.nodes = [Node(**node) for node in nodes]
            if not self.nodes:
                raise self._fault("none of its nodes offers CPUs; start one with ray start --num-cpus")
        except BaseException:
            self.stop()
            raise

    def resources(self, file: StudyFile, jobs: int | None, threads: int | None) -> tuple[int, int]:
        """(units in parallel, threads of each process): those that are given, else the file's, else `shares`.

        Raises:
            UserError: no node has what a unit of some member needs.
        """
        jobs, self._threads = shares(self.nodes, jobs or file.settings.jobs, threads or file.settings.threads)
        for name, member in file.settings.members.items():
            cpus, gpus = self._threads * member.processes, member.processes if self._gpus else 0
            if not any(node.cpus >= cpus and node.gpus >= gpus for node in self.nodes):
                needs = f"{cpus} CPUs" + (f" and {gpus} GPUs" if gpus else "")
                key = f"members.{name}.processes" if member.processes > 1 else "threads"
                raise file.fault(
                    key, f"must be fewer: a unit of {name} needs {needs}, which no node of the cluster has"
                )
        return jobs, self._threads

    @property
    def _gpus(self) -> bool:
        return any(node.gpus for node in self.nodes)

    def check(self, directory: Path, inputs: Sequence[str] = ()) -> None:
        """Checks that every node sees and may write the study's directory, sees `inputs`, and has these versions.

        Raises:
            UserError: a node does not; names it.
        """
        secret = secrets.token_hex(16)
        self._token = directory / TOKEN
        write_text(self._token, secret)
        wanted = {"token": str(self._token), "secret": secret, "inputs": [*inputs], "versions": versions()}
        try:
            self._send({"check": wanted})
            faults = self._answer("faults", CHECK_SECONDS)
            if faults:
                others = [f"{each['node']} {each['fault']}" for each in faults[1:4]]
                more = f" (and {join_words(others)})" if others else ""
                raise self._fault(f"node {faults[0]['node']} {faults[0]['fault']}{more}")
        except BaseException:
            self._token.unlink(missing_ok=True)
            raise

    def start(self, unit: Unit, log: Path, *slots: int) -> None:
        count = unit.process_count
        needs = {"cpus": self._threads * count, "gpus": count if self._gpus and unit.accelerated else 0}
        order = {"key": unit.key, "unit": unit.plain(), "log": str(log), "threads": self._threads}
        self._send({"start": {**order, **needs}})

    def wait(self, seconds: float) -> list[Outcome]:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            report = self._next(left)
            if report is not None and "outcome" in report:
                return [Outcome(**report["outcome"])]
            if report is not None and "say" in report:
                self.say(report["say"])
        return []

    def stop(self) -> None:
        close_input(self._driver)  # at its end the driver ends all units and itself
        try:
            self._driver.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._driver.kill()  # Ray ends the units of a driver that is gone
            self._driver.wait()
        self._noise.close()
        if self._token is not None:
            with suppress(OSError):
                self._token.unlink(missing_ok=True)

    def _send(self, request: dict[str, Any]) -> None:
        stdin = cast(IO[bytes], self._driver.stdin)
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._lost() from None

    def _read(self) -> None:
        with cast(IO[bytes], self._driver.stdout) as lines:
            for line in lines:
                self._reports.put(json.loads(line))
        self._reports.put(None)

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """The driver's next report; None if there is none within `seconds`."""
        try:
            report = self._reports.get(timeout=seconds)
        except queue.Empty:
            return None
        if report is None:
            raise self._lost()
        if "error" in report:
            raise self._fault(report["error"])
        return report

    def _answer(self, name: str, seconds: float) -> Any:
        """The driver's answer to a request, while no unit runs."""
        report = self._next(seconds)
        if report is None:
            raise self._fault(f"Ray has not answered within {seconds:.0f} s; is it the address of the cluster's head?")
        return report[name]

    def _lost(self) -> UserError:
        status = self._driver.wait()
        self._noise.seek(0)
        lines = self._noise.read().decode(errors="replace").split("\n")
        last = next((f": {line.strip()[:300]}" for line in reversed(lines) if line.strip()), "")
        return self._fault(f"the connection to Ray was lost ({exit_reason(status)}{last}); rerun to resume")

    def _fault(self, message: str) -> UserError:
        return UserError(f"--ray {self._address}: {message}")
