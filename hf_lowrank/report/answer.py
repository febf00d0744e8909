"""The answer: which runs can be compared, the tables of runs and methods, and the answer in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from hf_lowrank.claims.results import Trial, key_words
from hf_lowrank.claims.study import method_order, titles
from hf_lowrank.formats import big_count, join_words, loss_text, pluralize, significant
from hf_lowrank.report.run_table import Cell, Column, mixed, table
from hf_lowrank.report.standings import (
    BASELINE,
    Standings,
    beaten,
    by_seed,
    final_losses,
    perplexity_of,
    standings,
    versus,
)
from hf_lowrank.runs.records import RunRecord, finished_or_all
from hf_lowrank.statistics import SEEDS_FOR_A_VERDICT, Estimate, mean_interval

# Unfinished runs that a sentence names.
MOST_NAMED = 4
# Differences of memory and speed below this share are called the same.
SAME = 0.02


@dataclass(frozen=True)
class Group:
    """Runs of one size that were evaluated on the same sequences, so that they can be compared.

    Attributes:
        id: the group's number.
        fingerprint: of the evaluation sequences; None where runs carry none.
        size: width and depth of the models; None where unknown.
        scale: the size in words.
        runs: by final loss, best first, then those without one, then unfinished ones.
        columns: those that at least one run fills.
        cells: one row per run, one cell per column.
        mixed: metrics measured with different settings or at different steps in these runs.
        caution: why the baseline's place may be that of its tuning, to be said before all else; empty where it is not.
        headline, standfirst: the answer in a sentence and its basis: the finished runs, if there are any.
        trade: what is lost and saved compared with the baseline; empty without one.
        standings: the table of methods.
    """

    id: int
    fingerprint: str | None
    size: tuple[int, int] | None
    scale: str
    runs: tuple[RunRecord, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]
    mixed: tuple[str, ...]
    caution: str
    headline: str
    standfirst: str
    trade: str
    standings: Standings


def groups(runs: Sequence[RunRecord], baseline: str = BASELINE, sweep: Sequence[Trial] = ()) -> list[Group]:
    """The runs by evaluation set and size, the largest group first; runs without a set form a group of their own.

    `baseline` names the method that the others are compared with; `sweep` holds the trials that tuned the methods.
    """
    sets: dict[tuple[str | None, tuple[int, int] | None], list[RunRecord]] = {}
    for run in runs:
        sets.setdefault((run.fingerprint, run.size), []).append(run)
    ordered = sorted(
        sets.items(), key=lambda item: (item[0][0] is None, -len(item[1]), item[0][0] or "", item[0][1] or ())
    )
    result = []
    for position, ((fingerprint, size), members) in enumerate(ordered):
        members.sort(key=_rank)
        columns, cells = table(members)
        ranked = finished_or_all(members)
        headline, standfirst = verdict(ranked)
        methods = standings(ranked, baseline)
        result.append(
            Group(
                id=position,
                fingerprint=fingerprint,
                size=size,
                scale=_scale(members, size, baseline),
                runs=tuple(members),
                columns=tuple(columns),
                cells=tuple(cells),
                mixed=mixed(members, columns),
                caution=caution(ranked, sweep, baseline),
                headline=headline,
                standfirst=" ".join([standfirst, *_remarks(members)]),
                trade=trade_off(ranked, methods),
                standings=methods,
            )
        )
    return result


def _rank(run: RunRecord) -> tuple[Any, ...]:
    loss = run.final_loss
    return bool(run.unfinished), loss is None, loss or 0.0, method_order(run.method), run.seed or 0, run.name


def _remarks(runs: Sequence[RunRecord]) -> list[str]:
    """Which runs are unfinished, and at which steps the others end if these differ."""
    behind = [f"{run.name} ({run.unfinished})" for run in runs if run.unfinished]
    more = [f"{len(behind) - MOST_NAMED} more"] if len(behind) > MOST_NAMED else []
    ends = sorted({run.steps[-1] for run in runs if run.steps and not run.unfinished})
    remarks = []
    if behind:
        which = "Unfinished" if len(behind) == len(runs) else "Left out as unfinished"
        remarks.append(f"{which}: {join_words([*behind[:MOST_NAMED], *more])}.")
    if len(ends) > 1:
        remarks.append(f"The runs end at different steps: {join_words([str(step) for step in ends])}.")
    return remarks


def _scale(runs: Sequence[RunRecord], size: tuple[int, int] | None, baseline: str) -> str:
    """`1.32 M parameters, 4 blocks of 128`: of the baseline where it is there, else of the largest."""
    counts = {run.method: count for run in runs if (count := run.fact("parameters")) is not None}
    parts = [f"{big_count(counts.get(baseline, max(counts.values())))} parameters"] if counts else []
    if size is not None:
        parts.append(f"{pluralize(size[1], 'block')} of width {size[0]}")
    return ", ".join(parts) or "size unknown"


def caution(runs: Sequence[RunRecord], sweep: Sequence[Trial], baseline: str) -> str:
    """Says that the baseline, which ends worse than others, was not tuned as well as they were; empty otherwise.

    It was not if they had a sweep and it had none, if they had more trials, or if its winner is at an edge.
    """
    means = {name: fmean(losses.values()) for name, losses in losses_by_method(runs).items()}
    better = [name for name, loss in means.items() if baseline in means and loss < means[baseline]]
    trials = Counter(trial.member for trial in sweep if not trial.extension)
    most = max(better, key=lambda name: trials[name], default=None)
    if most is None:
        return ""
    title = titles(means)
    at_edges = [key for trial in sweep if trial.member == baseline and trial.chosen for key in trial.at_edges]
    if trials[most] > trials[baseline]:
        own = pluralize(trials[baseline], "trial") if trials[baseline] else "no trial"
        reason = f"it had {own} in the sweep, {title[most]} had {trials[most]}"
    elif at_edges:
        keys = join_words([key_words(key) for key in at_edges])
        reason = f"its best {keys} {'is' if len(at_edges) == 1 else 'are'} at the edge of the values tried"
    else:
        return ""
    return f"{title[baseline]}, the baseline, may be behind because of its tuning: {reason}"


def losses_by_method(runs: Sequence[RunRecord]) -> dict[str, dict[int, float]]:
    """Final loss by method and seed; a run without a seed counts as a seed of its own (negative)."""
    return by_seed(runs, final_losses(runs))


def verdict(runs: Sequence[RunRecord]) -> tuple[str, str]:
    """The headline and the sentence under it.

    A method is called better only when both have at least three seeds and the interval of their difference, widened
    for the number of rivals (Bonferroni), leaves out zero.
    """
    losses = losses_by_method(runs)
    means = [(name, mean_interval(list(values.values()))) for name, values in losses.items()]
    ranked = sorted(means, key=lambda pair: (pair[1].value, method_order(pair[0])))
    title = titles(losses)
    if not ranked:
        return "No loss was recorded", "These runs carry no validation loss; what was measured on them follows below."
    best, estimate = ranked[0]
    lowest = _perplexity(estimate.value)
    if len(ranked) == 1:
        return (
            f"{title[best]} reaches perplexity {lowest}",
            f"One method, {pluralize(estimate.n, 'seed')}{_interval_words(estimate)}.",
        )
    fewest, most = (choose(len(found) for found in losses.values()) for choose in (min, max))
    others = len(ranked) - 1
    if fewest < SEEDS_FOR_A_VERDICT:
        few = pluralize(fewest, "seed")
        seeds = f"only {few} of some methods" if most > fewest else f"only {few} per method"
        seeds = "one seed per method" if most == 1 else seeds
        worst, highest = ranked[-1]
        return (
            f"A demonstration with {seeds}: perplexity {lowest} to {_perplexity(highest.value)}",
            f"{title[best]} ends lowest and {title[worst]} highest, {loss_text(highest.value - estimate.value)} nats "
            f"apart. This describes these runs; which method is better takes {SEEDS_FOR_A_VERDICT} seeds or more of "
            "each, tuned alike.",
        )
    rivals = [name for name, _ in ranked[1:]]
    behind = [title[name] for name in rivals if beaten(losses, best, name, 1.0, others)]
    tied = [title[name] for name in rivals if title[name] not in behind]
    seeds = f"{fewest} seeds" if fewest == most else f"{fewest} or more seeds"
    basis = f"Over {seeds} per method, paired where seeds are common, 95 % intervals widened for {others} comparisons."
    if not tied:
        all_others = "every other method" if others > 1 else title[rivals[0]]
        return f"{title[best]} has a lower perplexity than {all_others}: {lowest}", basis
    unclear = join_words(tied) if behind or others < 3 else "any other method"
    headline = f"{title[best]} has the lowest mean perplexity, {lowest}, statistically tied with {unclear}"
    return headline, basis + (f" Its loss is lower than that of {join_words(behind)}." if behind else "")


def _perplexity(loss: float) -> str:
    return significant(perplexity_of(loss))


def _interval_words(estimate: Estimate) -> str:
    if not estimate.has_interval:
        return ""
    return f", 95 % interval {_perplexity(estimate.low)} to {_perplexity(estimate.high)}"


def trade_off(runs: Sequence[RunRecord], table: Standings) -> str:
    """What the best other method and the one with the least memory lose and save, compared with the baseline."""
    criteria = {criterion.id: criterion for criterion in table.criteria}
    if "perplexity" not in criteria or len(table.rows) < 2 or not table.baseline_title:
        return ""
    baseline = table.baseline
    title = {row.method: row.title for row in table.rows}
    values = {name: by_seed(runs, criterion.values) for name, criterion in criteria.items()}
    others = sum(row.method != baseline for row in table.rows)

    def compared(name: str, method: str) -> Estimate | None:
        there = values.get(name, {})
        if method not in there or baseline not in there:
            return None
        return versus(criteria[name], there, method, baseline, 1 - 0.05 / others)

    found = {row.method: lost for row in table.rows if row.method != baseline
             and (lost := compared("perplexity", row.method)) is not None}  # fmt: skip
    if not found:
        return ""
    nearest = min(found, key=lambda name: found[name].value)
    base = "full-rank training" if table.baseline_title == "Full-rank" else table.baseline_title
    parts = [f"Compared with {base}, {title[nearest]} has {_lost(found[nearest])}"]
    saved = compared("memory", nearest)
    quicker = compared("speed", nearest)
    if saved is not None:
        parts[0] += f", with {_more_or_less(saved.value)} memory"
    if quicker is not None:
        times = significant(1 + quicker.value, 2)
        same = abs(quicker.value) < SAME or times == "1.0"
        speed = "about the same speed" if same else f"{times} times the speed"
        parts[0] += f"{' and' if saved is not None else ', with'} {speed}"
    sizes = {name: share.value for name in found if (share := compared("memory", name)) is not None}
    lightest = min(sizes, key=lambda name: (sizes[name], found[name].value), default=nearest)
    if lightest != nearest and sizes[lightest] < min(sizes.get(nearest, 0.0), 0.0) - 0.005:
        less = significant(100 * abs(sizes[lightest]), 2)
        parts.append(f"{title[lightest]} needs the least memory, {less} % less, and has {_lost(found[lightest])}")
    fewest = min(len(seeds) for seeds in values["perplexity"].values())
    text = ". ".join(parts) + "."
    text = text.replace(" %", "\N{NO-BREAK SPACE}%")
    return text if fewest >= SEEDS_FOR_A_VERDICT else f"In these runs: {text[0].lower()}{text[1:]}"


def _lost(share: Estimate) -> str:
    """`a perplexity 4.1 % higher (95 % interval 1.0 to 7.2 %)`."""
    if abs(share.value) < 5e-4:
        return "the same perplexity"
    sign = 1 if share.value >= 0 else -1
    text = f"a perplexity {significant(100 * abs(share.value), 2)} % {'higher' if sign > 0 else 'lower'}"
    if not share.has_interval:
        return text
    low, high = (significant(end, 2) for end in sorted(100 * sign * end for end in (share.low, share.high)))
    return f"{text} (95 % interval {low} to {high} %)"


def _more_or_less(share: float) -> str:
    if abs(share) < SAME:
        return "about the same"
    return f"{significant(100 * abs(share), 2)} % {'more' if share > 0 else 'less'}"


def trained_scale(group: Group) -> str:
    """`1.32 M parameters, 4 blocks of width 128; 2.5 tokens per parameter`."""
    runs = finished_or_all(group.runs)
    shares = [t / p for run in runs if (t := run.fact("tokens_seen")) and (p := run.fact("parameters"))]
    trained = f"; {significant(median(shares), 2)} tokens per parameter" if shares else ""
    return group.scale + trained
