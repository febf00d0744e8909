"""The quick start on a Ray cluster of two nodes on this machine, compared with local processes, bit for bit.

    make quickstart
    python -m benchmarks.ray_quickstart [--local runs/quickstart]

Compared are weights, held-out sequences, recipes, logs of training, measurements, scores of every item, claims and
prediction.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks._common import machine, versions, write_result
from benchmarks.ray_study import cluster
from hf_lowrank.study import run_study
from tests.study.test_kills import differences, results

STUDY = Path(__file__).parent.parent / "recipes" / "studies" / "quickstart.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local", type=Path, default=Path("runs/quickstart"), help="what `make quickstart` left")
    options = parser.parse_args()
    if not options.local.is_dir():
        parser.error(f"{options.local}: no such folder; run `make quickstart` first")
    # Inherited by the nodes. The path is short, since sockets lie in it.
    os.environ["RAY_TMPDIR"] = rays = tempfile.mkdtemp(prefix="ray-")
    try:
        with tempfile.TemporaryDirectory() as scratch, cluster(2) as address:
            there = Path(scratch) / "quickstart"
            began = time.perf_counter()
            result = run_study(STUDY, output=there, ray=address)
            seconds = time.perf_counter() - began
            ours, theirs = results(options.local), results(there)
            found = {
                "nodes": 2,
                "units": sum(stage.total for stage in result.plan.stages),
                "failures": [f"{failure.stage} {failure.what}: {failure.reason}" for failure in result.failures],
                "compared": len(ours),
                "weights": sum(name.endswith("model.safetensors") for name in ours),
                "differences": differences(ours, theirs),
                "seconds": round(seconds),
            }
    finally:
        shutil.rmtree(rays, ignore_errors=True)
    known = {"machine": machine(torch.device("cpu")), "versions": {**versions(), "ray": version("ray")}}
    print(write_result("ray_quickstart", {**known, **found}))


if __name__ == "__main__":
    main()
