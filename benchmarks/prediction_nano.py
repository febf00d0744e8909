"""Both questions of prediction on the committed nano study, next to what leaving out single runs said of it.

    python benchmarks/prediction_nano.py

Reads the tables under model_cards/nano, at the last step. The study's own prediction.json took seeds as independent.
"""

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from _common import versions, write_result

from hf_lowrank.downstream.gathering import OF_OWN_BASELINE
from hf_lowrank.downstream.prediction import Table, analyse
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.scores import PRIMARY

CARD = Path(__file__).parent.parent / "model_cards" / "nano"
BASELINE, STEP = "full_rank", "400"
NUMBERS = ("methods", "runs", "checkpoints", "r2_perplexity", "r2_both", "gain", "gain_low", "gain_high", "p_value")


def rows(name):
    with (CARD / name).open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["step"] == STEP]


def nano_table() -> Table:
    values, scores, method_of = defaultdict(dict), defaultdict(dict), {}
    for row in rows("measurements.csv"):
        method_of[row["run"]] = row["method"]
        to_baseline = not row["baseline"] or row["baseline"].startswith(BASELINE)
        if row["value"] and to_baseline:
            values[row["run"]].setdefault(row["metric"], float(row["value"]))
        elif row["method"] == BASELINE and row["metric"] in OF_OWN_BASELINE:
            values[row["run"]][row["metric"]] = OF_OWN_BASELINE[row["metric"]]
    for metric in PRIMARY:
        for row in rows("scores.csv"):
            if row["metric"] == metric and row["chance"] and float(row["chance"]) < 1:
                chance = float(row["chance"])
                scores[row["run"]].setdefault(row["task"], (float(row["value"]) - chance) / (1 - chance))
    runs = sorted(run for run in values if scores[run])
    metrics = [metric for metric in METRICS.sixteen if all(metric in values[run] for run in runs)]
    methods = sorted({method_of[run] for run in runs})
    return Table(
        methods=methods,
        runs=runs,
        metrics=metrics,
        method_R=np.array([methods.index(method_of[run]) for run in runs]),
        run_N=np.arange(len(runs)),
        step_N=np.full(len(runs), int(STEP)),
        log_perplexity_N=np.log([values[run]["perplexity"] for run in runs]),
        geometry_NP=np.array([[values[run][metric] for metric in metrics] for run in runs]),
        target_N=np.array([np.mean(list(scores[run].values())) for run in runs]),
    )


def main() -> None:
    table = nano_table()
    before = json.loads((CARD / "prediction.json").read_text(encoding="utf-8"))
    found = {answer.question: {key: getattr(answer, key) for key in NUMBERS} for answer in analyse(table).answers}
    result = {
        "metrics": list(table.metrics),
        "left out one run at a time, as the study's own prediction": {key: before.get(key) for key in NUMBERS[1:]},
        **found,
        "versions": versions(),
    }
    print(json.dumps(result, indent=1))
    write_result("prediction_nano", result)


if __name__ == "__main__":
    main()
