"""Whether prediction keeps its word on simulated studies of known truth.

For each of the two questions: studies without an effect, where the geometry is a fingerprint of the method and of the
run that has nothing to do with the scores, must be rejected at 5 % in 2 to 8 of 100; studies with an effect of the
other question's kind as well; an effect of its own kind must be found more often; and the gain's 95 % interval must
cover the expected gain, the mean over many studies of the same kind, in at least 90 of 100.

    python benchmarks/prediction_calibration.py [--simulations 200] [--permutations 39]
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
from simulated_studies import simulated_table

from hf_lowrank.downstream.prediction import gain_interval, permutation_p_value, question
from hf_lowrank.storage.files import write_text

RESULTS = Path(__file__).parent / "results" / "prediction_calibration.json"
SHAPES = {
    "unseen_method": {"methods": 12, "runs": 3, "steps": 2, "metrics": 16},
    "unseen_run": {"methods": 8, "runs": 3, "steps": 2, "metrics": 16},
}
EFFECTS = {"none": {}, "between methods": {"between": 1.5}, "within methods": {"within": 1.5}}
OWN = {"unseen_method": "between methods", "unseen_run": "within methods"}


def calibrate(name, effect, simulations, permutations):
    """Rejections, coverage and the expected gain of one question under one kind of study."""
    gains, intervals, rejected = [], [], 0
    for seed in range(simulations):
        table = simulated_table(seed, **SHAPES[name], **EFFECTS[effect])
        asked = question(table, name)
        gains.append(asked.gain)
        intervals.append(gain_interval(table, asked))
        rejected += permutation_p_value(asked, permutations=permutations, seed=seed) <= 0.05
    truth = float(np.mean(gains))
    return {
        "expected_gain": truth,
        "median_gain": float(np.median(gains)),
        "rejected_share": rejected / simulations,
        "covered_share": float(np.mean([low <= truth <= high for low, high in intervals])),
        "median_half_width": float(np.median([(high - low) / 2 for low, high in intervals])),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--permutations", type=int, default=39)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    start = time.time()
    found = {
        name: {effect: calibrate(name, effect, options.simulations, options.permutations) for effect in EFFECTS}
        for name in SHAPES
    }
    good = True
    for name, by_effect in found.items():
        for effect, row in by_effect.items():
            good &= row["covered_share"] >= 0.9
            good &= row["rejected_share"] > 0.08 if effect == OWN[name] else row["rejected_share"] <= 0.08
        good &= by_effect["none"]["rejected_share"] >= 0.02
    result = {
        "simulations": options.simulations, "permutations": options.permutations, "shapes": SHAPES,
        "effects": EFFECTS, "asked": {"rejected without effect": [0.02, 0.08], "covered": 0.9},
        "questions": found, "as_asked": bool(good), "seconds": round(time.time() - start, 1),
        "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
