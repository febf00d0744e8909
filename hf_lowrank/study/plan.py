"""What a study will do, and what that will take: time, disk, memory."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lowrank.measuring.groups import GROUPS
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.facts import read_facts
from hf_lowrank.runs.measure_settings import resolve_settings
from hf_lowrank.runs.selection import choose_steps
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json
from hf_lowrank.study import units
from hf_lowrank.study.checks import saved_steps
from hf_lowrank.study.layout import Attempt, Run, Study
from hf_lowrank.study.probe import Costs, probe
from hf_lowrank.study.progress import duration
from hf_lowrank.training.recipe import Recipe

logger = logging.getLogger(__name__)

TIMINGS = ".timings.json"


@dataclass(frozen=True)
class StagePlan:
    """One stage's units.

    Attributes:
        stage: its name.
        total, done: units, and how many of them need not run.
        seconds: what the others take one after the other; None where it is not known.
        left_out: why the stage does not run.
    """

    stage: str
    total: int
    done: int
    seconds: float | None
    left_out: str | None = None


@dataclass(frozen=True)
class MemberPlan:
    """One member's runs.

    Attributes:
        member: its name.
        what: method and rate, or where the checkpoints come from.
        runs, done: how many, and how many are trained.
        seconds: of one run; None where it is not known.
        checkpoint_bytes: of one checkpoint with its optimizer state.
        checkpoints: of one run.
        memory_bytes: the peak of one run; None where it is not known.
    """

    member: str
    what: str
    runs: int
    done: int
    seconds: float | None
    checkpoint_bytes: int | None
    checkpoints: int | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """What will run.

    Attributes:
        name, directory: of the study.
        stages, members: what is to do.
        estimates: seconds of each unit to do, by key; None where nothing is known.
        jobs, threads: how it runs.
        disk_bytes: what will be written beside what is there.
        memory_bytes: the most that `jobs` units hold at once.
    """

    name: str
    directory: Path
    stages: Sequence[StagePlan]
    members: Sequence[MemberPlan]
    estimates: Mapping[str, float | None] = field(repr=False)
    jobs: int
    threads: int
    disk_bytes: int | None
    memory_bytes: int | None

    @property
    def seconds(self) -> float | None:
        """Of the whole, with `jobs` units side by side; None where nothing is known."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) / self.jobs if known or not self.left else None

    @property
    def left(self) -> int:
        """Units to do."""
        return sum(stage.total - stage.done for stage in self.stages)


def make_plan(study: Study, stages: Sequence[str], jobs: int, threads: int) -> Plan:
    """Looks at what is done and estimates the rest; writes nothing."""
    wanted = {stage: _units(study, stage) for stage in stages if stage not in study.left_out}
    timings, costs = read_timings(study.directory), _Costs(study, threads, {"sweep", "train"} & set(stages))
    estimates: dict[str, float | None] = {}
    for stage, found in wanted.items():
        for unit in found:
            if not unit.done:
                estimates[unit.key] = _seconds(study, stage, unit, timings, costs)
    planned = []
    for stage in stages:
        found = wanted.get(stage, [])
        known = [estimates[unit.key] for unit in found if not unit.done]
        seconds = [value for value in known if value is not None]
        whole = sum(seconds) * len(known) / len(seconds) if seconds else (None if known else 0.0)
        done = sum(unit.done for unit in found)
        planned.append(StagePlan(stage, len(found), done, whole, study.left_out.get(stage)))
    members = [_member(study, name, costs) for name in study.settings.members]
    training = [m for m in members if m.memory_bytes is not None and m.done < m.runs]
    return Plan(
        name=study.settings.name,
        directory=study.directory,
        stages=planned,
        members=members,
        estimates=estimates,
        jobs=jobs,
        threads=threads,
        disk_bytes=_disk(study, members, wanted, costs),
        memory_bytes=max((m.memory_bytes or 0 for m in training), default=0) * jobs or None,
    )


def _units(study: Study, stage: str) -> list[units.Unit]:
    """A stage's units as far as they are known before the stages before have run."""
    if stage == "sweep":
        return units.sweep_units(study)
    if stage == "train":
        return units.train_units(study)
    everything = _Everything(**vars(study))
    if stage == "measure":
        return [*units.view_units(study), *units.measure_units(everything), *units.pair_units(everything)]
    if stage == "evaluate":
        return units.evaluate_units(everything)
    return units.result_units(study, stage)


class _Everything(Study):
    """The study as it will be once all its runs are trained."""

    def is_trained(self, run: Run) -> bool:
        return True


class _Costs:
    """What a step of each member costs: from its finished runs, else tried out."""

    def __init__(self, study: Study, threads: int, trains: bool | set[str]) -> None:
        self._study, self._threads, self._trains = study, threads, bool(trains)
        self._costs: dict[str, Costs] = {}
        self._recipes: dict[str, Recipe] = {}

    def recipe(self, member: str) -> Recipe:
        if member not in self._recipes:
            run = self._study.of(member)[0]
            self._recipes[member] = self._study.recipe(run)
        return self._recipes[member]

    def of(self, member: str) -> Costs:
        """The member's costs."""
        if member not in self._costs:
            study = self._study
            folders = [run.folder for run in study.of(member)]
            folders += [attempt.folder for attempt in study.attempts if attempt.member == member]
            facts = [fact for folder in folders if (fact := read_facts(folder)).get("wall_seconds")]
            self._costs[member] = _recorded(facts) if facts else probe(self.recipe(member), self._threads)
        return self._costs[member]


def _recorded(facts: list[dict[str, Any]]) -> Costs:
    """Costs from what finished runs wrote down; the median run, for one may have shared the machine."""
    seconds = sorted(fact["wall_seconds"] / fact["step"] for fact in facts if fact.get("step"))
    last = facts[-1]
    memory = last.get("memory") or {}
    state = last.get("optimizer_state_bytes") or 0
    parameters = last.get("parameters")
    return Costs(
        step_seconds=seconds[len(seconds) // 2] if seconds else None,
        checkpoint_bytes=4 * parameters + state if parameters else None,
        memory_bytes=memory.get("measured_peak") or last.get("peak_memory_bytes"),
    )


def _seconds(study: Study, stage: str, unit: units.Unit, timings: Mapping[str, float], costs: _Costs) -> float | None:
    """What a unit will take: of training from the step's cost, of the rest from units like it that have run."""
    if stage in ("sweep", "train"):
        every: list[Any] = [*study.attempts, *study.runs]
        run = next(run for run in every if run.name == unit.name)
        recipe = study.recipe(run)
        step = costs.of(run.member).step_seconds
        steps = recipe.training.get("max_steps")
        there = read_facts(run.folder).get("step", 0) if run.folder.exists() else 0
        return None if step is None or not steps else step * max(steps - there, 0)
    alike = [
        seconds
        for key, seconds in timings.items()
        if key.split(" ")[0] == unit.stage and key.endswith(" pairs") == unit.key.endswith(" pairs")
    ]
    if alike:
        return sorted(alike)[len(alike) // 2]
    return _first_guess(study, unit, costs) if unit.stage in ("measure", "evaluate") else None


# Of an item-based task; each request is a forward pass, short ones cost as much as long ones here.
REQUESTS_A_TASK = 1200


def _first_guess(study: Study, unit: units.Unit, costs: _Costs) -> float | None:
    """Seconds of measuring or scoring a run before any was: forward passes, the greater part of it."""
    run = next(run for run in study.runs if unit.name.split(" ")[0] == run.name)
    if run.source is not None:
        return None
    recipe, cost = costs.recipe(run.member), costs.of(run.member)
    saved = saved_steps(recipe)
    if cost.step_seconds is None or saved is None:
        return None
    args = recipe.training
    batch = args.get("per_device_train_batch_size", 8) * args.get("gradient_accumulation_steps", 1)
    forward = cost.step_seconds / batch / 3  # the backward pass is twice the forward one
    if unit.stage == "evaluate":
        settings = study.settings.evaluate
        from hf_lowrank.downstream.catalogue import expand_tasks as tasks_of
        from hf_lowrank.downstream.catalogue import wanted_tasks

        tasks = len(tasks_of(wanted_tasks(settings.tasks))[0])
        requests = min(settings.limit or REQUESTS_A_TASK, REQUESTS_A_TASK)
        return forward * requests * tasks * len(choose_steps(saved, settings.steps, "all"))
    measuring = study.settings.measure
    chosen = resolve_settings(measuring.preset, measuring.settings)
    sequences = min(chosen.sequences or recipe.data.evaluation_sequences, recipe.data.evaluation_sequences)
    if "others" in unit.work:
        count = len(choose_steps(saved, measuring.pairs, "all"))
        return forward * sequences * count * len(unit.work["others"]) * (chosen.path.points + 2)
    groups = {METRICS[metric].group for metric in METRICS.select(measuring.metrics)}
    passes = 0
    for group in groups:
        steps = choose_steps(saved, measuring.steps, chosen.steps if GROUPS[group].costly else "all")
        passes += GROUPS[group].evaluations(chosen) * len(steps)
    return forward * sequences * passes


def _member(study: Study, name: str, costs: _Costs) -> MemberPlan:
    runs = study.of(name)
    done = sum(study.is_trained(run) for run in runs)
    if runs[0].source is not None:
        where = runs[0].source + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")
        return MemberPlan(name, where, len(runs), done, None, None, None, None)
    recipe = costs.recipe(name)
    cost = costs.of(name)
    rate = recipe.training.get("learning_rate")
    swept = name in {attempt.member for attempt in study.attempts} and name not in study.rates
    what = f"{recipe.method.name}, rate " + ("from the sweep" if swept else f"{rate:g}" if rate else "default")
    steps = recipe.training.get("max_steps")
    saved = saved_steps(recipe)
    seconds = cost.step_seconds * steps if cost.step_seconds is not None and steps else None
    return MemberPlan(
        name, what, len(runs), done, seconds, cost.checkpoint_bytes, len(saved) if saved else None, cost.memory_bytes
    )


def _disk(
    study: Study, members: Sequence[MemberPlan], wanted: Mapping[str, Sequence[units.Unit]], costs: _Costs
) -> int | None:
    """Bytes of the checkpoints to come."""
    total = 0
    for member in members if "train" in wanted else ():
        if member.checkpoint_bytes and member.checkpoints:
            total += (member.runs - member.done) * member.checkpoints * member.checkpoint_bytes
        elif member.done < member.runs:
            return None
    attempts: dict[str, Attempt] = {attempt.name: attempt for attempt in study.attempts}
    for unit in wanted.get("sweep", ()):
        attempt = attempts[unit.name]
        saved, size = saved_steps(study.recipe(attempt)), costs.of(attempt.member).checkpoint_bytes
        if not unit.done and saved and size:
            total += len(saved) * size
    return total


def read_timings(directory: Path) -> dict[str, float]:
    """Seconds that units of earlier calls took, by key."""
    try:
        timings = parse_json((directory / TIMINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {
        key: float(value)
        for key, value in (timings.items() if isinstance(timings, dict) else ())
        if isinstance(value, int | float) and math.isfinite(value)
    }


def write_timings(directory: Path, seconds: Mapping[str, float]) -> None:
    """Adds what units took to what is known."""
    if seconds:
        write_text(directory / TIMINGS, json.dumps({**read_timings(directory), **seconds}, indent=1) + "\n")


def plan_tables(plan: Plan) -> list[Any]:
    """The plan as rich tables."""
    from rich.table import Table

    members = Table(title=f"{plan.name}: members", title_justify="left")
    for column in ("member", "what", "runs", "trained", "a run", "disk", "memory"):
        members.add_column(
            column, justify="left" if column in ("member", "what") else "right", no_wrap=column != "what"
        )
    for m in plan.members:
        members.add_row(
            m.member, m.what, str(m.runs), str(m.done), _time(m.seconds), _checkpoints(m), size(m.memory_bytes),
        )  # fmt: skip
    stages = Table(title=f"in {plan.directory}, {plan.jobs} at once with {plan.threads} threads each")
    stages.title_justify = "left"
    for column in ("stage", "units", "done", "to do", "takes about"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for s in plan.stages:
        took = s.left_out or _time(None if s.seconds is None else s.seconds / min(plan.jobs, max(s.total - s.done, 1)))
        stages.add_row(s.stage, str(s.total), str(s.done), str(s.total - s.done), took)
    whole = f"in all about {_time(plan.seconds)}, {size(plan.disk_bytes)} of disk"
    whole += f", up to {size(plan.memory_bytes)} of memory at once" if plan.memory_bytes else ""
    return [members, stages, whole]


def _checkpoints(member: MemberPlan) -> str:
    if not member.checkpoints or not member.checkpoint_bytes:
        return "–"
    return f"{member.checkpoints} × {size(member.checkpoint_bytes)}"


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else duration(seconds)


def size(count: int | None) -> str:
    """Bytes as people say them."""
    if not count:
        return "–" if count is None else "0"
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
