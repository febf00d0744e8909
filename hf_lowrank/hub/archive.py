"""Stores a run in a bucket: every checkpoint with the states that training resumes from, and the files of the run.

The folder in the bucket is a run directory, which `hf buckets sync` downloads. A checkpoint's `checksums.json` is sent
after its other files, and deleted before they change: here, too, a checkpoint that has one is complete.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.hub.bucket import Bucket, StoredFile
from hf_lowrank.hub.contents import (
    RUN_FILES,
    Files,
    PushFile,
    checkpoint_files,
    files_of,
    is_ours,
    push_file,
    run_files,
    state_files,
)
from hf_lowrank.hub.privacy import one_line, without_private
from hf_lowrank.hub.publisher import Job, run_identity, run_name
from hf_lowrank.hub.repository import UnreachedError
from hf_lowrank.runs.layout import CHECKSUMS, RECIPE, TOKENIZER, TOKENIZER_FILES, checkpoint_folder
from hf_lowrank.storage.checksums import is_sealed, sealed, sealed_text
from hf_lowrank.storage.parsing import parse_json

# Whose run the folder holds; sent before anything else.
OWNER = "run.json"


class Archive:
    """Stores checkpoints of a run, or a checkpoint without one, in a folder of a bucket.

    Its methods are those of `Publisher`: a queue and `push` treat both alike.
    """

    finish = "the run's files"

    def __init__(self, bucket: Bucket, run: Path | None, *, private: bool = True) -> None:
        self.bucket, self.run, self.private = bucket, run, private
        self._ready = False
        self._contents: dict[int, dict[str, Files]] = {}

    @property
    def destination(self) -> str:
        return self.bucket.address

    def label(self, job: Job) -> str:
        """What messages call a checkpoint here."""
        return _folder(job)

    def prepare(self, job: Job) -> None:
        """Creates the bucket and takes the folder, or checks that it belongs to this run.

        Raises:
            UserError: it holds another run, or something else.
        """
        if self._ready:
            return
        self.bucket.create(private=self.private)
        owner = {
            "run": without_private(run_name(self.run, self.destination)),
            "identity": run_identity(self.run, job),
        }
        found = self.bucket.files()
        if OWNER in found:
            there = _owner(self.bucket.read(OWNER))
            if there.get("identity") != owner["identity"]:
                raise UserError(
                    f"{self.destination}: taken: it holds the run {one_line(there.get('run'), limit=80)!r} "
                    "with another recipe; choose another folder or bucket"
                )
        elif found:
            raise UserError(
                f"{self.destination}: taken: it holds other files, such as {one_line(min(found), limit=80)}; "
                "choose another folder or bucket"
            )
        else:
            self.bucket.write([PushFile(OWNER, (json.dumps(owner, indent=1) + "\n").encode())])
        self._ready = True

    def contents(self, job: Job) -> dict[str, Files]:
        """The files of a checkpoint, under the name of its folder; `checksums.json` is the last."""
        if job.step not in self._contents:
            folder = _folder(job)
            files = {**checkpoint_files(job.folder, None), **state_files(job.folder)}
            checksums = {name: {"sha256": file.sha256, "bytes": file.size} for name, file in sorted(files.items())}
            files[CHECKSUMS] = PushFile(CHECKSUMS, (json.dumps(sealed(checksums), indent=1) + "\n").encode())
            moved = files_of(PushFile(f"{folder}/{name}", file.source) for name, file in files.items())
            self._contents[job.step] = {folder: moved}
        return self._contents[job.step]

    def publish(self, job: Job) -> None:
        """Completes the checkpoint in the bucket, and checks it there.

        Raises:
            UnreachedError: the Hub does not show what was sent.
        """
        self.prepare(job)
        folder = _folder(job)
        last = f"{folder}/{CHECKSUMS}"
        files, found = self.contents(job)[folder], self.bucket.files(folder)
        others = {path: file for path, file in files.items() if path != last}
        changed = [file for path, file in others.items() if path not in found or not found[path].same(file)]
        extra = _left_over(files, found)
        if changed or extra:
            if last in found:
                self.bucket.write([], delete=[last])
            self.bucket.write(changed, delete=extra)
            self._check(folder, others)
        elif last in found and found[last].same(files[last]):
            return
        self.bucket.write([files[last]])
        self._check(folder, files)

    def _check(self, folder: str, files: Files) -> None:
        wrong = _wrong(files, self.bucket.files(folder))
        if wrong:
            raise UnreachedError(f"the Hub does not show what was sent: {'; '.join(wrong[:4])}")

    def settle(self, job: Job | None) -> None:
        """Updates the files of the run: recipe, evaluation set, tokenizer, and the tables as they are now."""
        if self.run is None:
            return
        paths = {name: self.run / name for name in RUN_FILES}
        paths |= {f"{TOKENIZER}/{name}": self.run / TOKENIZER / name for name in TOKENIZER_FILES}
        files = run_files(self.run)
        for name, path in paths.items():
            if path.is_file():
                # Cleaned by its name alone, without the folder.
                files[name] = PushFile(name, push_file(path.name, path).source)
        if RECIPE in files:
            # Next to checkpoints with checksums a recipe without one counts as damaged.
            text = files[RECIPE].read().decode("utf-8")
            files[RECIPE] = PushFile(RECIPE, (text if is_sealed(text) else sealed_text(text)).encode())
        found = self.bucket.files()
        changed = [file for path, file in files.items() if path not in found or not found[path].same(file)]
        if changed:
            self.bucket.write(changed)
            self._check("", files)

    def forget(self, job: Job) -> None:
        """Drops the cached contents of a checkpoint, whose files may be gone."""
        self._contents.pop(job.step, None)

    def faults(self, job: Job) -> list[str]:
        """What is wrong with a checkpoint in the bucket: files that are missing, differ, or should not be there."""
        folder = _folder(job)
        files, found = self.contents(job)[folder], self.bucket.files(folder)
        return [*_wrong(files, found), *(f"{path} is left over" for path in _left_over(files, found))]


def _folder(job: Job) -> str:
    return checkpoint_folder(Path(), job.step).name


def _wrong(files: Files, found: Mapping[str, StoredFile]) -> list[str]:
    missing = [f"{path} is missing" for path in files if path not in found]
    return missing + [
        f"{path} differs" for path, file in files.items() if path in found and not found[path].same(file)
    ]


def _left_over(files: Files, found: Mapping[str, StoredFile]) -> list[str]:
    """Files that this package wrote and the checkpoint no longer has."""
    return [path for path in found if path not in files and is_ours(PurePosixPath(path).name)]


def _owner(data: bytes) -> Mapping[str, Any]:
    try:
        content = parse_json(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
