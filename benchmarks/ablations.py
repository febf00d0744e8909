"""What a part of a method contributes: final losses of runs with and without it, paired by seed.

    hf-lowrank study recipes/studies/ablations.yaml --output runs/ablations
    python benchmarks/ablations.py runs/ablations

A positive effect means that the part lowers the held-out loss. Intervals are Student's t over the paired seeds.
"""

import argparse
from pathlib import Path

import torch
from _common import machine, versions, write_result

from hf_lowrank.runs.records import load_run
from hf_lowrank.statistics import mean_difference, mean_interval

# The part: the member that has it, and the one that does not.
PAIRS = {
    "LDAdam's error feedback": ("ldadam", "ldadam_no_feedback"),
    "refactorisation of the low-rank control": ("low_rank_restarts", "low_rank"),
    "refactorisation of SLTrain": ("sltrain_restarts", "sltrain"),
    "the guide of structured feed-forwards": ("structured", "structured_no_guide"),
    "a lazy interval of GaLore": ("galore_lazy", "galore_fixed"),
}


def losses(study: Path) -> dict[str, dict[int, float]]:
    """The final loss of each run by member and seed, nats per token."""
    found: dict[str, dict[int, float]] = {}
    for folder in sorted((study / "runs").glob("*-seed*")):
        member, _, seed = folder.name.rpartition("-seed")
        loss = load_run(folder).final_loss
        if loss is not None:
            found.setdefault(member, {})[int(seed)] = loss
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder of the finished study")
    args = parser.parse_args()
    found = losses(args.study)
    missing = sorted({member for pair in PAIRS.values() for member in pair} - set(found))
    if missing:
        parser.error(f"{args.study} has no finished runs of {', '.join(missing)}")
    effects = {}
    for part, (has, lacks) in PAIRS.items():
        effect = mean_difference(found[has], found[lacks])
        assert effect is not None
        verdict = "undecided" if effect.low <= 0 <= effect.high else "helps" if effect.value > 0 else "harms"
        effects[part] = {
            "with": mean_interval([*found[has].values()]).value,
            "without": mean_interval([*found[lacks].values()]).value,
            "effect": effect.value, "low": effect.low, "high": effect.high, "seeds": effect.n, "verdict": verdict,
        }  # fmt: skip
        print(f"{part:42} {effect.value:+.4f} [{effect.low:+.4f}, {effect.high:+.4f}] nats  {verdict}")
    write_result("ablations", {"effects": effects, "machine": machine(torch.device("cpu")), "versions": versions()})


if __name__ == "__main__":
    main()
