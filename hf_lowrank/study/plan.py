"""What a study will do, and what that takes: time, disk and memory, recorded by finished runs or probed."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.claims.results import LEARNING_RATE, key_words, read_sweep, value_words
from hf_lowrank.formats import finite_number, join_words
from hf_lowrank.measuring.plan import GROUPS
from hf_lowrank.memory import MemoryEstimate, estimate
from hf_lowrank.memory.simulation import quiet_package
from hf_lowrank.metrics import METRICS
from hf_lowrank.runs.measure_settings import resolve_settings
from hf_lowrank.runs.run_files import read_facts
from hf_lowrank.runs.selection import choose_steps
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json
from hf_lowrank.study.checks import saved_steps
from hf_lowrank.study.layout import ExternalRun, Run, Study, Trial
from hf_lowrank.study.stages import STAGE_TABLE, extensions
from hf_lowrank.study.units import EvaluateUnit, MeasureUnit, PairsUnit, TrainUnit, Unit
from hf_lowrank.training.recipe import Recipe

logger = logging.getLogger(__name__)

# Training holds at least this per parameter: weight, gradient and two moments in float32.
BYTES_PER_PARAMETER = 16
# A model that needs more than this share of the machine's memory is not probed.
MEMORY_SHARE = 0.25
# Below this number of parameters a step takes well under a second.
SMALL = 5_000_000

TIMINGS = ".timings.json"
# Forward passes of an item-based task; where short requests cost as much as long ones.
REQUESTS_PER_TASK = 1200


@dataclass(frozen=True)
class Costs:
    """What training takes: an optimizer step with its batch, a checkpoint, and the peak of memory; None if unknown."""

    step_seconds: float | None = None
    checkpoint_bytes: int | None = None
    memory_bytes: int | None = None


def recorded_costs(folders: Sequence[Path]) -> Costs | None:
    """Costs recorded in run directories; None if there are none.

    The seconds are those of the median run: some may have shared the machine.
    """
    facts = [fact for folder in folders if (fact := read_facts(folder)).get("wall_seconds")]
    if not facts:
        return None
    seconds = sorted(fact["wall_seconds"] / fact["step"] for fact in facts if fact.get("step"))
    last = facts[-1]
    parameters, state = last.get("parameters"), last.get("optimizer_state_bytes") or 0
    return Costs(
        step_seconds=seconds[len(seconds) // 2] if seconds else None,
        checkpoint_bytes=4 * parameters + state if parameters else None,
        memory_bytes=(last.get("memory") or {}).get("measured_peak") or last.get("peak_memory_bytes"),
    )


def probe(recipe: Recipe, threads: int) -> Costs:
    """Estimates memory, and times a batch and an optimizer step unless the model is too large for this machine."""
    with quiet_package():  # an optimizer logs about its groups again when it trains
        vocabulary = recipe.model.get("vocab_size") or recipe.data.vocabulary_size
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = recipe.method.build_model(recipe.config(vocab_size=vocabulary), recipe.settings, recipe.seed)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        memory = _memory(recipe, vocabulary)
        step, machine = None, _machine_memory()
        if machine is None or parameters * BYTES_PER_PARAMETER < MEMORY_SHARE * machine:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                step = _step_seconds(recipe, vocabulary)
            except (RuntimeError, ValueError, TypeError) as error:
                logger.debug("%s: cannot be timed: %s", recipe.name, error)
            finally:
                torch.set_num_threads(before)
    if memory is None:
        return Costs(step, 12 * parameters)
    return Costs(step, memory.weights + memory.optimizer_state, memory.peak)


def _memory(recipe: Recipe, vocabulary: int) -> MemoryEstimate | None:
    try:
        return estimate(recipe, vocabulary_size=None if "vocab_size" in recipe.model else vocabulary)
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        logger.debug("%s: memory cannot be estimated: %s", recipe.name, error)
        return None


def _step_seconds(recipe: Recipe, vocabulary: int) -> float:
    args = recipe.arguments(recipe.path.parent)
    device = args.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model: Any = recipe.method.build_model(recipe.config(vocab_size=vocabulary), recipe.settings, recipe.seed)
        model.to(device).train()
        optimizer = recipe.method.optimizer(model, recipe.settings, args)
        if optimizer is None:
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate)
        small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
        count = min(args.per_device_train_batch_size, 4 if small else 1)
        ids = torch.randint(vocabulary, (count, recipe.data.sequence_length), device=device)
    passes, updates = [], []
    # The first step creates the optimizer state and chooses subspaces; later ones are typical.
    for _ in range(3 if small else 2):
        start = _now()
        model(input_ids=ids, labels=ids).loss.backward()
        middle = _now()
        optimizer.step()
        optimizer.zero_grad()
        passes.append(middle - start)
        updates.append(_now() - middle)
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return min(passes) * sequences / count + min(updates)


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _machine_memory() -> int | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


@dataclass(frozen=True)
class StagePlan:
    """The units of a stage.

    Attributes:
        total, done: units, and how many of them are done.
        seconds: what the others take one after another; None if unknown.
        skipped: why the stage does not run; None if it does.
    """

    stage: str
    total: int
    done: int
    seconds: float | None
    skipped: str | None = None

    @property
    def left(self) -> int:
        """Units still to do."""
        return self.total - self.done


@dataclass(frozen=True)
class MemberPlan:
    """The runs of a member.

    Attributes:
        what: method and learning rate, or where its checkpoints come from.
        runs, done: how many, and how many of them are trained.
        seconds, checkpoints, memory_bytes: of one run; None if unknown.
        checkpoint_bytes: of one checkpoint with its optimizer state.
    """

    member: str
    what: str
    runs: int
    done: int
    seconds: float | None = None
    checkpoint_bytes: int | None = None
    checkpoints: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """What will run.

    Attributes:
        estimates: seconds of each unit to do, by key; None if unknown.
        jobs, threads: units in parallel, and threads of each; a unit of several processes counts for as many.
        disk_bytes: size of the new checkpoints; None if unknown.
        memory_bytes: the most that `jobs` units hold at a time; None if unknown.
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
        """The time of all stages with `jobs` units in parallel; None if nothing is known."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) / self.jobs if known or not self.left else None

    @property
    def left(self) -> int:
        """Units still to do, in all stages."""
        return sum(stage.left for stage in self.stages)


def make_plan(study: Study, stages: Sequence[str], jobs: int, threads: int) -> Plan:
    """Looks up what is done, and estimates the rest; writes nothing."""
    estimator = _Estimator(study, threads)
    estimates: dict[str, float | None] = {}
    planned, seen = [], set[str]()
    for stage in stages:
        if stage in study.skipped:
            planned.append(StagePlan(stage, 0, 0, 0.0, study.skipped[stage]))
            continue
        # As if all runs were trained: they will be when the stage's turn comes.
        units = [unit for batch in STAGE_TABLE[stage].batches for unit in batch(study, study.runs)]
        units = [unit for unit in units if unit.key not in seen]
        seen.update(unit.key for unit in units)
        left = [unit for unit in units if not unit.is_done()]
        estimates |= {unit.key: estimator.seconds(unit) for unit in left}
        known = [value for unit in left if (value := estimates[unit.key]) is not None]
        seconds = sum(known) * len(left) / len(known) if known else (None if left else 0.0)
        planned.append(StagePlan(stage, len(units), len(units) - len(left), seconds))
    trained = set(study.trained_runs())
    members = [estimator.member(name, trained) for name in study.settings.members]
    slots = {name: min(member.processes, jobs) for name, member in study.settings.members.items()}
    peaks = [
        member.memory_bytes // slots[member.member]
        for member in members
        if member.memory_bytes and member.done < member.runs
    ]
    return Plan(
        name=study.settings.name,
        directory=study.directory,
        stages=planned,
        members=members,
        estimates=estimates,
        jobs=jobs,
        threads=threads,
        disk_bytes=estimator.disk_bytes(members, estimates) if "train" in stages or "sweep" in stages else 0,
        memory_bytes=max(peaks, default=0) * jobs or None,
    )


class _Estimator:
    """Estimates units: training by the cost of a step, others by the time that similar units took."""

    def __init__(self, study: Study, threads: int) -> None:
        self._study, self._threads = study, threads
        self._timings = read_timings(study.directory)
        everything: list[Run | Trial] = [*study.runs, *study.trials, *extensions(study)]
        self._edges = {trial.member: trial.at_edges for trial in read_sweep(study.directory) if trial.chosen}
        self._by_name = {run.name: run for run in everything}
        self._costs: dict[str, Costs] = {}
        self._recipes: dict[str, Recipe] = {}

    def recipe(self, member: str) -> Recipe:
        if member not in self._recipes:
            self._recipes[member] = self._study.recipe(self._study.runs_of(member)[0])
        return self._recipes[member]

    def costs(self, member: str) -> Costs:
        if member not in self._costs:
            folders = [run.folder for run in self._by_name.values() if run.member == member]
            self._costs[member] = recorded_costs(folders) or probe(self.recipe(member), self._threads)
        return self._costs[member]

    def seconds(self, unit: Unit) -> float | None:
        run = self._by_name.get(unit.name.split(" ")[0])
        if isinstance(unit, TrainUnit) and run is not None:
            step = self.costs(run.member).step_seconds
            steps = self._study.recipe(run).training.get("max_steps")
            done = read_facts(run.folder).get("step", 0) if run.folder.exists() else 0
            return None if step is None or not steps else step * max(steps - done, 0)
        pairs = isinstance(unit, PairsUnit)
        known = [(key.split(" ")[0], key.endswith(" pairs"), seconds) for key, seconds in self._timings.items()]
        similar = sorted(seconds for stage, of_pairs, seconds in known if (stage, of_pairs) == (unit.stage, pairs))
        if similar:
            return similar[len(similar) // 2]
        if not isinstance(run, Run) or isinstance(run, ExternalRun):
            return None
        passes, step = self._forward_passes(unit, self.recipe(run.member)), self.costs(run.member).step_seconds
        training = self.recipe(run.member).training
        batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
        # A training step has a forward pass, and a backward pass that takes twice as long.
        return None if step is None or passes is None else passes * step / batch / 3

    def _forward_passes(self, unit: Unit, recipe: Recipe) -> float | None:
        """Forward passes of one sequence when a run is measured or scored, which is most of the work."""
        saved, settings = saved_steps(recipe), self._study.settings
        if saved is None:
            return None
        if isinstance(unit, EvaluateUnit):
            from hf_lowrank.downstream.catalogue import expand_tasks, wanted_tasks

            tasks = len(expand_tasks(wanted_tasks(settings.evaluate.tasks))[0])
            requests = min(settings.evaluate.limit or REQUESTS_PER_TASK, REQUESTS_PER_TASK)
            return requests * tasks * len(choose_steps(saved, settings.evaluate.steps, "all"))
        if not isinstance(unit, MeasureUnit):
            return None
        measure = settings.measure
        resolved = resolve_settings(measure.preset, measure.settings)
        sequences = min(resolved.sequences or recipe.data.evaluation_sequences, recipe.data.evaluation_sequences)
        if isinstance(unit, PairsUnit):
            steps = len(choose_steps(saved, measure.pairs, "all"))
            return sequences * steps * len(unit.baselines) * (GROUPS["method"].evaluations(resolved) + 1)
        passes = 0
        for group in {METRICS[metric].group for metric in METRICS.select(measure.metrics)}:
            chosen = choose_steps(saved, measure.steps, resolved.steps if GROUPS[group].costly else "all")
            passes += GROUPS[group].evaluations(resolved) * len(chosen)
        return sequences * passes

    def member(self, name: str, trained: set[Run]) -> MemberPlan:
        runs = self._study.runs_of(name)
        done = sum(run in trained for run in runs)
        if isinstance(runs[0], ExternalRun):
            more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
            return MemberPlan(name, runs[0].source + more, len(runs), done)
        recipe, costs = self.recipe(name), self.costs(name)
        steps, saved = recipe.training.get("max_steps"), saved_steps(recipe)
        processes = self._study.settings.members[name].processes
        shared = f", {processes} processes" if processes > 1 else ""
        return MemberPlan(
            name,
            f"{recipe.method.name}, {self._values(name, recipe)}{shared}",
            len(runs),
            done,
            costs.step_seconds * steps if costs.step_seconds is not None and steps else None,
            costs.checkpoint_bytes,
            len(saved) if saved else None,
            costs.memory_bytes and costs.memory_bytes * processes,
        )

    def _values(self, name: str, recipe: Recipe) -> str:
        """The learning rate of a member, or what its sweep chooses."""
        study, rate = self._study, recipe.training.get("learning_rate")
        sweep, member = study.settings.sweep, study.settings.members[name]
        swept = sweep is not None and member.is_swept
        if name in study.waiting and sweep is not None:
            return f"{join_words([key_words(key) for key in sweep.ranges(member)])} from the sweep"
        values = dict(study.winners.get(name, {})) if swept else {}
        at_edge = [key_words(key) for key in self._edges.get(name, ()) if key in values]
        said = f", at the edge of {join_words(at_edge)}" if at_edge else ""
        return value_words({LEARNING_RATE: rate or "default", **values}) + said

    def disk_bytes(self, members: Sequence[MemberPlan], left: Mapping[str, float | None]) -> int | None:
        """Bytes of the checkpoints of the runs and trials that are not done."""
        total = 0
        trains = any(key.startswith("train ") for key in left)
        for member in [member for member in members if trains and member.done < member.runs]:
            if not member.checkpoint_bytes or not member.checkpoints:
                return None
            total += (member.runs - member.done) * member.checkpoints * member.checkpoint_bytes
        for trial in [run for run in self._by_name.values() if isinstance(run, Trial)]:
            if f"sweep {trial.name}" in left:
                saved, size = saved_steps(self._study.recipe(trial)), self.costs(trial.member).checkpoint_bytes
                total += len(saved) * size if saved and size else 0
        return total


def read_timings(directory: Path) -> dict[str, float]:
    """Seconds that units of earlier calls took, by key."""
    try:
        timings = parse_json((directory / TIMINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    read = {key: finite_number(value) for key, value in (timings.items() if isinstance(timings, dict) else ())}
    return {key: value for key, value in read.items() if value is not None}


def write_timings(directory: Path, seconds: Mapping[str, float]) -> None:
    """Adds what units took to the recorded timings."""
    if seconds:
        write_text(directory / TIMINGS, json.dumps({**read_timings(directory), **seconds}, indent=1) + "\n")
