"""Pushing during training: each save adds the checkpoint to a queue on disk, and a thread empties it.

A repository and a bucket have a queue and a thread each.

An entry of the queue is a folder of hard links (copies where the disk has none), so that it survives Trainer's
`save_total_limit` at no cost. It appears with one rename, so that a killed process leaves a complete entry or none.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import UserError
from hf_lowrank.hub.archive import Archive
from hf_lowrank.hub.bucket import Bucket
from hf_lowrank.hub.contents import CHECKPOINT_FILES, state_paths
from hf_lowrank.hub.privacy import one_line
from hf_lowrank.hub.publisher import Dense, Job, Publisher
from hf_lowrank.hub.repository import Repository, UnreachedError, check_repo_id, understood
from hf_lowrank.runs.checkpoints import weight_files
from hf_lowrank.runs.layout import checkpoint_folder
from hf_lowrank.runs.weights import check_weights

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 2.0, 600.0
TRIES_AT_END = 4
FOLDER = "push-queue"
ENTRY = re.compile(r"checkpoint-(0|[1-9][0-9]*)")  # as `add` names them; \d would also match digits of other scripts
SCRAP = ".scrap-"


class PushRevisionsCallback(TrainerCallback):
    """Publishes every checkpoint that a Trainer saves as a revision `step-N` of a Hub repository.

    It does not delay training: a save costs hard links, the rest runs in a thread. Failures are warnings; the
    checkpoint waits in `push-queue/` of the output folder for the next save, the next run, or `hf-lowrank push`.

    Args:
        repo_id: `user/name`; created if it does not exist.
        every: every k-th save; the others go only to the bucket, if there is one.
        bucket: `user/bucket` or `user/bucket/folder` on the Hub, which stores every save with its optimizer state.
        dense, optimizer, public, license, token, endpoint: as for `push`.
        wait_at_end: how many seconds the end of training waits for pending uploads.
        first_pause: seconds before the first retry; each further pause is twice as long.

    Raises:
        UserError: `repo_id` or `bucket` is malformed; raised by the constructor, before training.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        every: int = 1,
        bucket: str | None = None,
        dense: Dense | None = None,
        optimizer: bool = False,
        public: bool = False,
        license: str | None = None,
        token: str | None = None,
        endpoint: str | None = None,
        wait_at_end: float = 3600.0,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        check_repo_id(repo_id)
        check_states_go_once(optimizer, bucket)
        if every < 1:
            raise UserError(f"every must be at least 1, got {every}")
        self.repo_id, self.every, self.optimizer, self.wait_at_end = repo_id, every, optimizer, wait_at_end
        self._options = {"private": not public, "dense": dense, "optimizer": optimizer, "license": license}
        self._token, self._endpoint, self._first_pause = token, endpoint, first_pause
        self._bucket = None if bucket is None else Bucket(bucket, token=token, endpoint=endpoint)
        self._saves = 0
        self._revisions: QueueWorker | None = None
        self._archive: QueueWorker | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            self._start(args)
        except Exception as error:
            logger.warning("%s: cannot push the queue now: %s", self.repo_id, one_line(error))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._saves += 1
        chosen = (self._saves - 1) % self.every == 0
        try:
            self._start(args)
        except Exception as error:
            logger.warning("%s: cannot queue step %d: %s", self.repo_id, state.global_step, one_line(error))
        checkpoint = checkpoint_folder(Path(str(args.output_dir)), state.global_step)
        if self._archive is not None:
            self._archive.add(checkpoint, state.global_step, optimizer=True)
        if self._revisions is not None and chosen:
            self._revisions.add(checkpoint, state.global_step, optimizer=self.optimizer)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        deadline = time.monotonic() + self.wait_at_end
        for worker in (self._archive, self._revisions):
            if worker is not None:
                worker.end()
        for worker in (self._archive, self._revisions):
            if worker is not None:
                worker.finish(max(0.0, deadline - time.monotonic()))
        self._archive = self._revisions = None

    def _start(self, args: TrainingArguments) -> None:
        run = Path(str(args.output_dir))
        if self._revisions is None:
            repository = Repository(self.repo_id, token=self._token, endpoint=self._endpoint)
            publisher = Publisher(repository, run, **self._options)  # type: ignore[arg-type]
            self._revisions = QueueWorker(Queue(run, self.repo_id), publisher, self._first_pause)
            self._revisions.start()
        if self._bucket is not None and self._archive is None:
            archive = Archive(self._bucket, run, private=bool(self._options["private"]))
            self._archive = QueueWorker(Queue(run, self._bucket.address), archive, self._first_pause)
            self._archive.start()


def check_states_go_once(optimizer: bool, bucket: str | None) -> None:
    """Raises a `UserError` for optimizer states both as revisions and in a bucket."""
    if optimizer and bucket is not None:
        raise UserError(
            "optimizer states go to the bucket, so they cannot also be revisions; choose optimizer or bucket, not both"
        )


class Queue:
    """The push queue of one run directory and one repository, or one folder of a bucket, as `hf://buckets/…`."""

    def __init__(self, run: Path, destination: str) -> None:
        self.folder = run / FOLDER / destination.removeprefix("hf://").replace("/", "--")

    def jobs(self) -> list[Job]:
        """The waiting checkpoints, in step order."""
        if not self.folder.is_dir():
            return []
        entries = [(ENTRY.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted((Job(int(m[1]), path) for m, path in entries if m), key=lambda job: job.step)

    def add(self, checkpoint: Path, step: int, *, optimizer: bool = False) -> None:
        """Adds a checkpoint to the queue, replacing an entry of the same step."""
        states = state_paths(checkpoint) if optimizer else []
        scrap = self._scrap()
        scrap.mkdir(parents=True)
        names = {path.name for path in set(weight_files(checkpoint).values())} | set(CHECKPOINT_FILES)
        names.update(path.name for path in states)
        for name in sorted(names):
            if (checkpoint / name).is_file():
                _link(checkpoint / name, scrap / name)
        self.remove(step)
        os.replace(scrap, checkpoint_folder(self.folder, step))

    def remove(self, step: int) -> None:
        """Removes an entry, if it exists."""
        entry = checkpoint_folder(self.folder, step)
        if entry.is_dir():
            # Rename first: a killed removal leaves no partial entry.
            scrap = self._scrap()
            os.replace(entry, scrap)
            shutil.rmtree(scrap, ignore_errors=True)

    def set_aside(self, step: int) -> Path:
        """Moves an entry that can never be pushed out of the queue; returns its new folder."""
        aside = self.folder / f"refused-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint_folder(self.folder, step), aside)
        return aside

    def clean(self) -> None:
        """Removes leftovers of killed processes."""
        for scrap in self.folder.glob(f"{SCRAP}*"):
            shutil.rmtree(scrap, ignore_errors=True)

    def _scrap(self) -> Path:
        return self.folder / f"{SCRAP}{uuid.uuid4().hex}"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class QueueWorker:
    """Empties a queue in a thread, whatever the Hub or the network does."""

    def __init__(self, queue: Queue, publisher: Publisher | Archive, first_pause: float = FIRST_PAUSE) -> None:
        self.queue, self.publisher, self.first_pause = queue, publisher, first_pause
        self.destination = publisher.destination
        self._wake, self._ending = threading.Event(), threading.Event()
        self._settled = False
        # A daemon: a hanging connection must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="push-revisions", daemon=True)

    def start(self) -> None:
        # Before the first save, so that no unfinished entry is mistaken for a leftover.
        self.queue.clean()
        self._thread.start()
        self._wake.set()

    def add(self, checkpoint: Path, step: int, *, optimizer: bool) -> None:
        """Adds a checkpoint to the queue and ends the current pause; a failure is a warning."""
        try:
            self.queue.add(checkpoint, step, optimizer=optimizer)
        except Exception as error:  # whatever it is (a full disk, a damaged checkpoint), training continues
            logger.warning("%s: cannot queue step %d: %s", self.destination, step, one_line(error))
        self._wake.set()

    def end(self) -> None:
        """Says that there will be no further checkpoints."""
        self._ending.set()
        self._wake.set()

    def finish(self, seconds: float) -> None:
        """Waits at most `seconds` for uploads to end; warns about checkpoints left in the queue."""
        self.end()
        self._thread.join(seconds)
        left = ", ".join(self.publisher.label(job) for job in self.queue.jobs())
        if left:
            logger.warning(
                "%s: not pushed yet: %s; they wait in %s; `hf-lowrank push` or the next training run completes them",
                self.destination,
                left,
                one_line(self.queue.folder.name),
            )

    def _work(self) -> None:
        failures, tries_left = 0, TRIES_AT_END
        while True:
            ending = self._ending.is_set()
            self._wake.clear()
            try:
                self._drain()
                known = None
            except Exception as error:  # any error at all: only this thread may fail, not training
                known = understood(error, self.destination)
            if known is None:
                failures = 0
            elif failures == 0 or not isinstance(known, UnreachedError):
                logger.warning("%s: %s; the checkpoints wait in the queue", self.destination, known)
            again = isinstance(known, UnreachedError)
            failures = failures + 1 if again else 0
            if ending:
                tries_left -= 1
                if not again or not tries_left:
                    return
                failures = min(failures, TRIES_AT_END - tries_left)
            pause = min(self.first_pause * 2 ** (failures - 1), LONGEST_PAUSE) if again else None
            self._wake.wait(pause)

    def _drain(self) -> None:
        """Publishes the queue, oldest first, and then `main`."""
        while waiting := [job for job in self.queue.jobs() if self._sound(job)]:
            job = waiting[0]
            self.publisher.publish(job)
            if len(waiting) == 1:
                self.publisher.settle(job)
                self._settled = True
            self.queue.remove(job.step)
            self.publisher.forget(job)
        if self._ending.is_set() and self._settled:
            # Only now are the facts and measurements of the whole training available.
            self.publisher.settle(None)

    def _sound(self, job: Job) -> bool:
        """Whether an entry can be pushed; one that cannot is moved out of the queue."""
        try:
            check_weights(job.folder)
            self.publisher.contents(job)
        except UserError as error:
            aside = self.queue.set_aside(job.step)
            logger.warning("%s: %s; moved to %s", self.destination, one_line(error), aside.name)
            return False
        return True
