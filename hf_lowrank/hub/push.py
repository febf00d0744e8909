"""Pushing a run's checkpoints: everything is checked before anything is sent, and every step can be repeated."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from hf_lowrank.errors import UserError
from hf_lowrank.hub.archive import Archive
from hf_lowrank.hub.bucket import Bucket
from hf_lowrank.hub.callback import Queue, check_states_go_once
from hf_lowrank.hub.publisher import Dense, Job, Publisher
from hf_lowrank.hub.repository import Repository, UnreachedError, check_repo_id, understood
from hf_lowrank.runs.layout import CONFIG, RECIPE
from hf_lowrank.runs.sources import open_source
from hf_lowrank.runs.weights import check_weights

logger = logging.getLogger(__name__)

T = TypeVar("T")
State = Literal["sent", "there"]
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class PushedRevision:
    """The outcome for one checkpoint: its branch `step-N` was "sent" now, or was "there" with the same content."""

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
    bucket: str | None = None,
    public: bool = False,
    license: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    pauses: Sequence[float] = PAUSES,
) -> list[PushedRevision]:
    """Publishes a run's checkpoints as revisions `step-N` of a Hub repository, with `latest`, `main` and the card.

    Unchanged content is not sent again, and an interrupted push is completed. Checkpoints that training left in its
    queue are pushed too.

    Args:
        run: a run directory or a folder of checkpoints.
        repo_id: `user/name`; created if it does not exist.
        steps: only these.
        every: every k-th checkpoint and the last.
        log_spaced: this many, spaced evenly in the logarithm of the step, including the last.
        dense: also push adapted models in their base architecture, to `dense-step-N` ("beside"), or as `step-N`
            ("instead").
        optimizer: also push optimizer state, to `optimizer-step-N`.
        bucket: also store the run in a bucket of the Hub, `user/bucket` or `user/bucket/folder`: every checkpoint, not
            only the chosen ones, with optimizer state; created if it does not exist. Not with `optimizer`.
        public: visible to everyone, where repository or bucket are created now; private otherwise.
        license: of the card, a Hub identifier; None keeps the existing card's, "unknown" on a new one.
        token: None: that of the login.
        endpoint: a Hub other than huggingface_hub's default.
        pauses: seconds before each retry of a failed revision.

    Returns:
        The chosen checkpoints in step order.

    Raises:
        UserError: wrong input or no write access, and nothing was pushed; or some checkpoints are incomplete there,
            which the message names. Repeat the call to complete them.
    """
    check_repo_id(repo_id)
    if dense not in (None, "beside", "instead"):
        raise UserError(f"dense must be 'beside' or 'instead', got {dense!r}")
    check_states_go_once(optimizer, bucket)
    folder = Path(run)
    queue = Queue(folder, repo_id)
    jobs = _choose(_jobs(folder, queue), steps=steps, every=every, log_spaced=log_spaced, run=folder)
    repository = Repository(repo_id, token=token, endpoint=endpoint)
    publisher = Publisher(
        repository, _run_of(folder), private=not public, dense=dense, optimizer=optimizer, license=license
    )
    deliveries = [_Delivery(publisher, queue, jobs, "revisions")]
    if bucket is not None:
        stored = Bucket(bucket, token=token, endpoint=endpoint)
        archive, queue = Archive(stored, _run_of(folder), private=not public), Queue(folder, stored.address)
        deliveries.insert(0, _Delivery(archive, queue, _jobs(folder, queue), "checkpoints"))
    for delivery in deliveries:
        delivery.check()
    for delivery in deliveries:
        destination = delivery.publisher.destination
        try:
            _retry(partial(delivery.publisher.prepare, delivery.jobs[-1]), destination, pauses)
        except UnreachedError as error:
            raise UserError(
                f"{destination}: the Hub was not reached or failed, and no checkpoint was sent: {error}"
            ) from None
    outcomes = [(delivery, *_publish_all(delivery.publisher, delivery.jobs, pauses)) for delivery in deliveries]
    incomplete = [_incomplete(delivery, failed) for delivery, _, failed in outcomes if failed]
    if incomplete:
        raise UserError("; ".join([*incomplete, "repeat the command to complete them"]))
    for delivery in deliveries:
        for job in delivery.jobs:
            delivery.queue.remove(job.step)
    states = outcomes[-1][1]
    return [PushedRevision(job.step, job.branch, states[job.step]) for job in jobs]


@dataclass(frozen=True)
class _Delivery:
    """What goes where: checkpoints, in step order, to a repository or a bucket."""

    publisher: Publisher | Archive
    queue: Queue
    jobs: list[Job]
    noun: str

    def check(self) -> None:
        """Reads everything once, so that nothing is sent of a run with a damaged checkpoint."""
        for job in self.jobs:
            check_weights(job.folder)
        for job in self.jobs:
            self.publisher.contents(job)


def _incomplete(delivery: _Delivery, failed: Mapping[str, str]) -> str:
    count = len(delivery.jobs)
    complete = count - len(failed.keys() - {delivery.publisher.finish})
    reasons = "; ".join(f"{label} ({reason})" for label, reason in failed.items())
    where = delivery.publisher.destination
    return f"{where}: {complete} of {count} {delivery.noun} are complete; incomplete: {reasons}"


def _publish_all(
    publisher: Publisher | Archive, jobs: list[Job], pauses: Sequence[float]
) -> tuple[dict[int, State], dict[str, str]]:
    """Publishes the checkpoints that the Hub lacks, then `main` or the files of the run.

    Returns states by step, and failures by what messages call the checkpoint.
    """
    destination = publisher.destination

    def publish(job: Job) -> State:
        if not publisher.faults(job):
            return "there"
        publisher.publish(job)
        return "sent"

    states: dict[int, State] = {}
    failed: dict[str, str] = {}
    refused = False
    for job in jobs:
        if refused:
            failed[publisher.label(job)] = "not tried"
            continue
        try:
            states[job.step] = _retry(partial(publish, job), destination, pauses)
            logger.info("%s: %s is complete", destination, publisher.label(job))
        except UnreachedError as error:
            failed[publisher.label(job)] = str(error)
            pauses = ()  # one try each for the remaining ones
        except UserError as error:
            failed[publisher.label(job)] = str(error)
            refused = True
    published = [job for job in jobs if publisher.label(job) not in failed]
    if published and not refused:
        try:
            _retry(lambda: publisher.settle(published[-1]), destination, pauses)
        except (UnreachedError, UserError) as error:
            failed[publisher.finish] = str(error)
    return states, failed


def _run_of(folder: Path) -> Path | None:
    """The run directory that a folder is, or belongs to; None for a checkpoint without one."""
    if not (folder / CONFIG).is_file():
        return folder
    parent = folder.resolve().parent
    return parent if (parent / RECIPE).is_file() else None


def _retry(action: Callable[[], T], repo_id: str, pauses: Sequence[float]) -> T:
    """Retries transient failures after each of `pauses`; any other failure is raised as a `UserError` at once."""
    try:
        return action()
    except Exception as error:
        known = understood(error, repo_id)
    if not pauses or not isinstance(known, UnreachedError):
        raise known
    logger.warning("%s: %s; next try in %g s", repo_id, known, pauses[0])
    time.sleep(pauses[0])
    return _retry(action, repo_id, pauses[1:])


def _jobs(folder: Path, queue: Queue) -> list[Job]:
    """Checkpoints in the run directory, and those that are only in the queue."""
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
    available = [job.step for job in jobs]
    if steps is not None:
        missing = [step for step in steps if step not in available]
        if missing or not steps:
            named_steps = ", ".join(map(str, missing)) or "none"
            raise UserError(
                f"{run}: has no checkpoint of step {named_steps}; there are: {', '.join(map(str, available))}"
            )
        return [job for job in jobs if job.step in set(steps)]
    if every is not None:
        if every < 1:
            raise UserError(f"every must be at least 1, got {every}")
        return [job for index, job in enumerate(reversed(jobs)) if index % every == 0][::-1]
    if log_spaced is not None:
        if log_spaced < 1:
            raise UserError(f"log_spaced must be at least 1, got {log_spaced}")
        return [job for job in jobs if job.step in log_spaced_steps(available, log_spaced)]
    return jobs


def log_spaced_steps(steps: Sequence[int], count: int) -> set[int]:
    """The `count` of `steps` nearest to an even spacing in log(1 + step), always including the last."""
    low, high = math.log1p(steps[0]), math.log1p(steps[-1])
    marks = [high] if count == 1 else [low + (high - low) * k / (count - 1) for k in range(count)]
    chosen: set[int] = set()
    for mark in reversed(marks):
        free = [step for step in steps if step not in chosen]
        if free:
            chosen.add(min(free, key=lambda step: (abs(math.log1p(step) - mark), -step)))
    return chosen
