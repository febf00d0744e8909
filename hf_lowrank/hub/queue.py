"""Checkpoints waiting to be pushed, in a folder of the run.

An entry is a folder of hard links (copies where the disk has none), so that it survives Trainer's `save_total_limit`
at no cost. It appears with one rename, so that a killed process leaves a complete entry or none.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from hf_lowrank.hub.contents import CHECKPOINT_FILES, STATE_FILES
from hf_lowrank.hub.publisher import Job
from hf_lowrank.runs.checkpoints import weight_files
from hf_lowrank.runs.layout import checkpoint_folder

FOLDER = "push-queue"
ENTRY = re.compile(r"checkpoint-(0|[1-9][0-9]*)")  # as `add` names them; \d would also match digits of other scripts
SCRAP = ".scrap-"


class Queue:
    """The push queue of one run and one repository.

    Args:
        run: the run directory.
        repo_id: `user/name`.
    """

    def __init__(self, run: Path, repo_id: str) -> None:
        self.folder = run / FOLDER / repo_id.replace("/", "--")

    def jobs(self) -> list[Job]:
        """The waiting checkpoints, in step order."""
        if not self.folder.is_dir():
            return []
        entries = [(ENTRY.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted((Job(int(m[1]), path) for m, path in entries if m), key=lambda job: job.step)

    def add(self, checkpoint: Path, step: int, *, optimizer: bool = False) -> None:
        """Adds a checkpoint to the queue, replacing an entry of the same step."""
        scrap = self._scrap()
        scrap.mkdir(parents=True)
        names = {path.name for path in set(weight_files(checkpoint).values())} | set(CHECKPOINT_FILES)
        if optimizer:
            names.update(path.name for pattern in STATE_FILES for path in checkpoint.glob(pattern))
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
