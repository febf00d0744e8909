"""Ten thousand fuzzed inputs for every format that the package reads, in pieces: outcomes and time.

Each piece has a seed of its own, so that it can be repeated (`--format NAME --piece N`), and is recorded as soon as it
is done; the next call resumes. If a piece finds a fault, hypothesis reduces its input to the smallest one, which is
recorded as one failure. Cheap formats come first.

    python -m benchmarks.fuzzing [--count 10000] [--format recipe ...] [--seconds 3600] [--piece N]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import RESULTS, machine, versions, write_result
from tests.fuzz.engine import contents_of, fresh, fuzz
from tests.fuzz.formats import FORMATS

PIECE = 500
NAME = "fuzzing"


def known() -> dict[str, Any]:
    """The recorded pieces, by format."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["formats"] if path.exists() else {}


def cost(name: str, folder: Path) -> float:
    """Seconds to read a valid input of the format."""
    read = FORMATS[name][2]
    times = []
    for _ in range(2):
        content = contents_of(name)[0]
        fresh(folder)
        began = time.perf_counter()
        read(folder, content)
        times.append(time.perf_counter() - began)
    return times[-1]


def piece(name: str, number: int, folder: Path) -> dict[str, Any]:
    """The counts of a piece."""
    began, processor = time.perf_counter(), time.process_time()
    failure, accepted = None, 0
    try:
        accepted = fuzz(name, PIECE, folder, number)
    except Exception as error:
        failure = f"piece {number}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {
        "inputs": PIECE if failure is None else 0,
        "readable": accepted,
        "failures": [failure] if failure else [],
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
    }


def added(entry: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A format's entry, with another piece added."""
    keys = ("inputs", "readable", "seconds", "processor_seconds")
    sums = {key: round(entry.get(key, 0) + found[key], 3) for key in keys}
    return {**sums, "failures": [*entry.get("failures", []), *found["failures"]], "pieces": entry.get("pieces", 0) + 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="inputs for each format")
    parser.add_argument("--format", action="append", choices=FORMATS, help="only these formats; can be repeated")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no piece after this time")
    parser.add_argument("--piece", type=int, help="only this piece, without recording it")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    torch.set_num_threads(1)
    began, formats = time.monotonic(), known()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "read"
        names = options.format or sorted(FORMATS, key=lambda name: cost(name, folder))
        if options.piece is not None:
            for name in names:
                print(name, fuzz(name, PIECE, folder, options.piece), "readable")
            return
        for name in names:
            while (entry := formats.get(name, {})).get("pieces", 0) * PIECE < options.count:
                if time.monotonic() - began > options.seconds:
                    return
                formats[name] = added(entry, piece(name, entry.get("pieces", 0), folder))
                here = {"machine": machine(torch.device("cpu")), "versions": versions()}
                here["versions"].update({each: version(each) for each in ("hypothesis", "safetensors", "pyyaml")})
                here["python"] = platform.python_version()
                write_result(NAME, {**here, "asked": options.count, "formats": formats})
            print(f"{name}: {json.dumps(formats[name])}", flush=True)


if __name__ == "__main__":
    main()
