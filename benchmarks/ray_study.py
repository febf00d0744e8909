"""A study's units on a Ray cluster: how equal units scale over workers, and what scheduling costs.

Eight equal units, each a short training of the nano recipe on one thread, run on clusters of 1, 2 and 4 nodes of one
CPU each, all on this machine, and by local processes with as many jobs, alternating in one run. The speed-up is the
time on one worker divided by that on several. Beyond the machine's cores none is possible; the local processes show
what the machine allows. The first unit of each worker, which imports what units need, runs before the clock starts.

Scheduling: up to 1 000 units that end at once, on two nodes.

    python -m benchmarks.ray_study [--repeats 3] [--units 8] [--steps 200] [--workers 1 2 4] [--dummies 10 100 1000]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from ray.cluster_utils import Cluster

from benchmarks._common import machine, spread, versions, write_result
from hf_lowrank.study.cluster import RayExecutor
from hf_lowrank.study.executors import Executor, WorkerExecutor
from hf_lowrank.study.units import TrainUnit
from hf_lowrank.training import load_recipe
from hf_lowrank.training.corpus import prepare_corpus

WORKERS = (1, 2, 4)
RECIPE = Path(__file__).parent.parent / "recipes" / "nano" / "full_rank.yaml"


@contextmanager
def cluster(workers: int) -> Iterator[str]:
    """The address of a cluster of a head without CPUs and nodes of one CPU each."""
    common = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "include_log_monitor": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "no_monitor": True, **common})
    try:
        for _ in range(workers):
            made.add_node(num_cpus=1, **common)
        yield made.address
    finally:
        made.shutdown()


@contextmanager
def on_ray(workers: int, folder: Path) -> Iterator[RayExecutor]:
    with cluster(workers) as address:
        executor = RayExecutor(address)
        try:
            executor.check(folder)
            yield executor
        finally:
            executor.stop()


def run(executor: Executor, units: Sequence[TrainUnit], jobs: int, folder: Path, *, fail: bool = False) -> float:
    """Seconds until all units have ended, `jobs` at a time; `fail`: each ends with an error."""
    began, waiting, running = time.perf_counter(), [*units], 0
    while waiting or running:
        while waiting and running < jobs:
            unit = waiting.pop(0)
            executor.start(unit, folder / "logs" / f"{unit.name}.log")
            running += 1
        for outcome in executor.wait(0.5):
            running -= 1
            if (outcome.reason is not None) != fail:
                raise RuntimeError(f"{outcome.key}: {outcome.reason}")
    return time.perf_counter() - began


def training(count: int, steps: int, folder: Path) -> list[TrainUnit]:
    short = {"max_steps": steps, "save_steps": steps, "eval_steps": steps, "warmup_steps": 1}
    overrides = [f"training.{key}={value}" for key, value in short.items()]
    return [
        TrainUnit(
            name=str(number),
            recipe=str(RECIPE),
            overrides=overrides,
            seed=number,
            folder="",
            output=str(folder / f"run-{number}"),
        )
        for number in range(count)
    ]


def dummies(count: int) -> list[TrainUnit]:
    """Units that fail at once: their member waits for its sweep."""
    return [
        TrainUnit(name=str(number), recipe="", overrides=[], seed=0, folder="", output="", waits=True)
        for number in range(count)
    ]


def scaling(folder: Path, repeats: int, count: int, steps: int, worlds: Sequence[int]) -> dict[str, object]:
    seconds: dict[str, dict[int, list[float]]] = {"ray": {}, "local": {}}
    for turn in range(repeats):
        for workers in worlds:
            place = folder / f"{turn}-{workers}"
            with on_ray(workers, place / "ray") as executor:
                run(executor, dummies(2 * workers), workers, place / "ray", fail=True)
                taken = run(executor, training(count, steps, place / "ray"), workers, place / "ray")
                seconds["ray"].setdefault(workers, []).append(taken)
            local = WorkerExecutor(1)
            try:
                run(local, dummies(2), 1, place / "local", fail=True)
                taken = run(local, training(count, steps, place / "local"), workers, place / "local")
                seconds["local"].setdefault(workers, []).append(taken)
                print(f"{workers} workers: Ray {seconds['ray'][workers][-1]:.0f} s, local {taken:.0f} s", flush=True)
            finally:
                local.stop()
            shutil.rmtree(place)
    found: dict[str, object] = {"units": count, "steps": steps}
    for kind, by_workers in seconds.items():
        found[f"{kind}_seconds"] = {workers: spread(taken) for workers, taken in by_workers.items()}
        found[f"{kind}_speed_up"] = {
            workers: spread([one / many for one, many in zip(by_workers[worlds[0]], taken, strict=True)])
            for workers, taken in by_workers.items()
        }
    found["ray_over_local"] = {
        workers: spread([ray / local for ray, local in zip(taken, seconds["local"][workers], strict=True)])
        for workers, taken in seconds["ray"].items()
    }
    return found


def scheduling(folder: Path, repeats: int, counts: Sequence[int]) -> dict[str, object]:
    taken: dict[int, list[float]] = {count: [] for count in counts}
    with on_ray(2, folder / "dummies") as executor:
        run(executor, dummies(4), 2, folder / "dummies", fail=True)
        for _ in range(repeats):
            for count in counts:
                taken[count].append(run(executor, dummies(count), 2, folder / "dummies", fail=True))
    return {
        "workers": 2,
        "seconds": {count: spread(seconds) for count, seconds in taken.items()},
        "milliseconds_per_unit": {
            count: spread([1e3 * one / count for one in seconds]) for count, seconds in taken.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--units", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--dummies", type=int, nargs="+", default=[10, 100, 1000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Both are inherited by the nodes. The path of the second is short, since sockets lie in it.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["RAY_TMPDIR"] = rays = tempfile.mkdtemp(prefix="ray-")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            prepare_corpus(load_recipe(RECIPE).data)
            found = {
                "scheduling": scheduling(folder, options.repeats, options.dummies),
                "scaling": scaling(folder, options.repeats, options.units, options.steps, options.workers),
            }
        known = {"machine": machine(torch.device("cpu")), "versions": {**versions(), "ray": version("ray")}}
        print(write_result("ray_study", {**known, "repeats": options.repeats, **found}))
    finally:
        shutil.rmtree(rays, ignore_errors=True)


if __name__ == "__main__":
    main()
