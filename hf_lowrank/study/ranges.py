"""What a sweep tries: values and ranges of recipe keys, their grid or a random sample of them, and where they end.

Values are numbers, booleans or strings by dotted recipe key. Numbers that are drawn or computed have three significant
digits, so that they read well and are the same on every machine.
"""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from hf_lowrank.claims.results import LEARNING_RATE

Value = float | int | bool | str
Values = Mapping[str, Value]

KINDS = ("uniform", "log_uniform")
ALLOWED = "must be a list of values, {uniform: [low, high]} or {log_uniform: [low, high]}"
# What a sweep does not choose, and why.
FIXED = {
    "training.max_steps": "sweep.steps is the length of every trial",
    "method.name": "another method is another member",
}
ATTEMPTS = 100


def check_ranges(ranges: Mapping[str, Any]) -> None:
    """Checks the keys and ranges of a sweep; None removes a key.

    Raises:
        ValueError: names the key and what is allowed.
    """
    for key, given in ranges.items():
        section, _, name = key.partition(".")
        if section not in ("training", "method") or not name:
            raise ValueError(f"{key} must be a key of training or method, e.g. {LEARNING_RATE} or method.scale")
        if key in FIXED:
            raise ValueError(f"{key} must be left out; {FIXED[key]}")
        problem = None if given is None else _problem(given)
        if key == LEARNING_RATE and given is not None and problem is None and not _lowest(given) > 0:
            problem = "must be above 0"
        if problem is not None:
            raise ValueError(f"{key} {problem}, got {given!r}")


def _problem(given: Any) -> str | None:
    """What is wrong with a range, to follow its key."""
    if isinstance(given, list):
        if not given or not all(isinstance(value, Value) for value in given):
            return "must have at least one value, each a number, a word, true or false"
        if any(isinstance(value, float) and not math.isfinite(value) for value in given):
            return "must be finite"
        repeated = [value for index, value in enumerate(given) if value in given[:index]]
        return f"must not repeat a value, {repeated[0]} is there twice" if repeated else None
    if not isinstance(given, dict) or len(set(given) & set(KINDS)) != 1 or set(given) - {*KINDS, "integer"}:
        return f"{ALLOWED}, each with integer: true for whole numbers"
    (kind,) = set(given) & set(KINDS)
    ends = given[kind]
    if not isinstance(ends, list) or len(ends) != 2 or not all(map(_is_number, ends)) or not ends[0] < ends[1]:
        return f"{kind} must be [low, high] with low < high"
    if kind == "log_uniform" and ends[0] <= 0:
        return "log_uniform must be above 0"
    return None if isinstance(given.get("integer", False), bool) else "integer must be true or false"


def _lowest(given: Any) -> float:
    values = given if isinstance(given, list) else given.get("uniform") or given["log_uniform"]
    return min(values) if all(map(_is_number, values)) else math.nan


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def grid(ranges: Mapping[str, Any]) -> list[dict[str, Value]]:
    """Every combination of the values of `ranges`, which are lists."""
    return [dict(zip(ranges, values, strict=True)) for values in itertools.product(*ranges.values())]


def sample(ranges: Mapping[str, Any], count: int, seed: str) -> list[dict[str, Value]]:
    """`count` different combinations, drawn at random: a Latin hypercube, or without replacement if all are lists.

    Each range is cut into `count` parts of equal probability, and has one value in each. The values of a key depend on
    `seed`, the key and its range alone.

    Raises:
        ValueError: there are not as many combinations.
    """
    if all(isinstance(given, list) for given in ranges.values()):
        every = grid(ranges)
        if len(every) < count:
            raise ValueError(f"{len(every)} combinations of values")
        return random.Random(seed).sample(every, count)
    for attempt in range(ATTEMPTS):
        columns = [_column(given, count, random.Random(f"{seed} {key} {attempt}")) for key, given in ranges.items()]
        drawn = list(zip(*columns, strict=True))
        if len(set(drawn)) == count:
            return [dict(zip(ranges, values, strict=True)) for values in drawn]
    raise ValueError("too few different values")


def _column(given: Any, count: int, generator: random.Random) -> list[Value]:
    """One value from each of `count` equal parts of a range, in random order."""
    parts = [(index + generator.random()) / count for index in range(count)]
    generator.shuffle(parts)
    if isinstance(given, list):
        return [given[int(part * len(given))] for part in parts]
    if "uniform" in given:
        low, high = given["uniform"]
        drawn = [low + part * (high - low) for part in parts]
    else:
        low, high = given["log_uniform"]
        drawn = [low * (high / low) ** part for part in parts]
    whole = given.get("integer", False)
    return [min(max(_rounded(value, whole), low), high) for value in drawn]


def _rounded(value: float, whole: bool) -> float | int:
    return round(value) if whole else float(f"{value:.3g}")


def tried(trials: Sequence[Values], key: str) -> list[float]:
    """The different values of a key, ascending; none if they are not numbers, which have no order."""
    values = {trial[key] for trial in trials if key in trial}
    numbers = [value for value in values if _is_number(value)]
    return sorted(numbers) if len(numbers) == len(values) else []


def edge_distances(trials: Sequence[Values], winner: Values) -> dict[str, int]:
    """By key, how many values were tried beyond the winner's, on the side where they are fewer: 0 is an edge.

    Keys with one value only, or with values that are not numbers, have no edge.
    """
    columns = {key: tried(trials, key) for key in winner}
    below = {
        key: columns[key].index(value) for key, value in winner.items() if _is_number(value) and len(columns[key]) > 1
    }
    return {key: min(count, len(columns[key]) - 1 - count) for key, count in below.items()}


def one_step_beyond(trials: Sequence[Values], winner: Values) -> list[dict[str, Value]]:
    """The winner's values with one of them moved beyond its edge, for each of its edges.

    A step is the mean distance of neighbouring values: a factor if all of them are positive, else a difference.
    """
    found = []
    for key in [key for key, distance in edge_distances(trials, winner).items() if distance == 0]:
        column = tried(trials, key)
        low, high, sign = column[0], column[-1], 1 if winner[key] == column[-1] else -1
        whole = all(isinstance(known, int) for known in column)
        edge, steps = high if sign > 0 else low, len(column) - 1
        beyond = edge * (high / low) ** (sign / steps) if low > 0 else edge + sign * (high - low) / steps
        moved = _rounded(beyond, whole)
        if moved != edge and (moved > 0 or low <= 0):
            found.append({**winner, key: moved})
    return found


def order(values: Values) -> tuple[Any, ...]:
    """A sort key of trials: by their values in turn, numbers first."""
    return tuple((0, value, "") if _is_number(value) else (1, 0, str(value)) for value in values.values())
