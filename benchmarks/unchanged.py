"""Whether a change of the code left every number as it was: record before it, record after it, compare.

    python -m benchmarks.unchanged record before       # in a checkout of the earlier commit
    python -m benchmarks.unchanged record after        # in a checkout of the later one
    python -m benchmarks.unchanged compare before after

A record is a study of every method at nano scale, 60 steps and two seeds, with its measurements, downstream scores,
prediction, claims and page. Compared bit for bit: weights and optimizer states of every checkpoint, the numbers of all
rows and result files, and the numbers in the page. Times, memory and words are left out; numbers that differ by
rounding alone are counted apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

RECIPES = Path(__file__).parent.parent / "recipes" / "nano"
METHODS = {
    "full_rank": (),
    "galore": ("method.update_proj_gap=20",),
    "q_galore": ("method.update_proj_gap=20",),
    "fira": ("method.update_proj_gap=20",),
    "apollo": ("method.update_proj_gap=20",),
    "apollo_mini": ("method.update_proj_gap=20",),
    "frugal": ("method.update_proj_gap=20",),
    "muon": (),
    "normuon": (),
    "dion": (),
    "dion2": (),
    "ldadam": (),
    "cosmos": (),
    "relora": ("method.restart_every=20", "method.restart_warmup_steps=5"),
    "cola": (),
    "sltrain": (),
    "structured": (),
    "sst": ("method.redraw_every=20", "method.redraw_warmup_steps=5"),
    "low_rank": (),
}
# Ends of intervals may differ this much where another library gives the quantile.
ROUNDING = 1e-12
# Words of keys whose numbers differ from one run of the same code to the next.
VOLATILE = re.compile(
    r"(?<![a-z])(seconds?|bytes|memory|time|runtime|date|versions?|flos|throughput|folder|size|speed|costs?)(?![a-z])",
    re.I,
)


def study() -> dict[str, Any]:
    return {
        "name": "unchanged",
        "baseline": "full_rank",
        "members": {
            name: {"recipe": str(RECIPES / f"{name}.yaml"), "set": list(overrides)}
            for name, overrides in METHODS.items()
        },
        "seeds": [0, 1],
        "set": [
            "training.max_steps=60",
            "training.save_steps=20",
            "training.warmup_steps=5",
            "data.evaluation_sequences=64",
        ],
        "measure": {"pairs": "last"},
        "evaluate": {"steps": "last"},
        "jobs": 2,
        "threads": 1,
    }


def record(place: Path) -> None:
    """Runs the study and measures two of its runs with every metric there is."""
    place.mkdir(parents=True, exist_ok=True)
    file = place / "unchanged.yaml"
    file.write_text(yaml.safe_dump(study(), sort_keys=False), encoding="utf-8")
    program = [sys.executable, "-m", "hf_lowrank"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}

    def run(*arguments: str) -> None:
        subprocess.run([*program, *arguments], check=True, env=environment)

    run("study", str(file), "--output", str(place / "study"))
    runs = sorted((place / "study").rglob("checkpoint-60"))
    two = [str(path.parent) for path in runs if path.parent.name in ("full_rank-seed0", "galore-seed0")]
    if len(two) != 2:
        sys.exit(f"expected the runs of full_rank and galore, found {[path.parent.name for path in runs]}")
    run("measure", *two, "--metrics", "all", "--steps", "last", "--output", str(place / "extras"))


def compare(before: Path, after: Path) -> int:
    """Prints what differs; the number of differences beyond rounding."""
    old, new = dict(facts(before)), dict(facts(after))
    differences = rounded = 0
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            print(f"{name}: only {'after' if name in new else 'before'}")
            differences += name in old  # something more is no change of a number
            continue
        gone, come = old[name] - new[name], new[name] - old[name]
        rounding = _matched_by_rounding(gone, come)
        rounded += rounding
        if gone:
            differences += sum(gone.values())
            print(f"{name}: {sum(gone.values())} of {sum(old[name].values())} differ, e.g.", end=" ")
            print(*list(gone)[:3], "->", *list(come)[:3])
    total = sum(sum(found.values()) for found in old.values())
    print(f"{len(old)} files with {total} numbers and tensors: {differences} differ, {rounded} more by rounding")
    return differences


def _matched_by_rounding(gone: Counter[Any], come: Counter[Any]) -> int:
    """Takes out the numbers of equal name whose relative difference is at most `ROUNDING`; how many there were."""
    candidates: dict[Any, list[Any]] = {}
    for leaf in come:
        candidates.setdefault(leaf[:-1], []).append(leaf)
    matched = 0
    for leaf in list(gone):
        for other in candidates.get(leaf[:-1], []):
            if come[other] >= gone[leaf] and _close(leaf[-1], other[-1]):
                matched += gone[leaf]
                come[other] -= gone.pop(leaf)
                break
    return matched


def _close(one: str, other: str) -> bool:
    try:
        return math.isclose(float(one), float(other), rel_tol=ROUNDING)
    except ValueError:
        return False  # digests


def facts(place: Path) -> Iterator[tuple[str, Counter[Any]]]:
    """For each file, the tensors or numbers that it holds, by name."""
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = path.relative_to(place).as_posix()
        if path.suffix == ".safetensors":
            yield name, Counter(digests(load_file(path)))
        elif path.name in ("optimizer.pt", "scheduler.pt"):
            yield name, Counter(digests(torch.load(path, weights_only=True)))
        elif path.name in ("measurements.jsonl", "downstream.jsonl") or "/downstream/" in name:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            yield name, Counter(leaf for line in lines for leaf in row(line))
        elif path.name in ("claims.json", "prediction.json", "trainer_state.json"):
            yield name, Counter(numbers(json.loads(path.read_text(encoding="utf-8"))))
        elif path.name == "report.html":
            for payload in re.findall(r"<script[^>]*application/json[^>]*>(.*?)</script>", path.read_text(), re.S):
                yield name, Counter(("page", leaf) for _, leaf in numbers(json.loads(payload)))


def row(line: dict[str, Any]) -> Iterator[Any]:
    """A row's numbers, each with what names the row."""
    names = ("run", "method", "seed", "step", "metric", "scope", "baseline", "task", "checkpoint", "item")
    key = tuple(str(line.get(name)) for name in names)
    for path, value in numbers({k: v for k, v in line.items() if k not in names}):
        yield (*key, path, value)


def digests(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(path, digest) of every tensor and number in nested mappings and lists."""
    if isinstance(tree, torch.Tensor):
        plain = tree.detach().contiguous().cpu()
        content = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, f"{plain.dtype} {tuple(plain.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from digests(value, f"{name}/{key}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from digests(value, f"{name}/{number}")
    elif isinstance(tree, int | float):
        yield name, repr(tree)


def numbers(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(path, number) of every number in a JSON document that is the same from run to run."""
    if isinstance(tree, bool) or VOLATILE.search(name):
        return
    if isinstance(tree, int | float):
        yield name, repr(tree)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers(value, f"{name}/{key}")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from numbers(value, f"{name}/{number}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("record").add_argument("place", type=Path)
    both = verbs.add_parser("compare")
    both.add_argument("before", type=Path)
    both.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.verb == "record":
        record(given.place.resolve())
    else:
        sys.exit(1 if compare(given.before, given.after) else 0)


if __name__ == "__main__":
    main()
