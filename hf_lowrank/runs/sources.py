"""Where a trajectory's checkpoints come from: a run directory, a plain folder, or revisions of a Hub repository."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open

from hf_lowrank.runs.hub_revisions import INDEX, WEIGHTS, HubSource, RemoteTensors
from hf_lowrank.storage.checksums import FILE_NAME as CHECKSUMS
from hf_lowrank.storage.checksums import fingerprint, lacks_checksums
from hf_lowrank.errors import LowRankWarning, UserError
from hf_lowrank.storage.parsing import parse_json

STEP_FOLDER = re.compile(r"(?:checkpoint|(?:global_?)?step)[-_]?(\d+)")
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
        """What reads single tensors without the rest of a file that is not here; None where the file is here."""
        ...

    def fingerprint(self, step: int) -> str | None:
        """What tells a checkpoint from another run's of that step, 16 hex digits; None where nothing can."""
        ...

    def extra(self, file: str) -> Path | None:
        """A file that belongs to the whole run, or None."""
        ...

    def where(self, step: int) -> str:
        """How to write down which checkpoint it is."""
        ...


class FolderSource:
    """Checkpoints in a local folder: `checkpoint-N` (also `step-N`) in it, or the folder itself."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give a run directory, a folder of checkpoints, or user/repo")
        self.name = path.resolve().name
        self._folders = _folders_of_steps(path)
        self._extras = path
        if not self._folders and (path / "config.json").is_file():
            match = STEP_FOLDER.fullmatch(path.resolve().name)
            self._folders = {int(match[1]) if match else _recorded_step(path): path}
            if match:
                self._extras = path.resolve().parent
                self.name = self._extras.name
        self.steps = sorted(self._folders)
        if not self.steps:
            raise UserError(f"{path}: holds no whole checkpoint-N folder and is no checkpoint itself")

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
            return None  # whoever reads the weights says what is wrong with them

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


def weight_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor, by the tensor's name.

    Raises:
        UserError: there are no safetensors weights, one is damaged, or a file that the index names is missing.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(tensor_names(folder / WEIGHTS), folder / WEIGHTS)
    if not index.is_file():
        other = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
        hint = f" ({other[0]} is a pickle, which is not read)" if other else ""
        raise UserError(f"{folder}: no {WEIGHTS} there{hint}; convert the checkpoint to safetensors")
    try:
        names = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): folder / str(file) for name, file in names.items()}
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise UserError(f"{index}: not a readable weight index: {_one_line(error)}") from None
    for file in sorted(set(files.values())):
        if file.parent != folder:
            raise UserError(f"{index}: must name files beside itself, got {file.name} elsewhere")
        if not os.path.isfile(file):  # a name too long for a file is that of none
            raise UserError(f"{file}: missing, though {index.name} names it")
        tensor_names(file)
    return files


def tensor_names(file: Path) -> list[str]:
    """Names in a safetensors file, from its header alone; a truncated or damaged file is a `UserError`."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file: {_one_line(error)}") from None


def _folders_of_steps(path: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for folder in sorted(path.iterdir()):
        match = STEP_FOLDER.fullmatch(folder.name)
        if not match or not folder.is_dir():
            continue
        fault = _half_written(folder)
        if fault:
            warnings.warn(f"{folder}: skipped, half-written: {fault}", LowRankWarning, stacklevel=4)
        else:
            found[int(match[1])] = folder
    return found


def _half_written(folder: Path) -> str | None:
    """What is missing in a checkpoint that was being written when training stopped; None for a finished one.

    Trainer writes trainer_state.json after the weights: where it is there, damaged weights are damage, which is
    reported by whoever reads them, not a checkpoint to pass over.
    """
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX, "pytorch_model.bin")):
        return f"{WEIGHTS} is missing"
    if lacks_checksums(folder):
        return f"{CHECKSUMS} is missing"
    if not (folder / "trainer_state.json").is_file() and (folder / "optimizer.pt").is_file():
        try:
            weight_files(folder)
        except UserError as error:
            return str(error)
    return None


def _recorded_step(folder: Path) -> int:
    state = folder / "trainer_state.json"
    try:
        return int(parse_json(state.read_text(encoding="utf-8"))["global_step"]) if state.is_file() else 0
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{state}: has no readable global_step: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
