"""The faults of a drill, planned from its seed alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

METHODS: dict[str, dict[str, object]] = {
    "full_rank": {},
    "galore": {"rank": 4, "update_proj_gap": 3},
    "fira": {"rank": 4, "update_proj_gap": 3},
    "apollo": {"rank": 4, "update_proj_gap": 3},
    "q_galore": {"rank": 4, "update_proj_gap": 1},
    "apollo_mini": {"update_proj_gap": 3},
    "frugal": {"rank": 4, "update_proj_gap": 3},
    "muon": {},
    "normuon": {},
    "dion": {"rank": 4},
    "dion2": {},
    "ldadam": {"rank": 4},
    "cosmos": {"rank": 4},
    "relora": {"r": 4, "restart_every": 3, "restart_warmup_steps": 1},
    "cola": {"r": 4},
    "sltrain": {"r": 4},
    "structured": {"r": 4, "blocks": 2, "exclude_modules": []},
    "sst": {"r": 4, "redraw_every": 3, "redraw_warmup_steps": 1},
    "low_rank": {"r": 4},
}
# One round of seeds: damage has the most targets; faults that need several processes are slow, and come once.
ROUND = (
    "damaged", "killed", "terminated", "two at once", "damaged", "disk full", "clock", "damaged", "killed",
    "not a number", "study damaged", "read-only", "damaged", "memory", "terminated", "damaged", "rank dies", "damaged",
    "killed", "damaged",
)  # fmt: skip
KINDS = tuple(sorted(set(ROUND)))
# Faults that may strike the next call as well.
REPEATED = ("killed", "terminated", "disk full", "read-only", "memory", "not a number")
DAMAGES = ("truncated", "emptied", "zeroed", "flipped")
# Every kind of file of a run, with the pattern of its path below the drill's folder.
FILE_KINDS = {
    "recipe": "run/recipe.yaml",
    "facts": "run/facts.json",
    "evaluation set": "run/evaluation.safetensors",
    "tokenizer": "run/tokenizer/tokenizer.json",
    "tokenizer configuration": "run/tokenizer/tokenizer_config.json",
    "tokenizer checksums": "run/tokenizer/checksums.json",
    "first weights": "run/checkpoint-0/model.safetensors",
    "first configuration": "run/checkpoint-0/config.json",
    "first checksums": "run/checkpoint-0/checksums.json",
    "weights": "run/checkpoint-[1-9]/model.safetensors",
    "configuration": "run/checkpoint-[1-9]/config.json",
    "generation configuration": "run/checkpoint-[1-9]/generation_config.json",
    "optimizer": "run/checkpoint-[1-9]/optimizer.pt",
    "scheduler": "run/checkpoint-[1-9]/scheduler.pt",
    "random state": "run/checkpoint-[1-9]/rng_state.pth",
    "trainer state": "run/checkpoint-[1-9]/trainer_state.json",
    "training arguments": "run/checkpoint-[1-9]/training_args.bin",
    "checkpoint's tokenizer": "run/checkpoint-[1-9]/tokenizer*.json",
    "checksums": "run/checkpoint-[1-9]/checksums.json",
    "measurements": "run/measurements.jsonl",
    "part of measurements": "run/.measurements-1.part.jsonl",
    "scores": "run/downstream.jsonl",
    "scores of items": "run/downstream/*/*.jsonl",
    "cached tokens": "cache/sequences-*/*",
    "cached tokenizer": "cache/tokenizer-*/*",
    "cached items": "cache/items-*/*",
    "lock": "run/.*.lock",
}
STUDY_FILE_KINDS = {
    "study": "study/study.yaml",
    "sweep": "study/sweep.json",
    "claims": "study/claims.json",
    "prediction": "study/prediction.json",
    "timings": "study/.timings.json",
    "stamps": "study/.results.json",
    "member's measurements": "study/runs/*/measurements.jsonl",
    "member's facts": "study/runs/*/facts.json",
    "member's weights": "study/runs/*/checkpoint-*/model.safetensors",
    "member's recipe": "study/runs/*/recipe.yaml",
    "sweep's trainer state": "study/sweep/*/checkpoint-*/trainer_state.json",
}


@dataclass(frozen=True)
class Strike:
    """One fault of one call.

    Attributes:
        kind: of KINDS.
        at: when, as a share of the file operations of a call without faults.
        delay: seconds from then to the signal; 0: at once.
        size: of the remaining disk space, of the memory, or of the clock's jump; from 0 to 1.
    """

    kind: str
    at: float
    delay: float
    size: float


@dataclass(frozen=True)
class Damage:
    """One damaged file.

    Attributes:
        file_kind: of FILE_KINDS or STUDY_FILE_KINDS.
        how: of DAMAGES.
        place: which of several such files, and the position in it; from 0 to 1.
        finished: whether the run was finished before, rather than killed halfway.
        readers_first: whether the run is read before it is trained further.
    """

    file_kind: str
    how: str
    place: float
    finished: bool
    readers_first: bool


@dataclass(frozen=True)
class Plan:
    """What happens in a drill, in this order; `evaluate` and `report`: whether the calls include these stages."""

    seed: int
    kind: str
    method: str
    strikes: tuple[Strike, ...]
    damage: Damage | None
    evaluate: bool
    report: bool
    cached: bool

    @property
    def stages(self) -> tuple[str, ...]:
        stages = ("train", "measure", *(["evaluate"] if self.evaluate else []), *(["report"] if self.report else []))
        return ("study",) if self.kind == "study damaged" else stages


def plan_of(seed: int) -> Plan:
    """The plan of a seed: its kind by its position in the round, the rest random."""
    generator = random.Random(seed)
    kind = ROUND[seed % len(ROUND)]
    turn = seed // len(ROUND)
    method = generator.choice(list(METHODS))
    damage, strikes = None, []
    evaluate, report = generator.random() < 0.15, generator.random() < 0.2
    if kind in ("damaged", "study damaged"):
        kinds = list(FILE_KINDS if kind == "damaged" else STUDY_FILE_KINDS)
        number = turn * ROUND.count(kind) + ROUND[: seed % len(ROUND)].count(kind)
        damage = Damage(
            kinds[number % len(kinds)],
            generator.choice(DAMAGES),
            generator.random(),
            finished=generator.random() < 0.5,
            readers_first=generator.random() < 0.5,
        )
        if damage.file_kind in ("scores", "scores of items", "cached items"):
            evaluate = True
        if kind == "damaged" and not damage.finished:
            strikes.append(_strike("killed", generator, least=0.5 if damage.place < 0.8 else 0.0))
    else:
        strikes.append(_strike(kind, generator))
        if generator.random() < 0.3 and kind != "rank dies":
            strikes.append(_strike(generator.choice(REPEATED), generator))
    return Plan(seed, kind, method, tuple(strikes), damage, evaluate, report, cached=generator.random() < 0.7)


def _strike(kind: str, generator: random.Random, least: float = 0.0) -> Strike:
    at = generator.uniform(least, 1.0)
    if kind == "read-only" and generator.random() < 0.5:
        at = 0.0
    delay = 0.0 if generator.random() < 0.5 else generator.uniform(0, 0.1)
    return Strike(kind, at, delay, generator.random())


def victims(folder: Path, file_kind: str) -> list[Path]:
    """The files of a kind below a drill's folder, in order; empty ones cannot be damaged."""
    pattern = {**FILE_KINDS, **STUDY_FILE_KINDS}[file_kind]
    return sorted(
        path
        for path in folder.rglob("*")
        if fnmatchcase(path.relative_to(folder).as_posix(), pattern) and path.is_file() and path.stat().st_size
    )


def damaged(content: bytes, how: str, place: float) -> bytes:
    """The content with damage that always changes something."""
    at = min(int(place * len(content)), len(content) - 1)
    if how == "truncated":
        return content[:at]
    if how == "emptied":
        return b""
    if how == "zeroed":
        piece = content[at : at + 512]
        return (
            content[:at] + bytes(len(piece)) + content[at + 512 :]
            if any(piece)
            else damaged(content, "flipped", place)
        )
    bit = 1 << int(place * 8 * len(content)) % 8
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
