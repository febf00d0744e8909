"""The process that carries out units: `python -m hf_lowrank.study.worker PARENT THREADS|once`.

Units come as lines of JSON on standard input, outcomes go as lines to standard output. With `once` it carries out
one unit itself; else it forks for each, and ends them and itself when its input ends.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_lowrank.compat import silence_torchao
from hf_lowrank.study.workers import Forks, carry_out, die_with, prepare


def serve(threads: int | None) -> None:
    """Forks for each unit that is asked for, until the input ends."""
    forks, rest, open_input = Forks(threads), b"", True
    while open_input:
        if select.select([0], [], [], 0.02)[0]:
            data = os.read(0, 65536)
            open_input = bool(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                unit = json.loads(line)
                prepare(unit["work"]["kind"])
                forks.start(unit["key"], unit["work"], Path(unit["log"]))
        for outcome in forks.wait(0):
            os.write(1, json.dumps(asdict(outcome)).encode() + b"\n")
    forks.stop()


def once() -> None:
    """Carries out one unit; ends when the input does, for then nobody waits for it."""
    unit: dict[str, Any] = json.loads(sys.stdin.readline())
    answers, lifeline = os.dup(1), os.dup(0)

    def watch() -> None:
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    os.write(answers, json.dumps(carry_out(unit["work"], Path(unit["log"]))).encode())
    os._exit(0)


if __name__ == "__main__":
    silence_torchao()
    die_with(int(sys.argv[1]))
    if sys.argv[2] == "once":
        once()
    serve(int(sys.argv[2]) or None)
