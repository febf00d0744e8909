"""Where a trajectory's checkpoints come from: a run directory, a plain folder, or revisions of a Hub repository."""

from __future__ import annotations

import fnmatch
import json
import re
import warnings
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open

from hf_lowrank.errors import UserError

STEP_FOLDER = re.compile(r"(?:checkpoint|(?:global_?)?step)[-_]?(\d+)")
LAST_NUMBER = re.compile(r"(\d+)(?!.*\d)")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[^@]+)?")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Source(Protocol):
    """A trajectory's checkpoints by step."""

    name: str
    steps: list[int]

    def folder(self, step: int, *, weights: bool) -> Path:
        """A folder with the checkpoint's configuration, and its weights if asked for."""
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

    def extra(self, file: str) -> Path | None:
        path = self._extras / file
        return path if path.exists() else None

    def where(self, step: int) -> str:
        return str(self._folders[step])


class HubSource:
    """Checkpoints as revisions (branches or tags) of a Hub repository; only the needed files are downloaded."""

    def __init__(self, repository: str, revisions: str | None = None) -> None:
        from huggingface_hub import list_repo_refs
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        repository, _, chosen = repository.partition("@")
        self.repository = self.name = repository
        pattern = revisions or (chosen or "step*")
        try:
            refs = list_repo_refs(repository)
        except RepositoryNotFoundError:
            raise UserError(
                f"{repository}: neither a local folder nor a repository on the Hub that you can see"
            ) from None
        except (HfHubHTTPError, OSError) as error:
            raise UserError(f"{repository}: no such folder, and the Hub cannot be asked: {_one_line(error)}") from None
        names = [ref.name for ref in [*refs.branches, *refs.tags]]
        found = {
            int(m[1]): name for name in names if fnmatch.fnmatchcase(name, pattern) and (m := LAST_NUMBER.search(name))
        }
        if not found and pattern in names:
            found = {0: pattern}
        if not found:
            some = ", ".join(names[:8])
            raise UserError(
                f"{repository}: no revision matches {pattern!r}; there are: {some}; choose with --revisions"
            )
        self._revisions = found
        self.steps = sorted(found)

    def folder(self, step: int, *, weights: bool) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        patterns = ["config.json", "generation_config.json"] + (
            [WEIGHTS, INDEX, "model-*.safetensors"] if weights else []
        )
        try:
            folder = snapshot_download(self.repository, revision=self._revisions[step], allow_patterns=patterns)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(f"{self.where(step)}: cannot be downloaded: {_one_line(error)}") from None
        return Path(folder)

    def extra(self, file: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.repository, file, revision=self._revisions[self.steps[-1]]))
        except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError):
            return None

    def where(self, step: int) -> str:
        return f"{self.repository}@{self._revisions[step]}"


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
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): folder / str(file) for name, file in names.items()}
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise UserError(f"{index}: not a readable weight index: {_one_line(error)}") from None
    for file in sorted(set(files.values())):
        if not file.is_file():
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
            warnings.warn(f"{folder}: skipped, half-written: {fault}", stacklevel=4)
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
    if not (folder / "trainer_state.json").is_file() and (folder / "optimizer.pt").is_file():
        try:
            weight_files(folder)
        except UserError as error:
            return str(error)
    return None


def _recorded_step(folder: Path) -> int:
    state = folder / "trainer_state.json"
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["global_step"]) if state.is_file() else 0
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state}: has no readable global_step: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
