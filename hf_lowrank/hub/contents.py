"""What a revision holds: which files of a checkpoint and of its run, cleaned of what is private."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from hf_lowrank.errors import UserError
from hf_lowrank.hub.privacy import holds_secret, secrets, without_private, without_private_parts
from hf_lowrank.runs.evaluation_set import FILE_NAME as EVALUATION
from hf_lowrank.runs.sources import INDEX, weight_files
from hf_lowrank.storage.checksums import SEAL, seal_holds, sealed, sealed_text, unsealed
from hf_lowrank.storage.parsing import dump_yaml, parse_json, parse_yaml

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
CONFIGURATION = ("config.json", "generation_config.json")
STATE = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json")
OF_RUN = ("recipe.yaml", EVALUATION)
OF_MAIN = ("measurements.jsonl", "downstream.jsonl", "facts.json")
# Written by people or programs in words: paths and tokens are taken out. Vocabularies and weights go as they are.
CLEANED = (
    *CONFIGURATION, "tokenizer_config.json", "trainer_state.json", "recipe.yaml", *OF_MAIN,
)  # fmt: skip
# What of a revision is ours: a file of these names that is not in the new content is deleted with the commit.
OURS = ("model*.safetensors", INDEX, "pictures/*.png", "optimizer.pt", "rng_state*.pth", "scheduler.pt", "scaler.pt")
MANIFEST = "revision.json"


@dataclass(frozen=True)
class PushFile:
    """One file to be pushed: its place in the repository, and a path or its content."""

    path: str
    source: Path | bytes

    @cached_property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return self._digest(hashlib.sha256())

    @cached_property
    def git_oid(self) -> str:
        """The blob id by which git knows the content."""
        return self._digest(hashlib.sha1(b"blob %d\0" % self.size))

    def _digest(self, digest: hashlib._Hash) -> str:
        if isinstance(self.source, bytes):
            digest.update(self.source)
        else:
            with open(self.source, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


Files = dict[str, PushFile]


def is_ours(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in OURS)


def files_of(entries: Iterable[PushFile]) -> Files:
    return {entry.path: entry for entry in entries}


def checkpoint_files(folder: Path, run: Path | None) -> Files:
    """Weights, configuration and tokenizer of a checkpoint, with what the run says about itself.

    Raises:
        UserError: the checkpoint has no whole safetensors weights, or a file holds a token.
    """
    paths = {path.name: path for path in set(weight_files(folder).values())}
    for name in (INDEX, *CONFIGURATION, *TOKENIZER, "trainer_state.json"):
        if (folder / name).is_file():
            paths[name] = folder / name
    if run is not None:
        if not any(name in paths for name in TOKENIZER):
            paths.update(
                {name: run / "tokenizer" / name for name in TOKENIZER if (run / "tokenizer" / name).is_file()}
            )
        paths.update({name: run / name for name in OF_RUN if (run / name).is_file()})
    return files_of(push_file(name, path) for name, path in sorted(paths.items()))


def state_files(folder: Path) -> Files:
    """Optimizer, schedule and random states: what a training continues from beside the weights."""
    found = {path.name: path for pattern in STATE for path in folder.glob(pattern)}
    return files_of(push_file(name, path) for name, path in sorted(found.items()))


def run_files(run: Path) -> Files:
    """What grows after the training: measurements, scores, costs."""
    return files_of(push_file(name, run / name) for name in OF_MAIN if (run / name).is_file())


def push_file(name: str, path: Path) -> PushFile:
    """The file under its name in the repository, cleaned where it is words."""
    if name in CLEANED:
        data = path.read_bytes()
        if name.endswith(".jsonl"):
            data = data[: data.rfind(b"\n") + 1]  # a last line without an end is being written
        try:
            cleaned = _cleaned(name, data.decode("utf-8")).encode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: damaged: it is no text in UTF-8: {error}") from None
        if holds_secret(cleaned):  # as a number that is one
            raise UserError(f"{path}: holds an access token or another secret of this machine; it is not pushed")
        # By content, not by path: the file may grow while it is pushed.
        return PushFile(name, cleaned)
    if name in TOKENIZER and holds_secret(path.read_bytes()):
        raise UserError(f"{path}: holds an access token or another secret of this machine; it is not pushed")
    return PushFile(name, path)


def _cleaned(name: str, text: str) -> str:
    """A file's text without private parts, with its checksums made again where they were right; else as it is."""
    if name.endswith(".yaml"):
        return _cleaned_yaml(text)
    if name.endswith(".jsonl"):
        known = secrets()
        return "".join(_cleaned_json(line, known) + "\n" for line in text.split("\n")[:-1])
    return _cleaned_json(text, secrets(), indent=2)


def _cleaned_yaml(text: str) -> str:
    plain = without_private(text)
    try:
        content = parse_yaml(text)
        cleaned = without_private_parts(content)
    except (ValueError, RecursionError, yaml.YAMLError):
        return plain  # whoever reads it says what is wrong with it
    if (cleaned == content and plain == text) or not seal_holds(text):
        return plain
    return sealed_text(dump_yaml(cleaned))  # comments, and what stands in them, are left behind


def _cleaned_json(text: str, known: tuple[str, ...], indent: int | None = None) -> str:
    plain = without_private(text, known=known)
    if plain == text and "\\" not in text:
        return text
    try:
        content = parse_json(text)
        cleaned = without_private_parts(content, known)
        if cleaned == content and plain == text:
            return text
        if isinstance(cleaned, dict) and SEAL in cleaned:
            unsealed(content)
            cleaned = sealed(cleaned)
        return json.dumps(cleaned, indent=indent, ensure_ascii=False) + ("" if indent is None else "\n")
    except (ValueError, RecursionError):
        return plain  # as above; a checksum that was wrong stays wrong


def manifest(run: str, identity: str, step: int, files: Mapping[str, PushFile]) -> PushFile:
    """What a revision says about itself: whose checkpoint it is, of which step, and every file's SHA-256."""
    content = {
        "run": without_private(run),
        "identity": identity,
        "step": step,
        "files": {path: file.sha256 for path, file in sorted(files.items())},
    }
    return PushFile(MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
