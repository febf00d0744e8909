"""The table of methods: each criterion with its interval over seeds and its rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from hf_lowrank.claims.study import method_order, titles
from hf_lowrank.errors import UserError
from hf_lowrank.formats import byte_size, finite_number, loss_text, signed, significant
from hf_lowrank.runs.records import RunRecord
from hf_lowrank.runs.scores import Score, above_chance, comparable_scores, shared_tasks
from hf_lowrank.statistics import SEEDS_FOR_A_VERDICT, Estimate, mean_difference, mean_interval

BASELINE = "full_rank"
Values = dict[str, dict[int, float]]  # method -> seed -> value


@dataclass(frozen=True)
class Criterion:
    """One column of the table of methods.

    Attributes:
        id, title, unit, help: as shown; `help` says where the value comes from.
        better: which way is better.
        values: per run, what was read.
        text: a value as read.
        against: how a method is compared with the baseline: as a ratio, as a difference, or not at all.
        shown: maps mean and interval for showing, as the exponential for perplexity, whose mean is taken in nats.
    """

    id: str
    title: str
    unit: str
    help: str
    better: Literal["lower", "higher"]
    values: Mapping[str, float]
    text: Callable[[float], str]
    against: Literal["ratio", "log", "difference", "none"] = "ratio"
    shown: Callable[[float], float] = float


@dataclass(frozen=True)
class Standing:
    """One cell: `value` with its interval and rank among methods, or a `note` on why there is none.

    `tied`: statistically tied with the best. `certain`: there are enough seeds for a verdict.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    text: str = "—"
    interval: str = ""
    rank: int | None = None
    tied: bool = False
    certain: bool = False
    note: str = ""
    beside: str = ""
    beside_interval: str = ""


@dataclass(frozen=True)
class MethodRow:
    method: str
    title: str
    seeds: int
    standings: tuple[Standing, ...]


@dataclass(frozen=True)
class Standings:
    """The table: criteria in columns, methods in rows, best loss first; `baseline` is what they are compared with."""

    criteria: tuple[Criterion, ...]
    rows: tuple[MethodRow, ...]
    notes: tuple[str, ...]
    baseline: str

    @property
    def baseline_title(self) -> str:
        """Its title; empty if the baseline is not among the methods."""
        return next((row.title for row in self.rows if row.method == self.baseline), "")


def by_seed(runs: Sequence[RunRecord], values: Mapping[str, float]) -> Values:
    """Values by method and seed, repetitions of a seed averaged; a run without a seed counts as one (negative)."""
    found: dict[str, dict[int, list[float]]] = {}
    for position, run in enumerate(runs):
        if run.name in values:
            seed = run.seed if run.seed is not None else -1 - position
            found.setdefault(run.method, {}).setdefault(seed, []).append(values[run.name])
    return {method: {seed: fmean(several) for seed, several in seeds.items()} for method, seeds in found.items()}


def final_losses(runs: Sequence[RunRecord]) -> dict[str, float]:
    """The final loss of each run that has one."""
    return {run.name: loss for run in runs if (loss := run.final_loss) is not None}


def _comparable(runs: Sequence[RunRecord]) -> tuple[dict[str, list[Score]], int | None]:
    return comparable_scores({run.name: run.scores for run in runs})


def downstream(runs: Sequence[RunRecord]) -> tuple[dict[str, dict[int, float]], list[str]]:
    """Per run and step the mean above-chance score over the tasks that all scored runs have; and notes about it."""
    notes: list[str] = []
    scored, _ = _comparable(runs)
    if not scored:
        tried = any(run.scores for run in runs)
        return {}, ["Downstream: no score with a known chance level on enough of a task's items."] if tried else []
    try:
        return dict(above_chance(scored, notes)), [f"Downstream: {note}." for note in notes]
    except UserError as error:
        return {}, [f"Downstream: {error}."]


def _downstream(runs: Sequence[RunRecord], notes: list[str]) -> Criterion:
    means, said = downstream(runs)
    notes += said
    last = {name: steps[max(steps)] for name, steps in means.items() if steps}
    if len({max(steps) for steps in means.values() if steps}) > 1:
        notes.append("Downstream: the runs were last scored at different steps.")
    scored, limit = _comparable(runs)
    tasks = ", ".join(shared_tasks(scored, [])) or "the tasks"
    tasks += "" if limit is None else f", the first {limit} items of each"
    help_ = (
        f"Mean above-chance score over {tasks}: 0 is guessing, 1 is every item right; at the last checkpoint. Higher "
        "is better."
    )
    return Criterion("downstream", "Downstream", "above chance", help_, "higher", last, loss_text, "difference")


_MEMORY_KINDS = {
    "measured_peak": "Peak of weights, gradients, optimizer state and activations as measured in training.",
    "estimated_peak": "Peak of weights, gradients, optimizer state and activations as estimated; it was not measured "
    "in all of these runs.",
}


def _memory(runs: Sequence[RunRecord]) -> Criterion:
    """One kind for all rows: the most informative that every run has."""
    recorded = {run.name: found for run in runs if isinstance(found := run.facts.get("memory"), Mapping)}
    for kind, help_ in _MEMORY_KINDS.items():
        values = {name: v for name, found in recorded.items() if (v := finite_number(found.get(kind))) is not None}
        if values and len(values) == len(runs):
            unit = kind.removesuffix("_peak")
            return Criterion("memory", "Memory", unit, help_ + " Lower is better.", "lower", values, byte_size)
    help_ = "Weights, at four bytes each, and optimizer state; gradients and activations come on top. Lower is better."
    values = {
        run.name: state + 4 * parameters
        for run in runs
        if (state := run.fact("optimizer_state_bytes")) is not None
        and (parameters := run.fact("parameters")) is not None
    }
    return Criterion("memory", "Memory", "weights + state", help_, "lower", values, byte_size)


def _speed(runs: Sequence[RunRecord]) -> Criterion:
    def tokens_per(key: str) -> dict[str, float]:
        found = {run.name: (run.fact("tokens_seen"), run.fact(key)) for run in runs}
        return {name: tokens / seconds for name, (tokens, seconds) in found.items() if tokens and seconds}

    values = tokens_per("cpu_seconds")
    if len(values) == len(runs) and all(run.facts.get("device") == "cpu" for run in runs):
        unit = "tokens / CPU s"
        help_ = "Training tokens per second of processor time, which other work on the machine hardly changes."
    else:
        unit, values = "tokens / s", tokens_per("training_seconds")
        help_ = "Training tokens per second of the optimizer steps, on the machine that each run had."
    return Criterion("speed", "Speed", unit, help_ + " Higher is better.", "higher", values, significant)


def _distance(runs: Sequence[RunRecord]) -> tuple[Criterion, dict[str, float]]:
    def last(metric: str) -> dict[str, float]:
        rows = {run.name: row for run in runs if (row := run.last(metric)) is not None}
        return {name: value for name, row in rows.items() if (value := finite_number(row.value)) is not None}

    help_ = (
        "Distance of the hidden states from the baseline's on the same tokens, relative to the baseline's norm, mean "
        "over layers, at the last checkpoint. Lower is closer, not better in itself."
    )
    cka = {name: 1 - value for name, value in last("activation_cka").items()}
    values = last("activation_l2")
    return Criterion("distance", "Distance", "from baseline", help_, "lower", values, significant, "none"), cka


def standings(runs: Sequence[RunRecord], baseline: str = BASELINE) -> Standings:
    """The table of methods for runs that may be compared: one evaluation set, one size.

    `baseline` names the method that the others are compared with.
    """
    notes: list[str] = []
    losses = final_losses(runs)
    distance, cka = _distance(runs)
    perplexity = Criterion(
        "perplexity", "Perplexity", "", "The exponential of the mean validation loss over seeds. Lower is better.",
        "lower", losses, significant, "log", perplexity_of,
    )  # fmt: skip
    loss = Criterion(
        "loss", "Loss", "nats", "Final validation loss per token, mean over seeds. Lower is better.",
        "lower", losses, loss_text, "difference",
    )  # fmt: skip
    all_of_them = (perplexity, loss, _downstream(runs, notes), _memory(runs), _speed(runs), distance)
    criteria = tuple(criterion for criterion in all_of_them if criterion.values)
    title = titles(run.method for run in runs)
    seeds = {name: len({run.seed if run.seed is not None else run.name for run in runs if run.method == name})
             for name in title}  # fmt: skip
    cells = {criterion.id: _column(criterion, runs, title, baseline) for criterion in criteria}
    if "distance" in cells:
        _with_cka(cells["distance"], runs, cka)
    order = {name: fmean(values.values()) for name, values in by_seed(runs, losses).items()}
    names = sorted(title, key=lambda name: (name not in order, order.get(name, 0.0), method_order(name)))
    rows = tuple(
        MethodRow(name, title[name], seeds[name], tuple(cells[criterion.id][name] for criterion in criteria))
        for name in names
    )
    return Standings(criteria, rows, tuple(notes), baseline)


def perplexity_of(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _column(
    criterion: Criterion, runs: Sequence[RunRecord], methods: Mapping[str, str], baseline: str
) -> dict[str, Standing]:
    values = by_seed(runs, criterion.values)
    estimates = {name: mean_interval(list(seeds.values())) for name, seeds in values.items()}
    sign = 1.0 if criterion.better == "lower" else -1.0
    order = sorted(estimates, key=lambda name: (sign * estimates[name].value, method_order(name)))
    certain = len(order) > 1 and min(len(values[name]) for name in order) >= SEEDS_FOR_A_VERDICT
    found: dict[str, Standing] = {}
    for name in methods:
        if name not in estimates:
            baselines = {row.baseline for run in runs for row in run.rows if row.baseline}
            is_baseline = criterion.id == "distance" and (name == baseline or name in baselines)
            found[name] = Standing(note="the others are compared with it" if is_baseline else "not recorded")
            continue
        tied = certain and name != order[0] and not beaten(values, order[0], name, sign, len(order) - 1)
        one = _standing(criterion, estimates[name], 1 + order.index(name), tied, certain)
        found[name] = _beside(one, criterion, values, name, baseline)
    if certain and any(standing.tied for standing in found.values()):
        found = {name: _shared_first(standing) for name, standing in found.items()}
    return found


def beaten(values: Values, best: str, other: str, sign: float, rivals: int) -> bool:
    """Whether `other` is significantly worse than `best`: the interval of their difference, paired by seed and widened
    for the number of rivals (Bonferroni), excludes zero."""
    ours, theirs = ({seed: sign * value for seed, value in values[name].items()} for name in (best, other))
    difference = mean_difference(ours, theirs, confidence=1 - 0.05 / max(rivals, 1))
    return difference is not None and difference.low > 0


def _shared_first(standing: Standing) -> Standing:
    if standing.rank == 1:
        return replace(standing, tied=True)
    return replace(standing, rank=1) if standing.tied else standing


def _standing(criterion: Criterion, estimate: Estimate, rank: int, tied: bool, certain: bool) -> Standing:
    value = criterion.shown(estimate.value)
    one = Standing(value=value, n=estimate.n, text=criterion.text(value), rank=rank, tied=tied, certain=certain)
    if not estimate.has_interval:
        return replace(one, note="one seed, no interval")
    low, high = criterion.shown(estimate.low), criterion.shown(estimate.high)
    spread = high - low > abs(value) * 1e-6
    interval = f"{criterion.text(low)} – {criterion.text(high)}" if spread else "equal for all seeds"
    return replace(one, low=low, high=high, interval=interval)


def _beside(standing: Standing, criterion: Criterion, values: Values, name: str, baseline: str) -> Standing:
    """`standing` with the comparison of `name` with the baseline: a share or a difference, with its interval."""
    if criterion.against == "none" or baseline not in values:
        return standing
    if name == baseline:
        return replace(standing, beside="baseline")
    found = versus(criterion, values, name, baseline)
    if found is None:
        return standing

    def write(value: float) -> str:
        if criterion.against == "difference":
            return signed(value, criterion.text)
        return signed(100 * value, lambda share: significant(share, 2)) + " %"

    interval = f"{write(found.low)} to {write(found.high)}" if found.has_interval else ""
    if found.has_interval and not found.high - found.low > 1e-9:
        interval = "equal for all seeds"
    return replace(standing, beside=write(found.value), beside_interval=interval)


def versus(
    criterion: Criterion, values: Values, name: str, baseline: str, confidence: float = 0.95
) -> Estimate | None:
    """`name` against the baseline: a share (0.04 is 4 % more) or a difference; the interval is paired by seed."""
    as_log = criterion.against == "ratio"

    def turned(method: str) -> dict[int, float]:
        return {seed: math.log(v) if as_log else v for seed, v in values[method].items() if not as_log or v > 0}

    ours, base = turned(name), turned(baseline)
    if not ours or not base:
        return None
    found = mean_difference(base, ours, confidence)
    if found is None:
        common = sorted(set(ours) & set(base))
        pairs = [(ours[s], base[s]) for s in common] or [(fmean(ours.values()), fmean(base.values()))]
        found = Estimate(fmean(a - b for a, b in pairs), math.nan, math.nan, 1)
    if criterion.against == "difference":
        return found
    return Estimate(math.expm1(found.value), math.expm1(found.low), math.expm1(found.high), found.n)


def _with_cka(cells: dict[str, Standing], runs: Sequence[RunRecord], cka: Mapping[str, float]) -> None:
    for name, values in by_seed(runs, cka).items():
        if name in cells and cells[name].value is not None:
            said = f"1 − CKA {significant(fmean(values.values()))}"
            cells[name] = replace(cells[name], note=", ".join(filter(None, [said, cells[name].note])))
