"""Several processes compared with one at the same global batch: every method under DDP and FSDP2, in Trainer and in a
loop with accelerate.

For each method and engine, over 1, 2 and 4 gloo processes on the CPU: the largest difference of losses (required:
1e-4) and weights from a single process; whether the processes end with the same bits; the optimizer bytes of the
fullest of four processes as a share of a single process's (required under FSDP2: 0.3); and, in Trainer, the difference
of a run that two processes start and one or four resume. Weights are float64 in the loop and float32 in Trainer.
Results that were recorded with the same versions are kept.

    python -m benchmarks.distributed [--cases galore,muon] [--steps 30]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import RESULTS, machine, versions, write_result
from tests.distributed.every_method import (
    CASES,
    by_hand,
    by_trainer,
    differences,
    launch,
    write_recipe,
    write_texts,
)

WORLDS, RESUMED = (1, 2, 4), (1, 4)
WAYS = ("ddp", "fsdp")
LOSS, SHARE = 1e-4, 0.3


def summary(by_world: dict[int, dict[str, Any]], resumed: dict[int, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The worst over all numbers of processes."""
    found = [*by_world.values(), *(resumed or {}).values()]
    row = {
        "loss_difference": max(each["loss_difference"] for each in by_world.values()),
        "weight_difference": max(each["weight_difference"] for each in by_world.values()),
        "replicas_identical": all(each["replicas_identical"] for each in found),
        "bytes_ratio_of_4": by_world[4]["bytes_ratio"],
    }
    for world, each in (resumed or {}).items():
        row[f"resumed_at_{world}_loss_difference"] = each["loss_difference"]
        row[f"resumed_at_{world}_weight_difference"] = each["weight_difference"]
    return row


def hand(case: str, way: str, steps: int, folder: Path) -> dict[str, Any]:
    """A loop with accelerate."""
    alone = by_hand([case], "alone", steps)[case]
    found = {}
    for world in WORLDS:
        ranks = launch(partial(by_hand, [case], way, steps), world, folder / "meet")
        found[world] = differences(alone, [each[case] for each in ranks])
    return summary(found)


def trainer(case: str, way: str, steps: int, folder: Path) -> dict[str, Any]:
    """A recipe's Trainer; one and four processes resume the run of two processes half way."""
    recipe = partial(write_recipe, folder, case, steps=steps, saved=steps // 2)

    def job(run: str, world: int) -> Any:
        return launch(partial(by_trainer, recipe(world, way), folder / run, way), world, folder / "meet")

    alone = by_trainer(recipe(1, "alone"), folder / "alone", "alone")
    found = {world: differences(alone, job(f"run{world}", world)) for world in WORLDS}
    resumed = {}
    for world in RESUMED:
        shutil.copytree(folder / "run2", folder / f"resumed{world}")
        shutil.rmtree(folder / f"resumed{world}" / f"checkpoint-{steps}")
        resumed[world] = differences(alone, job(f"resumed{world}", world))
    return summary(found, resumed)


def within(row: dict[str, Any]) -> bool:
    """Whether a row meets the requirements."""
    losses = [value for key, value in row.items() if key.endswith("loss_difference")]
    share = SHARE if row["way"] == "fsdp" else 1
    return max(losses) <= LOSS and row["replicas_identical"] and row["bytes_ratio_of_4"] <= share


def earlier(here: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the result file, if it was made with the same versions and steps."""
    path = RESULTS / "distributed.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return known["rows"] if all(known.get(key) == value for key, value in here.items()) else []


def line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="default: all")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    here = {"steps": options.steps, "versions": versions()}
    rows = earlier(here)
    known = {(row["case"], row["door"], row["way"]) for row in rows}
    print(line(["case", "door", "way", "loss", "weight", "identical", "bytes at 4", "seconds"]))
    print("|---|---|---|---|---|---|---|---|")
    doors = {"accelerate": hand, "trainer": trainer}
    jobs = [(case, door, way) for way in WAYS for door in doors for case in options.cases.split(",")]
    for case, door, way in (job for job in jobs if job not in known):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HF_LOWRANK_CACHE"] = str(Path(folder) / "cache")
            write_texts(Path(folder))
            row = {"case": case, "door": door, "way": way, **doors[door](case, way, options.steps, Path(folder))}
        row["within"] = within(row)
        row["seconds"] = round(time.perf_counter() - began, 1)
        rows.append(row)
        print(line(row[key] for key in ("case", "door", "way", "loss_difference", "weight_difference",
                                        "replicas_identical", "bytes_ratio_of_4", "seconds")), flush=True)  # fmt: skip
        content = {
            "machine": machine(torch.device("cpu")), "asked": {"loss_difference": LOSS, "bytes_ratio_of_4": SHARE},
            **here, "worlds": WORLDS, "rows": rows,
        }  # fmt: skip
        write_result("distributed", content)
    print(f"\n{sum(row['within'] for row in rows)} of {len(rows)} within what was asked")


if __name__ == "__main__":
    main()
