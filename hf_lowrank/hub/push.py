"""Pushing a run's checkpoints: everything is checked before anything is sent, and can be repeated."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from huggingface_hub.utils import validate_repo_id

from hf_lowrank.errors import UserError
from hf_lowrank.hub.privacy import one_line
from hf_lowrank.hub.publisher import MAIN, Dense, Job, Publisher
from hf_lowrank.hub.queue import Queue
from hf_lowrank.hub.repository import Repository, UnreachedError, understood
from hf_lowrank.runs.sources import open_source
from hf_lowrank.runs.weights import check_weights

logger = logging.getLogger(__name__)

T = TypeVar("T")
State = Literal["sent", "there"]
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class PushedRevision:
    """What became of one checkpoint.

    Attributes:
        step: its optimizer steps.
        revision: its branch, `step-N`.
        state: sent now, or there already with the same content.
    """

    step: int
    revision: str
    state: State


def push(
    run: str | os.PathLike[str],
    repo_id: str,
    *,
    steps: Sequence[int] | None = None,
    every: int | None = None,
    log_spaced: int | None = None,
    dense: Dense | None = None,
    optimizer: bool = False,
    public: bool = False,
    license: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    pauses: Sequence[float] = PAUSES,
) -> list[PushedRevision]:
    """Publishes a run's checkpoints as revisions `step-N` of a Hub repository, with `latest`, `main` and the card.

    What is there with the same content is not sent again; a push that was broken off is completed. Checkpoints that a
    training left in its queue are pushed too.

    Args:
        run: a run directory or a folder of checkpoints.
        repo_id: `user/name`; it is made if there is none.
        steps: just these.
        every: every k-th checkpoint and the last.
        log_spaced: so many, spaced evenly in the logarithm of the step, the last included.
        dense: adapted models in the plain architecture too, on `dense-step-N` ("beside"), or as `step-N` ("instead").
        optimizer: optimizer state too, on `optimizer-step-N`.
        public: for everyone to see, if the repository is made now; private otherwise.
        license: the card's licence, as a Hub identifier; None keeps the card's, "unknown" on a new one.
        token: None: the login's.
        endpoint: another Hub than huggingface_hub's.
        pauses: seconds before each further try of a revision that failed.

    Returns:
        The chosen checkpoints in step order.

    Raises:
        UserError: wrong input or no right to write, and nothing was pushed; or some revisions are not whole, which
            the message names. The same call again completes them.
    """
    check_repo_id(repo_id)
    if dense not in (None, "beside", "instead"):
        raise UserError(f"dense must be 'beside' or 'instead', got {dense!r}")
    folder = Path(run)
    queue = Queue(folder, repo_id)
    jobs = _choose(_jobs(folder, queue), steps=steps, every=every, log_spaced=log_spaced, run=folder)
    for job in jobs:
        check_weights(job.folder)
    repository = Repository(repo_id, token=token, endpoint=endpoint)
    publisher = Publisher(
        repository,
        _run_of(folder),
        private=not public,
        dense=dense,
        optimizer=optimizer,
        license=license,
    )
    for job in jobs:
        publisher.contents(job)
    _Tries(repository, pauses)(lambda: publisher.prepare(jobs[-1]))
    states, failed = _publish_all(publisher, jobs, pauses)
    if failed:
        whole = len(jobs) - len(failed.keys() - {MAIN})
        reasons = "; ".join(f"{branch} ({reason})" for branch, reason in failed.items())
        raise UserError(
            f"{repo_id}: {whole} of {len(jobs)} revisions are whole, not: {reasons}; "
            "the same command again completes them"
        )
    for job in jobs:
        queue.remove(job.step)
    return [PushedRevision(job.step, job.branch, states[job.step]) for job in jobs]


def _publish_all(
    publisher: Publisher, jobs: list[Job], pauses: Sequence[float]
) -> tuple[dict[int, State], dict[str, str]]:
    """Publishes each checkpoint, then `main`: what became of each, and what failed why."""
    states: dict[int, State] = {}
    failed: dict[str, str] = {}
    tries = _Tries(publisher.repository, pauses)
    refused = False
    for job in jobs:
        if refused:
            failed[job.branch] = "not tried"
            continue
        try:
            states[job.step] = tries(partial(_publish, publisher, job))
            logger.info("%s: %s is whole", publisher.repository.repo_id, job.branch)
        except UnreachedError as error:
            failed[job.branch] = str(error)
            tries = _Tries(publisher.repository, ())  # the Hub has had its time; the others get one try each
        except UserError as error:
            failed[job.branch] = str(error)
            refused = True
    whole = [job for job in jobs if job.branch not in failed]
    if whole and not refused:
        try:
            tries(lambda: publisher.settle(whole[-1]))
        except (UnreachedError, UserError) as error:
            failed[MAIN] = str(error)
    return states, failed


def _publish(publisher: Publisher, job: Job) -> State:
    """Publishes a checkpoint unless it is there. What the Hub has in the end is looked at, not assumed."""
    if not publisher.faults(job):
        return "there"
    publisher.publish(job)
    faults = publisher.faults(job)
    if faults:
        raise UnreachedError(f"the Hub shows something else than was sent: {'; '.join(faults)}")
    return "sent"


def _run_of(folder: Path) -> Path | None:
    """The run directory that a folder is or lies in; None for a checkpoint that came without one."""
    if not (folder / "config.json").is_file():
        return folder
    parent = folder.resolve().parent
    return parent if (parent / "recipe.yaml").is_file() else None


def check_repo_id(repo_id: str) -> None:
    """Raises a `UserError` unless `repo_id` is `user/name` as the Hub allows it."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        shown = one_line(repr(repo_id), limit=100)
        raise UserError(f"{shown}: not a repository id; it must be user/name: {one_line(error)}") from None
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r}: not a repository id; it must be user/name, as somebody/llama-60m-galore")


class _Tries:
    """Repeats what the Hub could not do now, with growing pauses; the rest becomes a clear `UserError` at once."""

    def __init__(self, repository: Repository, pauses: Sequence[float]) -> None:
        self.repository, self.pauses = repository, tuple(pauses)

    def __call__(self, action: Callable[[], T]) -> T:
        for pause in self.pauses:
            try:
                return action()
            except Exception as error:
                known = understood(error, self.repository.repo_id)
                if not isinstance(known, UnreachedError):
                    raise known from None
                logger.warning("%s: %s; next try in %g s", self.repository.repo_id, known, pause)
            time.sleep(pause)
        try:
            return action()
        except Exception as error:
            raise understood(error, self.repository.repo_id) from None


def _jobs(folder: Path, queue: Queue) -> list[Job]:
    """Checkpoints in the run directory, and those that only the queue still has."""
    waiting = {job.step: job for job in queue.jobs()}
    try:
        source = open_source(folder) if folder.is_dir() else None
    except UserError:
        if not waiting:
            raise
        source = None
    if source is None and not waiting:
        raise UserError(f"{folder}: no such run directory")
    found = {} if source is None else {s: Job(s, source.folder(s, weights=True)) for s in source.steps}
    return [{**waiting, **found}[step] for step in sorted({*waiting, *found})]


def _choose(
    jobs: list[Job], *, steps: Sequence[int] | None, every: int | None, log_spaced: int | None, run: Path
) -> list[Job]:
    ways = {"steps": steps, "every": every, "log_spaced": log_spaced}
    named = [name for name, way in ways.items() if way is not None]
    if len(named) > 1:
        raise UserError(f"checkpoints must be chosen in one way, got {' and '.join(named)}")
    there = [job.step for job in jobs]
    if steps is not None:
        missing = [step for step in steps if step not in there]
        if missing or not steps:
            named_steps = ", ".join(map(str, missing)) or "none"
            raise UserError(f"{run}: has no checkpoint of step {named_steps}; there are: {', '.join(map(str, there))}")
        return [job for job in jobs if job.step in set(steps)]
    if every is not None:
        if every < 1:
            raise UserError(f"every must be at least 1, got {every}")
        return [job for place, job in enumerate(reversed(jobs)) if place % every == 0][::-1]
    if log_spaced is not None:
        if log_spaced < 1:
            raise UserError(f"log_spaced must be at least 1, got {log_spaced}")
        return [job for job in jobs if job.step in log_spaced_steps(there, log_spaced)]
    return jobs


def log_spaced_steps(steps: Sequence[int], count: int) -> set[int]:
    """The `count` of `steps` nearest to an even spacing in log(1 + step), the last always among them."""
    low, high = math.log1p(steps[0]), math.log1p(steps[-1])
    marks = [high] if count == 1 else [low + (high - low) * k / (count - 1) for k in range(count)]
    chosen: set[int] = set()
    for mark in reversed(marks):
        free = [step for step in steps if step not in chosen]
        if free:
            chosen.add(min(free, key=lambda step: (abs(math.log1p(step) - mark), -step)))
    return chosen
