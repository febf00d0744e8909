"""Every method of a short study: loss, spectra and landscape, scores, and the cost of its steps beside AdamW's.

    hf-lowrank study recipes/studies/methods.yaml --output runs/methods
    python benchmarks/quick_comparison.py runs/methods

The time of a step is processor time of forward, backward and optimizer together, over that of the full-rank run.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from _common import machine, versions, write_result

from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.records import RunRecord, load_run
from hf_lowrank.runs.scores import above_chance, comparable_scores

BASELINE = "full_rank"


def step_seconds(run: RunRecord) -> float:
    """Processor time of a step, seconds."""
    seconds, steps = run.fact("cpu_seconds"), run.planned
    if seconds is None or not steps:
        raise SystemExit(f"{run.path} says nothing of its time; train it again")
    return seconds / steps


def line(run: RunRecord, baseline: RunRecord) -> dict[str, Any]:
    """What there is to say of one method."""
    measured = [name for name, metric in METRICS.items() if not metric.extra and run.last(name) is not None]
    values = {name: row.value for name in measured if (row := run.last(name)) is not None and row.has_value}
    return {
        "loss": run.final_loss,
        "unigram_loss": run.fact("unigram_loss"),
        "step_over_adamw": step_seconds(run) / step_seconds(baseline),
        "metrics_with_a_value": len(values),
        "random_sharpness": values.get("random_sharpness"),
        "weight_effective_rank": values.get("weight_effective_rank"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder of the finished study")
    args = parser.parse_args()
    folders = sorted((args.study / "runs").glob("*-seed0"))
    runs = {run.method: run for run in map(load_run, folders)}
    if BASELINE not in runs:
        parser.error(f"{args.study} has no finished run of {BASELINE}")
    steps = runs[BASELINE].planned
    assert steps is not None
    lines = {name: line(run, runs[BASELINE]) for name, run in runs.items()}
    scored, _ = comparable_scores({name: run.scores for name, run in runs.items()})
    for name, found in above_chance(scored, []).items():
        lines[name]["above_chance"] = found[steps]
    where = {"machine": machine(torch.device("cpu")), "versions": versions()}
    print(write_result("quick_comparison", {"steps": steps, "methods": lines, **where}))


if __name__ == "__main__":
    main()
