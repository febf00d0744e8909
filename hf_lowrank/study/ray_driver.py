"""The process that is connected to Ray: `python -m hf_lowrank.study.ray_driver PARENT ADDRESS`.

Requests come as lines of JSON on standard input, and reports go as lines to standard output. It ends all units, and
itself, when its input ends. Nothing else imports Ray.
"""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import LocalRayletDiedError, NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hf_lowrank.errors import one_line
from hf_lowrank.study.executors import Outcome, die_with

RETRIES = 3  # of a unit whose node dies
RETRY_SECONDS = 3.0  # until the processes of a dead node have ended, if the machine itself is alive
CHECK_SECONDS = 90.0  # for a node to answer
STOP_SECONDS = 20.0  # for units to end
LOST = (NodeDiedError, WorkerCrashedError, LocalRayletDiedError)


# Ray sends functions of the main module by value, so that a node without this package can say so.


def check_node(wanted: dict[str, Any]) -> str | None:
    """Why the node that it runs on cannot run units; by the same interpreter and environment as units."""
    command = [sys.executable, "-m", "hf_lowrank.study.ray_node"]
    done = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return f"cannot load hf_lowrank: {lines[-1].rpartition(': ')[2][:200]}"
    fault: str | None = json.loads(done.stdout)
    return fault


def perform_on_node(order: dict[str, Any], names: dict[str, str], wanted: dict[str, Any]) -> dict[str, Any]:
    """Performs a unit; `names` are those of the nodes that were checked, by id."""
    from hf_lowrank.study.ray_node import perform

    number = ray.get_runtime_context().get_node_id()
    if number not in names:
        order = {**order, "check": wanted}
    return perform(order, names.get(number, number[:12]))


class Driver:
    """Answers requests; each unit has a thread that waits for it.

    Args:
        report: sends a report to the study.
    """

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self._report = report
        self._names: dict[str, str] = {}
        self._wanted: dict[str, Any] = {}
        self._running: dict[str, Any] = {}
        self._ends = threading.Event()
        self._task = ray.remote(max_retries=0)(perform_on_node)

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that can run units, with what they offer."""
        found = []
        for node in ray.nodes():
            cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
            if node["Alive"] and cpus:
                host, name = node["NodeManagerHostname"], node["NodeName"] or node["NodeManagerAddress"]
                self._names[node["NodeID"]] = name if host in (name, "") else f"{name} ({host})"
                found.append({"name": self._names[node["NodeID"]], "cpus": cpus, "gpus": gpus})
        return found

    def check(self, wanted: dict[str, Any]) -> list[dict[str, str]]:
        """The nodes that cannot run units, with the fault of each."""
        self._wanted = wanted
        task = ray.remote(num_cpus=0, max_retries=0)(check_node)
        asked = {}
        for number in self._names:
            place = NodeAffinitySchedulingStrategy(node_id=number, soft=False)
            asked[number] = task.options(scheduling_strategy=place).remote(wanted)
        ray.wait([*asked.values()], num_returns=len(asked), timeout=CHECK_SECONDS)
        faults = []
        for number, reference in asked.items():
            try:
                fault = ray.get(reference, timeout=0)
            except RayError as error:
                fault = f"does not answer: {one_line(error, 200)}"
            if fault is not None:
                faults.append({"node": self._names[number], "fault": fault})
        return faults

    def start(self, order: dict[str, Any]) -> None:
        """Runs a unit, in a thread that reports its outcome."""
        threading.Thread(target=self._run, args=(order,), daemon=True).start()

    def _run(self, order: dict[str, Any]) -> None:
        key = order["key"]
        for attempt in range(RETRIES + 1):
            try:
                self._report({"outcome": self._perform(order)})
                return
            except LOST as error:
                if attempt == RETRIES:
                    reason = f"its node died each of {RETRIES + 1} times"
                    self._report({"outcome": asdict(Outcome(key, reason))})
                    return
                self._report({"say": f"{key}: {self._lost(error)}; retrying ({attempt + 1} of {RETRIES})"})
            except OutOfMemoryError as error:
                self._report({"outcome": asdict(Outcome(key, f"its node ran out of memory: {one_line(error, 200)}"))})
                return
            except Exception as error:
                cause = getattr(error, "cause", None) or error  # what a task raised
                self._report({"outcome": asdict(Outcome(key, f"{type(cause).__name__}: {one_line(cause)}"))})
                return
            if self._ends.wait(RETRY_SECONDS):
                return

    def _perform(self, order: dict[str, Any]) -> dict[str, Any]:
        needs = {"num_cpus": order["cpus"], "num_gpus": order["gpus"]}
        task = self._task.options(name=order["key"], scheduling_strategy="SPREAD", **needs)
        self._running[order["key"]] = reference = task.remote(order, self._names, self._wanted)
        try:
            outcome: dict[str, Any] = ray.get(reference)
            return outcome
        finally:
            del self._running[order["key"]]

    def _lost(self, error: Exception) -> str:
        found = re.search(r"node ID: (\w+)", str(error))
        name = self._names.get(found[1]) if found else None
        return f"node {name} died" if name else "its node died"

    def stop(self) -> None:
        """Ends all units and waits for that."""
        self._ends.set()
        references = [*self._running.values()]
        for reference in references:
            ray.cancel(reference, force=True)
        if references:
            ray.wait(references, num_returns=len(references), timeout=STOP_SECONDS)


def main(parent: int, address: str) -> None:
    die_with(parent)
    reports, lock = os.dup(1), threading.Lock()
    os.dup2(2, 1)  # Ray prints to it

    def report(content: dict[str, Any]) -> None:
        with lock:
            os.write(reports, json.dumps(content).encode() + b"\n")

    driver = Driver(report)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        report({"nodes": driver.nodes()})
    except Exception as error:  # of any type: no cluster, another version, a machine that is not one of its nodes
        report({"error": one_line(error, 500)})
        return
    for line in sys.stdin:
        request = json.loads(line)
        if "check" in request:
            report({"faults": driver.check(request["check"])})
        else:
            driver.start(request["start"])
    driver.stop()
    ray.shutdown()
    os._exit(0)  # without waiting for the threads of units


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
