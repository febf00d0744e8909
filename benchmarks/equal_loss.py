"""Sharpness at equal loss, beside sharpness at the last step, from the committed tables of a study.

    python benchmarks/equal_loss.py model_cards/nano --baseline full_rank

A run that has been fitted less is flatter, so sharpness at an equal step compares how far methods have come as well.
Here the baseline and a method of the same seed are compared at the loss that the worse of both ends with: the natural
logarithm of each one's sharpness there, linear in the loss between measured checkpoints. Intervals are Student's t
over the paired seeds, widened for the number of methods (Bonferroni).
"""

import argparse
import csv
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
from _common import versions, write_result

from hf_lowrank.statistics import mean_difference

METRICS = ("random_sharpness", "pca1_sharpness")


def read_curves(card: Path) -> dict[str, dict[str, dict[int, list[tuple[float, float]]]]]:
    """(loss, ln sharpness) of every measured checkpoint in order of steps, by metric, method and seed."""
    with (card / "measurements.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["value"]]
    losses = {(row["run"], row["step"]): float(row["value"]) for row in rows if row["metric"] == "loss"}
    curves = {metric: defaultdict(lambda: defaultdict(list)) for metric in METRICS}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        if row["metric"] in METRICS:
            point = (losses[row["run"], row["step"]], float(np.log(float(row["value"]))))
            curves[row["metric"]][row["method"]][int(row["seed"])].append(point)
    return curves


def at_loss(curve: list[tuple[float, float]], loss: float) -> float | None:
    """ln sharpness where the run had this loss, on the last segment of its curve around it; None if it had none."""
    for (before, one), (after, other) in reversed(list(itertools.pairwise(curve))):
        if min(before, after) <= loss <= max(before, after):
            return one + (other - one) * (loss - before) / (after - before)
    return None


def compare(curves: dict[str, dict[int, list[tuple[float, float]]]], baseline: str) -> dict[str, dict]:
    """By method: ln of the baseline's sharpness over the method's, at the last step and at equal loss."""
    methods = sorted(method for method in curves if method != baseline)
    confidence = 1 - 0.05 / len(methods)
    found = {}
    for method in methods:
        seeds = sorted(set(curves[baseline]) & set(curves[method]))
        ends, equal, losses = [{}, {}], [{}, {}], []
        for seed in seeds:
            pair = curves[method][seed], curves[baseline][seed]
            losses.append(max(curve[-1][0] for curve in pair))
            reached = [at_loss(curve, losses[-1]) for curve in pair]
            for which, curve in enumerate(pair):
                ends[which][seed] = curve[-1][1]
                if None not in reached:
                    equal[which][seed] = reached[which]
        found[method] = {"loss": float(np.mean(losses))}
        for name, values in (("last_step", ends), ("equal_loss", equal)):
            estimate = mean_difference(*values, confidence)
            found[method][name] = estimate and {
                "ln_ratio": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "seeds": estimate.n,
            }
    return found


def line(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return f"{'fewer than two seeds came there':36}"
    return "{ln_ratio:+.3f} [{low:+.3f}, {high:+.3f}], {seeds} seeds ".format(**estimate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", type=Path, help="a folder that holds measurements.csv of a study")
    parser.add_argument("--baseline", required=True, help="the method to compare the others with")
    args = parser.parse_args()
    curves = read_curves(args.card)
    for metric, by_method in curves.items():
        if args.baseline not in by_method:
            parser.error(f"{args.card} has no {metric} of {args.baseline!r}; allowed: {', '.join(sorted(by_method))}")
    result = {metric: compare(by_method, args.baseline) for metric, by_method in curves.items()}
    for metric, methods in result.items():
        print(f"ln({metric} of {args.baseline} / of the method): at the last step; at equal loss, in nats")
        for method, numbers in methods.items():
            print(f"  {method:24} {line(numbers['last_step'])} {line(numbers['equal_loss'])} at {numbers['loss']:.3f}")
    write_result(f"equal_loss_{args.card.name}", {"baseline": args.baseline, **result, "versions": versions()})


if __name__ == "__main__":
    main()
