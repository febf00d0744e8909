"""Runs drills by seed: `python -m tests.drill.run --seeds 0:500 --output RESULTS.jsonl --summary SUMMARY.json`.

Each drill's result is a line of the output. Seeds with a result are skipped, so that it can be stopped and resumed; of
several lines the last counts. The summary is written at the end, and when it is stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
}


def seeds_of(text: str) -> list[int]:
    """The seeds that `3,17,0:500` names, without repetition, in that order."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        first, _, end = part.partition(":")
        seeds |= dict.fromkeys(range(int(first), int(end) if end else int(first) + 1))
    return list(seeds)


def results_of(file: Path) -> dict[int, dict[str, Any]]:
    """The last result of each seed; a torn last line is dropped."""
    if not file.exists():
        return {}
    whole = file.read_text().split("\n")[:-1]
    return {result["seed"]: result for result in map(json.loads, whole)}


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts by kind and outcome, and every breach."""
    kinds: dict[str, Counter[str]] = {}
    files: dict[str, Counter[str]] = {}
    for result in results:
        outcome = "breach" if result["breaches"] else result["outcome"]
        kinds.setdefault(result["kind"], Counter())[outcome] += 1
        kinds[result["kind"]]["struck"] += result["struck"]
        if result["detail"]:
            files.setdefault(result["detail"].rpartition(" ")[0], Counter())[outcome] += 1
    outcomes = Counter("breach" if result["breaches"] else result["outcome"] for result in results)
    return {
        "drills": len(results),
        "seeds": [min((r["seed"] for r in results), default=0), max((r["seed"] for r in results), default=0)],
        "outcomes": dict(sorted(outcomes.items())),
        "struck": sum(result["struck"] for result in results),
        "kinds": {kind: dict(sorted(counts.items())) for kind, counts in sorted(kinds.items())},
        "damaged_files": {kind: dict(sorted(counts.items())) for kind, counts in sorted(files.items())},
        "methods": dict(sorted(Counter(result["method"] for result in results).items())),
        "breaches": [breach for result in results for breach in result["breaches"]],
        "seconds": round(sum(result["seconds"] for result in results), 1),
        "machine": {"cpus": os.cpu_count(), "system": platform.system(), "processor": platform.machine()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "accelerate", "peft", "safetensors")},
    }


def drill_seeds(seeds: Sequence[int], output: Path | None, folder: Path, say: Any = print) -> list[dict[str, Any]]:
    """Runs the drills of seeds that have no result in `output`; returns the results of all."""
    from tests.drill.drill import drill
    from tests.drill.world import make_world

    done = results_of(output) if output is not None else {}
    world = make_world(folder)
    for seed in seeds:
        if seed in done:
            continue
        began = time.perf_counter()
        result = asdict(drill(world, seed)) | {"seconds": round(time.perf_counter() - began, 2)}
        result["breaches"] = [said.replace(f"{world.folder}{os.sep}", "") for said in result["breaches"]]
        done[seed] = result
        if output is not None:
            with open(output, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        for breach in result["breaches"]:
            say(f"BREACH {breach}")
    return [done[seed] for seed in seeds if seed in done]


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs fault drills by seed.")
    parser.add_argument("--seeds", default="0:500", help="e.g. 0:500, or 3,17, or both; in this order")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="a line per drill; resumed if it exists")
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--folder", type=Path, help="where drills run and breaches leave their runs")
    given = parser.parse_args()
    seeds = seeds_of(given.seeds)
    os.environ.update(ENVIRONMENT)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="drills-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    workers = []
    for number in range(1, given.jobs):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                drill_seeds(seeds[number :: given.jobs], given.output, folder / f"job{number}")
                status = 0
            finally:
                os._exit(status)
        workers.append(pid)
    try:
        drill_seeds(seeds[:: given.jobs], given.output, folder / "job0")
        for pid in workers:
            os.waitpid(pid, 0)
    finally:
        found = results_of(given.output)
        counted = summary([found[seed] for seed in seeds if seed in found])
        if given.summary is not None:
            given.summary.write_text(json.dumps(counted, indent=2) + "\n")
        print(json.dumps(counted, indent=2))
    return 1 if counted["breaches"] else 0


if __name__ == "__main__":
    sys.exit(main())
