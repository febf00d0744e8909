"""Where a trajectory's checkpoints come from: a run directory, a plain folder, or revisions of a Hub repository, from
which only what is needed is downloaded."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import struct
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from hf_lowrank.errors import LowRankWarning, UserError, one_line
from hf_lowrank.runs import layout
from hf_lowrank.runs.checkpoints import weight_files, why_incomplete
from hf_lowrank.runs.foreign_adapters import is_adapter, merged
from hf_lowrank.runs.run_files import read_trainer_state
from hf_lowrank.storage.checksums import fingerprint
from hf_lowrank.storage.files import whole_file
from hf_lowrank.storage.parsing import parse_json

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[^@]+)?")
# Tried in this order where `revisions` is not given.
USUAL_NAMES = ("step*", "global_step*", "checkpoint*", "ckpt*", "iter*")
NAMED_STEP = re.compile(r"(?:step|checkpoint|ckpt|iter)[-_]?(\d+)([km](?![a-z]))?", re.I)
LAST_NUMBER = re.compile(r"(\d+)([km](?![a-z]))?(?!.*\d)", re.I)
FIRST_BYTES = 100_000


class FolderSource:
    """Checkpoints in a local folder: its subfolders `checkpoint-N` (also `step-N`), or the folder itself."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give a run directory, a folder of checkpoints, or user/repo")
        self.name = path.resolve().name
        self._folders = _complete_folders(path)
        self._extras = path
        if not self._folders and ((path / layout.CONFIG).is_file() or is_adapter(path)):
            fault = why_incomplete(path, weights=True)
            if fault is not None:
                raise UserError(f"{path}: not a complete checkpoint: {fault}")
            match = layout.STEP_FOLDER.fullmatch(path.resolve().name)
            self._folders = {int(match[1]) if match else _recorded_step(path): path}
            if match:
                self._extras = path.resolve().parent
                self.name = self._extras.name
        self.steps = sorted(self._folders)
        if not self.steps:
            raise UserError(f"{path}: holds no complete checkpoint-N folder, and is not a checkpoint itself")

    def folder(self, step: int, *, weights: bool) -> Path:
        """A folder with the checkpoint's configuration, and its weights if asked for; of an adapter, merged."""
        folder = self._folders[step]
        return merged(folder) if is_adapter(folder) and not (folder / layout.CONFIG).is_file() else folder

    def file(self, step: int, name: str) -> Path | None:
        """One file of a checkpoint, or None."""
        path = self._folders[step] / name
        return path if path.is_file() else None

    def tensors(self, step: int) -> RemoteTensors | None:
        """Reads single tensors of a remote file; None for a local one."""
        return None

    def fingerprint(self, step: int) -> str | None:
        """Distinguishes a checkpoint from other runs' of that step, 16 hex digits; None where it cannot be had."""
        try:
            folder = self.folder(step, weights=True)
            return fingerprint(folder, {file.name for file in weight_files(folder).values()})
        except UserError:
            return None  # whoever reads the weights reports the fault

    def extra(self, file: str) -> Path | None:
        """A file that belongs to the whole run, or None."""
        path = self._extras / file
        return path if path.exists() else None

    def where(self, step: int) -> str:
        """How messages name the checkpoint."""
        return str(self._folders[step])


def _complete_folders(path: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for step, folder in layout.step_folders(path).items():
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
        raise UserError(f"{folder / layout.TRAINER_STATE}: has no readable global_step")
    return state.step or 0 if state is not None else 0


def step_of(revision: str) -> int | None:
    """The optimizer step in the name of a branch or tag: `step1000`, `step_1000`, `checkpoint-1000`, `ckpt-1k`, …"""
    match = NAMED_STEP.search(revision) or LAST_NUMBER.search(revision)
    if match is None:
        return None
    return int(match[1]) * {None: 1, "k": 1000, "m": 1_000_000}[match[2] and match[2].lower()]


class HubSource:
    """Checkpoints as revisions (branches or tags) of a Hub repository; cached files need no network."""

    def __init__(self, repository: str, revisions: str | None = None) -> None:
        repository, _, chosen = repository.partition("@")
        self.repository = self.name = repository
        names = _revision_names(repository)
        patterns = [revisions or chosen] if revisions or chosen else USUAL_NAMES
        found: dict[int, str] = {}
        for pattern in patterns:
            for name in names:
                step = step_of(name)
                if step is not None and fnmatch.fnmatchcase(name, pattern):
                    found.setdefault(step, name)
            if not found and pattern in names:
                found = {0: pattern}
            if found:
                break
        if not found:
            some = ", ".join(names[:8])
            raise UserError(
                f"{repository}: no revision matches {patterns[0]!r}; there are: {some}; choose with --revisions"
            )
        self._revisions = found
        self.steps = sorted(found)
        self._remote: dict[int, RemoteTensors] = {}
        self._check_weights(self.steps[-1])

    def folder(self, step: int, *, weights: bool) -> Path:
        from huggingface_hub import snapshot_download

        patterns = [layout.CONFIG, layout.GENERATION_CONFIG] + (
            [layout.WEIGHTS, layout.INDEX, layout.SHARDS] if weights else []
        )
        try:
            folder = snapshot_download(self.repository, revision=self._revisions[step], allow_patterns=patterns)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.where(step)}: cannot be downloaded: {one_line(error)}") from None
        if weights and not any(Path(folder).glob("*.safetensors")):
            self._check_weights(step)
        return Path(folder)

    def _check_weights(self, step: int) -> None:
        """Raises UserError for a revision whose weights are all pickles, with what to do about it."""
        from huggingface_hub import list_repo_files

        try:
            files = list_repo_files(self.repository, revision=self._revisions[step])
        except Exception:  # offline, of which errors depend on the version of huggingface_hub; or it fails later
            return
        pickles = [file for file in sorted(files) if fnmatch.fnmatchcase(file, layout.PICKLES)]
        if pickles and not any(file.endswith(".safetensors") for file in files):
            name = self.repository.partition("/")[2]
            raise UserError(
                f"{self.where(step)}: {pickles[0]} is a pickle, which can run any code and is not read; there are no "
                f"safetensors. If you trust it, run AutoModelForCausalLM.from_pretrained({self.repository!r}, "
                f"revision={self._revisions[step]!r}).save_pretrained('{name}/checkpoint-{step}') for each step, then "
                f"give the folder {name}"
            )

    def file(self, step: int, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.repository, name, revision=self._revisions[step]))
        except (OSError, ValueError, RuntimeError):
            return None

    def extra(self, file: str) -> Path | None:
        return self.file(self.steps[-1], file)

    def where(self, step: int) -> str:
        return f"{self.repository}@{self._revisions[step]}"

    def fingerprint(self, step: int) -> str:
        """Of the address: a new commit may only change the card, and the weights may not be downloaded."""
        return hashlib.sha256(self.where(step).encode()).hexdigest()[:16]

    def tensors(self, step: int) -> RemoteTensors | None:
        """Reads single tensors; None where the file is cached or the server has no range requests."""
        if step not in self._remote:
            from huggingface_hub import try_to_load_from_cache

            revision = self._revisions[step]
            if isinstance(try_to_load_from_cache(self.repository, layout.WEIGHTS, revision=revision), str):
                return None
            if _cached_commit(self.repository, revision) is None:
                self.folder(step, weights=False)
            commit = _cached_commit(self.repository, revision)
            if commit is None:
                return None
            try:
                self._remote[step] = RemoteTensors(self.repository, commit)
            except (OSError, ValueError, KeyError, TypeError):
                return None
        remote = self._remote[step]
        # Most of the file is needed: download it once.
        return None if remote.bytes_read > remote.size // 2 else remote


class RemoteTensors:
    """The tensors of a remote `model.safetensors`, each read by a range request and cached locally.

    Raises:
        OSError, ValueError, KeyError, TypeError: the Hub cannot be reached, has no such file, or no range requests.
    """

    def __init__(self, repository: str, commit: str) -> None:
        from huggingface_hub import constants

        self.repository, self.commit = repository, commit
        self._cache = Path(constants.HF_HUB_CACHE) / "hf_lowrank-tensors" / repository.replace("/", "--") / commit
        self.bytes_read = 0
        stored = self._cache / "header.json"
        if stored.is_file():
            known = parse_json(stored.read_text(encoding="utf-8"))
            self._start, header = known["start"], known["header"]
        else:
            first = self._get(0, FIRST_BYTES)
            (length,) = struct.unpack("<Q", first[:8])
            data = first[8 : 8 + length] if 8 + length <= len(first) else self._get(8, 8 + length)
            self._start, header = 8 + length, parse_json(data)
            with whole_file(stored) as file:
                file.write_text(json.dumps({"start": self._start, "header": header}), encoding="utf-8")
        self._entries: dict[str, Any] = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self.size = max((entry["data_offsets"][1] for entry in self._entries.values()), default=0)

    def names(self) -> list[str]:
        return list(self._entries)

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored.

        Raises:
            UserError: it cannot be read.
        """
        from safetensors.torch import load

        stored = self._cache / (hashlib.sha256(name.encode()).hexdigest() + ".safetensors")
        try:
            if not stored.is_file():
                entry = self._entries[name]
                begin, end = entry["data_offsets"]
                data = self._get(self._start + begin, self._start + end) if end > begin else b""
                header = json.dumps({name: {**entry, "data_offsets": [0, end - begin]}}).encode()
                with whole_file(stored) as file:
                    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
                self.bytes_read += end - begin
            return load(stored.read_bytes())[name]
        except (OSError, ValueError, SafetensorError) as error:
            where = f"{self.repository}@{self.commit[:12]}"
            raise UserError(f"{where}: {name} cannot be read: {one_line(error)}") from None

    def _get(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of the file; fewer at its end."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repository, layout.WEIGHTS, revision=self.commit)
        headers = {**build_hf_headers(library_name="hf_lowrank"), "Range": f"bytes={begin}-{end - 1}"}
        response = get_session().get(url, headers=headers, timeout=60)
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise ValueError("the server does not support range requests")
        return response.content


def _revision_names(repository: str) -> list[str]:
    """Branches and tags, from the Hub, or from the local cache where the Hub cannot be reached."""
    from huggingface_hub import list_repo_refs
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        refs = list_repo_refs(repository)
    except RepositoryNotFoundError:
        raise UserError(f"{repository}: neither a local folder nor a repository on the Hub that you can see") from None
    except Exception as error:  # offline: which error depends on the version of huggingface_hub
        folder = _cache_folder(repository) / "refs"
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        if not names:
            raise UserError(
                f"{repository}: no such folder, and the Hub cannot be reached: {one_line(error)}"
            ) from None
        line = f"{repository}: the Hub cannot be reached; using the local cache"
        warnings.warn(line, LowRankWarning, stacklevel=5)
        return names
    return [ref.name for ref in [*refs.branches, *refs.tags]]


def _cache_folder(repository: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")


def _cached_commit(repository: str, revision: str) -> str | None:
    """The commit of a revision when its configuration was downloaded."""
    file = _cache_folder(repository) / "refs" / revision
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


Source = FolderSource | HubSource


def open_source(path: str | Path, revisions: str | None = None) -> Source:
    """The source that `path` names: a folder that exists, else a Hub repository, `user/repo[@revision]`."""
    local = Path(path)
    if not local.is_dir() and REPOSITORY.fullmatch(str(path)) and not str(path).startswith("."):
        return HubSource(str(path), revisions)
    return FolderSource(local)
