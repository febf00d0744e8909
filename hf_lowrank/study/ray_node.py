"""What runs on the nodes of a Ray cluster: the check of a node, and units in the same workers as on one machine.

`python -m hf_lowrank.study.ray_node` reads what is checked as JSON from standard input and prints the fault as JSON.
"""

import json
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_lowrank.study.executors import Outcome, WorkerExecutor

SEEN_SECONDS = 5.0  # how long a new file may take to appear on other nodes
# Packages on which results depend.
PACKAGES = ("hf-lowrank", "torch", "transformers", "accelerate", "peft", "lm-eval")

# One worker for all units that this process gets one after another: it has imported what they need.
_workers: dict[tuple[int, bool], WorkerExecutor] = {}


def versions() -> dict[str, str]:
    """The versions of Python and of `PACKAGES` on this machine."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]  # a build for another device is no other version
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def fault_of(wanted: dict[str, Any]) -> str | None:
    """Why this node cannot run a study's units, to follow its name; None if it can.

    Args:
        wanted: `token` and `secret`, a file in the study's directory and its content; `inputs`, files and folders that
            units read; `versions` of the study's own machine.
    """
    token, deadline = Path(wanted["token"]), time.monotonic() + SEEN_SECONDS
    while not _holds(token, wanted["secret"]):
        if time.monotonic() >= deadline:
            return f"does not see {token.parent}; a study on a cluster needs a folder that all nodes share"
        time.sleep(0.2)
    if not os.access(token.parent, os.W_OK):
        return f"cannot write to {token.parent}"
    for path in wanted["inputs"]:
        if not os.path.exists(path):
            return f"does not see {path}"
    own = versions()
    for name, expected in wanted["versions"].items():
        if own.get(name) != expected:
            return f"has {name} {own.get(name)}, this machine has {expected}"
    return None


def _holds(file: Path, content: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == content
    except (OSError, UnicodeDecodeError):
        return False


def perform(order: dict[str, Any], name: str) -> dict[str, Any]:
    """Performs a unit in a worker process and returns its outcome as plain data.

    Args:
        order: `key`, `unit` (plain), `log`, `threads`, `gpus`; on a node that joined late also `check`, what it has
            not been checked for yet.
        name: of this node, for the log.
    """
    if (fault := fault_of(order["check"]) if "check" in order else None) is not None:
        return asdict(Outcome(order["key"], f"node {name} {fault}"))
    log = Path(order["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"on node {name}\n")
    # A forked process cannot use an accelerator.
    kind = (order["threads"], not order["gpus"] and sys.platform == "linux")
    worker = _workers.setdefault(kind, WorkerExecutor(order["threads"], fork=kind[1]))
    # Ray shows a unit its accelerators, and one without any all of them.
    worker.send(order["key"], order["unit"], log, () if order["gpus"] else ("",))
    while not (outcomes := worker.wait(1.0)):
        pass
    return asdict(outcomes[0])


if __name__ == "__main__":
    print(json.dumps(fault_of(json.load(sys.stdin))))  # noqa: T201
