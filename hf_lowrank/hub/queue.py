"""Checkpoints that wait to be pushed, on disk beside the training.

An entry is a folder of hard links (copies where the disk has none), so that it survives Trainer's `save_total_limit`
at no cost, and appears by one rename, so that a killed process leaves a whole entry or none.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from hf_lowrank.hub.contents import CONFIGURATION, STATE, TOKENIZER
from hf_lowrank.hub.publisher import Job
from hf_lowrank.runs.sources import INDEX, weight_files

FOLDER = "push-queue"
ENTRY = re.compile(r"checkpoint-(0|[1-9][0-9]*)")  # as `add` names them; \d would take digits of other scripts too
SCRAP = ".scrap-"


class Queue:
    """The queue of one run for one repository.

    Args:
        run: the run directory.
        repo_id: `user/name`.
    """

    def __init__(self, run: Path, repo_id: str) -> None:
        self.folder = run / FOLDER / repo_id.replace("/", "--")

    def jobs(self) -> list[Job]:
        """What waits, in step order."""
        if not self.folder.is_dir():
            return []
        entries = [(ENTRY.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted((Job(int(m[1]), path) for m, path in entries if m), key=lambda job: job.step)

    def add(self, checkpoint: Path, step: int, *, optimizer: bool = False) -> None:
        """Puts a checkpoint into the queue; one of the same step is replaced."""
        scrap = self._scrap()
        scrap.mkdir(parents=True)
        names = {path.name for path in set(weight_files(checkpoint).values())}
        names.update(name for name in (INDEX, *CONFIGURATION, *TOKENIZER, "trainer_state.json"))
        if optimizer:
            names.update(path.name for pattern in STATE for path in checkpoint.glob(pattern))
        for name in sorted(names):
            if (checkpoint / name).is_file():
                _link(checkpoint / name, scrap / name)
        self.remove(step)
        os.replace(scrap, self.folder / f"checkpoint-{step}")

    def remove(self, step: int) -> None:
        """Takes an entry out; nothing happens where there is none."""
        entry = self.folder / f"checkpoint-{step}"
        if entry.is_dir():
            # First out of sight by a rename: a killed removal leaves no half entry.
            scrap = self._scrap()
            os.replace(entry, scrap)
            shutil.rmtree(scrap, ignore_errors=True)

    def set_aside(self, step: int) -> Path:
        """Keeps an entry that can never be pushed out of the way; returns where it lies."""
        aside = self.folder / f"refused-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(self.folder / f"checkpoint-{step}", aside)
        return aside

    def clean(self) -> None:
        """Removes what killed processes left."""
        for scrap in self.folder.glob(f"{SCRAP}*"):
            shutil.rmtree(scrap, ignore_errors=True)

    def _scrap(self) -> Path:
        return self.folder / f"{SCRAP}{uuid.uuid4().hex}"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
