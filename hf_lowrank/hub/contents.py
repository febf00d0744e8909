"""The files of a revision: those of a checkpoint and of its run, without private parts."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from hf_lowrank.errors import UserError
from hf_lowrank.hub.privacy import secrets, without_private, without_private_parts
from hf_lowrank.runs import layout
from hf_lowrank.runs.checkpoints import is_sharded, weight_files
from hf_lowrank.storage.checksums import SEAL, seal_holds, sealed, sealed_text, unsealed
from hf_lowrank.storage.parsing import dump_yaml, parse_json, parse_yaml

# Of a checkpoint, next to its weights; of its run; of the run, growing after training; for resuming.
CONFIGS = (layout.CONFIG, layout.GENERATION_CONFIG)
CHECKPOINT_FILES = (layout.INDEX, *CONFIGS, *layout.TOKENIZER_FILES, layout.TRAINER_STATE)
RUN_FILES = (layout.RECIPE, layout.EVALUATION_SET)
TABLES = (layout.MEASUREMENTS, layout.SCORES, layout.FACTS)
STATE_FILES = (
    layout.OPTIMIZER,
    layout.SCHEDULER,
    layout.SCALER,
    layout.RANDOM_STATES,
    layout.STREAM_PLACE,
    layout.INTERIM,
)
# Free text may be in these: paths and tokens are removed. Vocabularies and weights are pushed unchanged.
CLEANED = (*CONFIGS, "tokenizer_config.json", layout.TRAINER_STATE, layout.RECIPE, *TABLES)
# People and benchmarks may add files next to it.
EVAL_RESULTS = ".eval_results/hf_lowrank.yaml"
# A file of these names that a revision no longer has is deleted with the commit.
OURS = ("model*.safetensors", layout.INDEX, "pictures/*.png", EVAL_RESULTS, *STATE_FILES)
MANIFEST = "revision.json"


@dataclass(frozen=True)
class PushFile:
    """One file to push: its path in the repository, and a local path or its content."""

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
        """The id of the content as a git blob."""
        return self._digest(hashlib.sha1(b"blob %d\0" % self.size))

    def _digest(self, digest: hashlib._Hash) -> str:
        with io.BytesIO(self.source) if isinstance(self.source, bytes) else open(self.source, "rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest()

    @cached_property
    def xet_hash(self) -> str:
        """The id of the content in Xet, the storage behind buckets."""
        from hf_xet import hash_files

        if not isinstance(self.source, bytes):
            return str(hash_files([str(self.source)])[0].hash)
        with tempfile.TemporaryDirectory(prefix="hf-lowrank-") as folder:
            copy = Path(folder) / "file"
            copy.write_bytes(self.source)
            return str(hash_files([str(copy)])[0].hash)

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


Files = dict[str, PushFile]


def is_ours(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in OURS)


def files_of(entries: Iterable[PushFile]) -> Files:
    return {entry.path: entry for entry in entries}


def checkpoint_files(folder: Path, run: Path | None) -> Files:
    """Weights, configuration and tokenizer of a checkpoint, with recipe and evaluation set of its run.

    Raises:
        UserError: the checkpoint has no complete safetensors weights, or a file contains a secret.
    """
    paths = {path.name: path for path in set(weight_files(folder).values())}
    wanted = [folder / name for name in CHECKPOINT_FILES]
    if run is not None:
        if not any((folder / name).is_file() for name in layout.TOKENIZER_FILES):
            wanted += [run / layout.TOKENIZER / name for name in layout.TOKENIZER_FILES]
        wanted += [run / name for name in RUN_FILES]
    paths.update({path.name: path for path in wanted if path.is_file()})
    return files_of(push_file(name, path) for name, path in sorted(paths.items()))


def state_files(folder: Path) -> Files:
    """Optimizer, scheduler and random states: what training resumes from, apart from the weights.

    Raises:
        UserError: they are sharded.
    """
    found = {path.name: path for path in [*state_paths(folder), folder / layout.TRAINER_STATE] if path.is_file()}
    return files_of(push_file(name, path) for name, path in sorted(found.items()))


def state_paths(folder: Path) -> list[Path]:
    """The files of a checkpoint's states, apart from Trainer's own.

    Raises:
        UserError: they are sharded over processes, in folders that no push sends.
    """
    if is_sharded(folder):
        raise UserError(f"{folder}: its optimizer state is sharded over processes and cannot be pushed; leave it out")
    return [path for pattern in STATE_FILES for path in folder.glob(pattern)]


def run_files(run: Path) -> Files:
    """What grows during and after training: measurements, scores, facts."""
    return files_of(push_file(name, run / name) for name in TABLES if (run / name).is_file())


def push_file(name: str, path: Path) -> PushFile:
    """A file under its name in the repository, cleaned if its name is in CLEANED."""
    if name in CLEANED:
        data = path.read_bytes()
        if name.endswith(".jsonl"):
            data = data[: data.rfind(b"\n") + 1]  # a line without its end is still being written
        try:
            # By content, not by path: the file may grow while it is pushed.
            file = PushFile(name, _cleaned(name, data.decode("utf-8")).encode())
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: damaged: not UTF-8 text: {error}") from None
    else:
        file = PushFile(name, path)
    # A cleaned file may still contain a secret, e.g. as a number.
    if name in (*CLEANED, *layout.TOKENIZER_FILES):
        content = file.read()
        if any(secret.encode() in content for secret in secrets()):
            raise UserError(f"{path}: contains an access token or another secret of this machine; it is not pushed")
    return file


def _cleaned(name: str, text: str) -> str:
    """A file's text without private parts; checksums are renewed where they were right, else kept."""
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
        return plain  # whoever reads it reports the fault
    if (cleaned == content and plain == text) or not seal_holds(text):
        return plain
    return sealed_text(dump_yaml(cleaned))  # drops comments


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
        return plain  # as above; a wrong checksum stays wrong
