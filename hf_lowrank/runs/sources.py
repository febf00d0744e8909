"""Where a trajectory's checkpoints come from: a run directory, a plain folder, or revisions of a Hub repository."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Protocol

from hf_lowrank.errors import LowRankWarning, UserError
from hf_lowrank.runs.checkpoints import why_incomplete
from hf_lowrank.runs.hub_revisions import HubSource, RemoteTensors
from hf_lowrank.runs.layout import CONFIG, STEP_FOLDER, TRAINER_STATE, step_folders
from hf_lowrank.runs.trainer_state import read_trainer_state
from hf_lowrank.runs.weight_files import weight_files
from hf_lowrank.storage.checksums import fingerprint

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[^@]+)?")


class Source(Protocol):
    """A trajectory's checkpoints by step."""

    name: str
    steps: list[int]

    def folder(self, step: int, *, weights: bool) -> Path:
        """A folder with the checkpoint's configuration, and its weights if asked for."""
        ...

    def file(self, step: int, name: str) -> Path | None:
        """One file of a checkpoint, or None."""
        ...

    def tensors(self, step: int) -> RemoteTensors | None:
        """Reads single tensors of a remote file; None for a local one."""
        ...

    def fingerprint(self, step: int) -> str | None:
        """Distinguishes a checkpoint from other runs' of that step, 16 hex digits; None where it cannot be had."""
        ...

    def extra(self, file: str) -> Path | None:
        """A file that belongs to the whole run, or None."""
        ...

    def where(self, step: int) -> str:
        """How messages name the checkpoint."""
        ...


class FolderSource:
    """Checkpoints in a local folder: its subfolders `checkpoint-N` (also `step-N`), or the folder itself."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give a run directory, a folder of checkpoints, or user/repo")
        self.name = path.resolve().name
        self._folders = _complete_folders(path)
        self._extras = path
        if not self._folders and (path / CONFIG).is_file():
            match = STEP_FOLDER.fullmatch(path.resolve().name)
            self._folders = {int(match[1]) if match else _recorded_step(path): path}
            if match:
                self._extras = path.resolve().parent
                self.name = self._extras.name
        self.steps = sorted(self._folders)
        if not self.steps:
            raise UserError(f"{path}: holds no complete checkpoint-N folder, and is not a checkpoint itself")

    def folder(self, step: int, *, weights: bool) -> Path:
        return self._folders[step]

    def file(self, step: int, name: str) -> Path | None:
        path = self._folders[step] / name
        return path if path.is_file() else None

    def tensors(self, step: int) -> RemoteTensors | None:
        return None

    def fingerprint(self, step: int) -> str | None:
        folder = self._folders[step]
        try:
            return fingerprint(folder, {file.name for file in weight_files(folder).values()})
        except UserError:
            return None  # whoever reads the weights reports the fault

    def extra(self, file: str) -> Path | None:
        path = self._extras / file
        return path if path.exists() else None

    def where(self, step: int) -> str:
        return str(self._folders[step])


def open_source(path: str | Path, revisions: str | None = None) -> Source:
    """The source that `path` names: a folder that exists, else a Hub repository, `user/repo[@revision]`."""
    local = Path(path)
    if not local.is_dir() and REPOSITORY.fullmatch(str(path)) and not str(path).startswith("."):
        return HubSource(str(path), revisions)
    return FolderSource(local)


def _complete_folders(path: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for step, folder in step_folders(path).items():
        fault = why_incomplete(folder, weights=True)
        if fault is None:
            found[step] = folder
        else:
            warnings.warn(f"{folder}: skipped, incomplete: {fault}", LowRankWarning, stacklevel=4)
    return found


def _recorded_step(folder: Path) -> int:
    """The step of a checkpoint whose folder's name does not say it; 0 where nothing does."""
    state = read_trainer_state(folder)
    if state is not None and state.step is None:
        raise UserError(f"{folder / TRAINER_STATE}: has no readable global_step")
    return state.step or 0 if state is not None else 0
