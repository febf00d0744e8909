"""Measuring and evaluating with several processes: the same rows as with one, to the bit, and the speed-up.

A nano run is trained for a few steps. The processes split four of its checkpoints, or they measure a single one
jointly, splitting its draws, or evaluate it on a task, splitting the batches of items. Every process computes on one
thread. The speed-up is the time of one process divided by that of several, without their start, alternating in one
run; the requirement is 0.8 of the number of processes, or of cores if these are fewer. For comparison, the result has
what the machine allows: the same ratio for as many unrelated processes that each do all of the work.

    python -m benchmarks.measuring_processes [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lm_eval import evaluator
from transformers.models.llama import modeling_llama

from benchmarks._common import machine, spread, versions, write_result
from hf_lowrank.downstream import evaluate, lm_eval_model
from hf_lowrank.measuring import measure
from hf_lowrank.runs.measurements import read_measurements
from hf_lowrank.runs.scores import read_scores
from hf_lowrank.training import load_recipe, pretrain
from tests.distributed.every_method import launch

WORLDS = (1, 2, 4)
CHECKPOINTS = 4
CASES: dict[str, dict[str, Any]] = {
    "four checkpoints": {"steps": list(range(1, CHECKPOINTS + 1)), "settings": {"random": {"draws": 4}}},
    "one checkpoint": {"steps": "last", "settings": {"random": {"draws": 24, "steps": 2}}},
    "matrices of one checkpoint": {"steps": "last", "metrics": "weight,update"},
    "items of one task": {"steps": "last", "tasks": "pylib_syntax"},
}
RECIPE = Path(__file__).parent.parent / "recipes" / "nano" / "full_rank.yaml"


def one(rank: int, world: int, *, run: Path, output: Path, asked: dict[str, Any], apart: bool) -> dict[str, float]:
    """Seconds from when all processes are running until all rows are written; `apart`: unrelated processes."""
    torch.set_num_threads(1)
    PartialState._reset_state()  # the training's, of one process
    # OMP_NUM_THREADS as torchrun sets it: without, accelerate lets each of the processes compute on all cores.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    if world > 1:
        torch.distributed.barrier()
    if apart:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        output = output / str(rank)
    assert all((lm_eval_model, evaluator, modeling_llama))  # imported before the clock starts
    began = time.perf_counter()
    (evaluate if "tasks" in asked else measure)(run, output=output, device="cpu", **asked)
    return {"seconds": time.perf_counter() - began}


def rows(folder: Path) -> set[str]:
    return {row.to_line() for row in read_measurements(folder)} | set(map(repr, read_scores(folder)))


def case(name: str, run: Path, folder: Path, repeats: int) -> dict[str, Any]:
    seconds: dict[int, list[float]] = {world: [] for world in WORLDS}
    apart: dict[int, list[float]] = {world: [] for world in WORLDS[1:]}
    alone, different = set[str](), dict.fromkeys(WORLDS[1:], 0)

    def slowest(world: int, output: Path, *, apart: bool = False) -> float:
        job = partial(one, run=run, output=output, asked=CASES[name], apart=apart)
        return max(each["seconds"] for each in launch(job, world, folder / "launch"))

    for turn in range(repeats):
        for world in WORLDS:
            output = folder / f"{turn}-{world}"
            seconds[world].append(slowest(world, output))
            found = rows(output / run.name)
            alone = found if world == 1 else alone
            if world > 1:
                different[world] = max(different[world], len(found ^ alone))
                apart[world].append(slowest(world, folder / f"apart-{turn}-{world}", apart=True))
    result: dict[str, Any] = {"rows": len(alone), "rows_that_differ": different, "seconds": {}}
    result["seconds"] = {world: spread(seconds[world]) for world in WORLDS}
    result["of_linear"], result["machine_allows"] = {}, {}
    for world in WORLDS[1:]:
        cores = min(world, os.cpu_count() or 1)
        together = [first / other / cores for first, other in zip(seconds[1], seconds[world], strict=True)]
        allowed = [world * first / other / cores for first, other in zip(seconds[1], apart[world], strict=True)]
        result["of_linear"][world], result["machine_allows"][world] = spread(together), spread(allowed)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    repeats = options.repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        steps = {"max_steps": CHECKPOINTS, "save_steps": 1, "warmup_steps": 1}
        run = pretrain(
            load_recipe(RECIPE, [f"training.{key}={value}" for key, value in steps.items()]), folder / "run"
        )
        found = {}
        for name in options.cases:
            found[name] = case(name, run, folder / "rows", repeats)
            shutil.rmtree(folder / "rows")
            print(name, found[name], flush=True)
        write_result(
            "measuring_processes",
            {"machine": machine(torch.device("cpu")), "versions": versions(), "repeats": repeats, "cases": found},
        )


if __name__ == "__main__":
    main()
