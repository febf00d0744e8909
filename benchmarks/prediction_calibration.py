"""Calibration of prediction on simulated runs: 100 with an effect of geometry, 100 without.

With an effect, the gain's 95 % interval must cover the expected gain (the mean over many more simulations of the
same kind) in at least 90 of 100; without one, the permutation test must reject at 5 % in 2 to 9 of 100.

    python benchmarks/prediction_calibration.py [--simulations 100] [--permutations 99]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
from simulated_studies import simulated_table

from hf_lowrank.downstream.prediction import gain_interval, permutation_p_value
from hf_lowrank.downstream.ridge import leave_one_group_out
from hf_lowrank.storage.files import write_text

RESULTS = Path(__file__).parent / "results" / "prediction_calibration.json"
RUNS, STEPS, METRICS, EFFECT = 12, 5, 16, 0.5
TRUTH_SIMULATIONS = 400


def gain_of(table):
    """(gain, predictions of perplexity alone, predictions of both)."""
    y, runs = table.target.reshape(-1), table.run_of_row
    base, _ = leave_one_group_out(table.columns([]), y, runs)
    both, _ = leave_one_group_out(table.columns(), y, runs)
    return (((base - y) ** 2).sum() - ((both - y) ** 2).sum()) / ((y - y.mean()) ** 2).sum(), base, both


def simulated(seed, effect):
    return simulated_table(seed, runs=RUNS, steps=STEPS, metrics=METRICS, effect=effect)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=100)
    parser.add_argument("--permutations", type=int, default=99)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    start = time.time()
    # The seeds of the expected gain, of the planted and of the null simulations do not overlap.
    truth = float(np.mean([gain_of(simulated(100_000 + s, EFFECT))[0] for s in range(TRUTH_SIMULATIONS)]))
    covered = 0
    for seed in range(options.simulations):
        table = simulated(seed, EFFECT)
        _, base, both = gain_of(table)
        low, high = gain_interval(table.target, base, both, seed=seed)
        covered += low <= truth <= high
    p_values = []
    for seed in range(options.simulations):
        table = simulated(10_000 + seed, 0.0)
        p_values.append(permutation_p_value(table, gain_of(table)[0], permutations=options.permutations, seed=seed))
    rejected = sum(p <= 0.05 for p in p_values)
    result = {
        "simulations": options.simulations,
        "runs": RUNS, "steps": STEPS, "metrics": METRICS, "effect": EFFECT,
        "expected_gain": truth,
        "interval_covers": int(covered), "asked_covers": 90,
        "permutations": options.permutations,
        "null_rejected_at_5_percent": int(rejected), "asked_rejected": [2, 9],
        "null_p_value_mean": float(np.mean(p_values)),
        "null_p_value_quartiles": np.quantile(p_values, [0.25, 0.5, 0.75]).tolist(),
        "seconds": round(time.time() - start, 1),
        "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    share = options.simulations / 100
    return 0 if covered >= 90 * share and 2 * share <= rejected <= 9 * share else 1


if __name__ == "__main__":
    sys.exit(main())
