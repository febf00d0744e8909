"""The runs of a study by method and seed, the methods' titles, and which of their numbers are comparable."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

from hf_lowrank.errors import UserError
from hf_lowrank.methods import METHODS, registered
from hf_lowrank.runs.measurements import Measurement
from hf_lowrank.runs.records import RunRecord, load_runs
from hf_lowrank.statistics import SEEDS_FOR_A_VERDICT

Value = TypeVar("Value")
Key = TypeVar("Key", bound=Any)


def method_order(name: str) -> tuple[int, str]:
    """A sort key that follows the order of METHODS, other names last."""
    return (list(METHODS).index(name), name) if registered(name) else (len(METHODS), name)


def in_order(methods: Iterable[str]) -> list[str]:
    """The distinct names in the order of tables and legends."""
    return sorted(set(methods), key=method_order)


def titles(methods: Iterable[str]) -> dict[str, str]:
    """The title of each of `methods`, in the order of tables and legends."""
    return {name: entry.title if (entry := registered(name)) else name for name in in_order(methods)}


@dataclass(frozen=True)
class Study:
    """Runs that may be compared.

    Attributes:
        runs: by method and seed.
        baseline: the method that the others are compared with.
        alpha: of every test; intervals have confidence 1 − alpha.
        titles: the methods' titles, in the order of tables.
        notes: why a run was left out, by method.
    """

    runs: Mapping[tuple[str, int], RunRecord]
    baseline: str
    alpha: float
    titles: Mapping[str, str]
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def others(self) -> list[str]:
        """The methods other than the baseline."""
        return [method for method in self.titles if method != self.baseline]

    @property
    def confidence(self) -> float:
        return 1.0 - self.alpha

    @cached_property
    def baseline_names(self) -> frozenset[str]:
        """The names of the baseline's runs in rows that compare with it."""
        return frozenset(run.path.resolve().name for (m, _), run in self.runs.items() if m == self.baseline)

    @property
    def no_baseline(self) -> str | None:
        """Why nothing can be compared with the baseline; None where it can."""
        if self.baseline not in self.titles:
            return f"no run of the baseline {self.baseline}"
        if self.baseline not in {method for method, _ in self.runs}:
            return f"no run of the baseline {self.baseline} has a seed for pairing"
        return None if self.others else "no method other than the baseline"

    def title(self, method: str) -> str:
        return self.titles.get(method, method)

    def pair_title(self, pair: tuple[str, str]) -> str:
        return f"{self.title(pair[0])} – {self.title(pair[1])}"


@dataclass(frozen=True)
class Common(Generic[Key, Value]):
    """Numbers at one step, measured with the same settings.

    Attributes:
        step: 0 where there are none.
        kind: the settings that they share, as JSON.
        values: by what is compared (a method, a pair), then by seed.
        missing: why the others are missing.
    """

    step: int = 0
    kind: str = ""
    values: Mapping[Key, Mapping[int, Value]] = field(default_factory=dict)
    missing: Mapping[Key, str] = field(default_factory=dict)


def load_study(
    runs: Iterable[Any],
    *,
    baseline: str,
    alpha: float = 0.05,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int | None] | None = None,
) -> Study:
    """Reads run folders.

    Raises:
        UserError: a folder is not a run; two runs share a method and seed; `alpha` is not in (0, 1); two runs were
            evaluated on different sequences.
    """
    if not 0.0 < alpha < 1.0:
        raise UserError(f"alpha must be between 0 and 1, got {alpha}; 0.05 gives 95 % intervals")
    records = load_runs(runs)
    names = methods if methods is not None else [record.method for record in records]
    pairing = seeds if seeds is not None else [record.seed for record in records]
    for what, given in (("methods", names), ("seeds", pairing)):
        if len(given) != len(records):
            raise UserError(f"{what} must be one for each run, got {len(given)} for {len(records)} runs")
    found: dict[tuple[str, int], RunRecord] = {}
    notes: dict[str, str] = {}
    for name, seed, record in zip(names, pairing, records, strict=True):
        if seed is None:
            notes[name] = f"{record.name} has no seed for pairing"
            continue
        if (other := found.get((name, seed))) is not None:
            raise UserError(
                f"runs must differ in method or seed, got {other.name} and {record.name}, both {name} with seed "
                f"{seed}; give the methods names of their own"
            )
        found[name, seed] = record
    check_evaluations(records)
    return Study(found, baseline, alpha, titles(names), notes)


def check_evaluations(records: Sequence[RunRecord]) -> None:
    """Numbers from different evaluation sequences are never compared.

    Raises:
        UserError: names two runs and their fingerprints.
    """
    marked = [
        (run, {str(row.settings["evaluation"]) for row in run.rows if row.settings.get("evaluation")})
        for run in records
    ]
    for (first, its), (second, marks) in itertools.combinations(marked, 2):
        if its and marks:
            one, other = max(its), max(marks)
            apart = not its & marks
        else:
            one, other = first.fingerprint or "", second.fingerprint or ""
            apart = bool(one and other and one != other)
        if apart:
            raise UserError(
                f"runs must be evaluated on the same sequences to be compared, got {first.name} with fingerprint "
                f"{one[:16]} and {second.name} with {other[:16]}; measure both on one evaluation set"
            )


def kind_of(settings: Mapping[str, Any]) -> str:
    """Settings as a key: what must be equal for numbers to be compared."""
    plain = {name: value for name, value in settings.items() if not isinstance(value, list | dict)}
    return json.dumps(plain, sort_keys=True, default=str)


def common(
    entries: Iterable[tuple[Key, int, int, str, Value]],
    wanted: Sequence[Key],
    reasons: Mapping[Key, str] | None = None,
) -> Common[Key, Value]:
    """The numbers at the last step that all have, measured with the same settings.

    A step counts where everything wanted that has numbers at all has those of at least three seeds (of as many as it
    ever has, if that is fewer): one run that ended early does not take the others back with it. Among several
    settings at that step those of the most runs are taken, the last measured among equals. Step 0, where nothing has
    been trained, never counts.

    Args:
        entries: (what, seed, step, settings as JSON, value).
        wanted: what is to be compared.
        reasons: what was said about numbers that are missing.
    """
    table: dict[tuple[int, str], dict[Key, dict[int, Value]]] = defaultdict(lambda: defaultdict(dict))
    best: dict[Key, int] = {}
    for what, seed, step, kind, value in entries:
        if step > 0 and what in wanted:
            cell = table[step, kind][what]
            cell[seed] = value
            best[what] = max(best.get(what, 0), len(cell))
    missing = {what: (reasons or {}).get(what, "not measured") for what in wanted if what not in best}
    allowed = [
        (step, sum(map(len, cells.values())), place, kind)
        for place, ((step, kind), cells) in enumerate(table.items())
        if all(len(cells.get(what, ())) >= min(SEEDS_FOR_A_VERDICT, count) for what, count in best.items())
    ]
    if not allowed:
        alone = "no step after the first and settings that the others have too"
        return Common(missing={**missing, **dict.fromkeys(best, alone)})
    step, _, _, kind = max(allowed)
    return Common(step, kind, {what: table[step, kind][what] for what in wanted if what in best}, missing)


def model_values(study: Study, metric: str) -> Common[str, float]:
    """A metric of the whole model, by method and seed; what moves weights, on dense ones only."""
    entries: list[tuple[str, int, int, str, float]] = []
    reasons = null_reasons(study, metric)
    for (method, seed), run in study.runs.items():
        for row in run.model_rows(metric):
            if row.has_value and (why := run.not_dense(row)) is not None:
                reasons[method] = why
            elif row.has_value:
                entries.append((method, seed, row.step, kind_of(row.settings), row.value))
    return common(entries, list(study.titles), reasons)


def null_reasons(study: Study, metric: str, keep: Callable[[Measurement], bool] = lambda row: True) -> dict[str, str]:
    """Why a metric is missing, by method: the reason of its last null row, or that a run was left out."""
    found = {
        method: row.reason
        for (method, _), run in study.runs.items()
        for row in run.model_rows(metric)
        if not row.has_value and row.reason and row.step > 0 and keep(row)
    }
    return {**study.notes, **found}


def loss_entries(study: Study, evaluation: str | None = None) -> Iterable[tuple[str, int, int, str, float]]:
    """Measured losses (ln of perplexities where no loss is there), on the sequences `evaluation` only if given."""
    for (method, seed), run in study.runs.items():
        found = {}
        for metric, plain in (("perplexity", math.log), ("loss", float)):
            for row in run.model_rows(metric):
                if row.has_value and (evaluation is None or row.settings.get("evaluation") == evaluation):
                    found[row.step, kind_of(row.settings)] = plain(row.value)
        for (step, kind), value in found.items():
            yield method, seed, step, kind, value


def logged_losses(study: Study) -> Iterable[tuple[str, int, int, str, float]]:
    """Losses logged in training on the whole evaluation set; none unless all runs name the same set."""
    fingerprints = {run.fingerprint for run in study.runs.values()}
    if len(fingerprints) == 1 and None not in fingerprints:
        for (method, seed), run in study.runs.items():
            for step, value in run.logged("eval_loss"):
                yield method, seed, step, "logged", value


def paired_differences(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """`second − first` by the seeds that both have."""
    return {seed: second[seed] - first[seed] for seed in sorted(set(first) & set(second))}
