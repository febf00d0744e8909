"""The process that performs units: `python -m hf_lowrank.study.worker PARENT THREADS|once`.

Units come as lines of JSON on standard input, and outcomes go as lines to standard output. With `once` it performs one
unit itself; otherwise it forks for each, and ends them and itself when its input ends.
"""

import json
import os
import select
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from hf_lowrank.compat import silence_torchao
from hf_lowrank.study.executors import ForkExecutor, Outcome, die_with, perform, preload, redirect


def serve(threads: int) -> None:
    """Forks for each unit that arrives, until the input ends."""
    executor, rest, is_open = ForkExecutor(threads), b"", True
    while is_open:
        if select.select([0], [], [], 0.02)[0]:
            data = os.read(0, 65536)
            is_open = bool(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                from hf_lowrank.study.stages import unit_from

                order = json.loads(line)
                unit = unit_from(order["unit"])
                preload(type(unit))
                executor.start(unit, Path(order["log"]))
        for outcome in executor.wait(0):
            _answer(1, outcome)
    executor.stop()


def once() -> None:
    """Performs one unit; ends when the input does, since nobody waits for it then."""
    order = json.loads(sys.stdin.readline())
    answers, lifeline = os.dup(1), os.dup(0)

    def watch() -> None:
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    redirect(Path(order["log"]))
    from hf_lowrank.study.stages import unit_from

    _answer(answers, perform(unit_from(order["unit"])))
    os._exit(0)


def _answer(handle: int, outcome: Outcome) -> None:
    os.write(handle, json.dumps(asdict(outcome)).encode() + b"\n")


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    silence_torchao()
    if sys.argv[2] == "once":
        once()
    serve(int(sys.argv[2]))
