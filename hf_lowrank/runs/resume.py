"""Which checkpoint of a run directory a training can continue from."""

from __future__ import annotations

import logging
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

from hf_lowrank.storage.checksums import FILE_NAME as CHECKSUMS
from hf_lowrank.storage.checksums import damage_by_checksums
from hf_lowrank.storage.parsing import parse_json

logger = logging.getLogger(__name__)

STATE_FILES = ("optimizer.pt", "scheduler.pt")
# What Trainer writes of a sharded model in place of optimizer.pt; the metadata of each comes last.
SHARDED_STATE = ("pytorch_model_fsdp_0", "optimizer_0")


def last_whole_checkpoint(run: Path) -> Path | None:
    """The latest checkpoint of `run` that Trainer can continue from; half-written ones are skipped with a warning."""
    for checkpoint in sorted(_checkpoints(run), key=step_of, reverse=True):
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is skipped: half-written or damaged: %s", checkpoint, damage)
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer steps of `checkpoint-N`."""
    return int(checkpoint.name.rpartition("-")[2])


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint was written under FSDP2, which alone can continue from it."""
    return any((checkpoint / name).is_dir() for name in SHARDED_STATE)


def _checkpoints(run: Path) -> list[Path]:
    # checkpoint-0 holds the initial weights and no state: the training starts from the seed again.
    return [
        path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[1-9]\d*", path.name) and path.is_dir()
    ]


def damage_of(checkpoint: Path) -> str | None:
    """Why Trainer cannot continue from `checkpoint`, None where it can."""
    if (checkpoint / CHECKSUMS).is_file():
        damage = damage_by_checksums(checkpoint)
        if damage is not None:
            return damage
    try:
        state = _json(checkpoint / "trainer_state.json")
        if state["global_step"] != step_of(checkpoint):
            return f"trainer_state.json says step {state['global_step']}"
        _json(checkpoint / "config.json")
        for file in _weight_files(checkpoint):
            _check_safetensors(file)
        random_states = sorted(checkpoint.glob("rng_state*.pth"))
        if not random_states:
            return "rng_state.pth is missing"
        states: tuple[str, ...] = STATE_FILES
        if is_sharded(checkpoint):
            states = STATE_FILES[1:]
            for name in SHARDED_STATE:
                if not (checkpoint / name / ".metadata").is_file():
                    return f"{name} is incomplete"
        for file in [*(checkpoint / name for name in states), *random_states]:
            _check_archive(file)
        return damage_by_checksums(checkpoint)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        return " ".join(str(error).split()) or type(error).__name__


def _json(file: Path) -> Any:
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is no JSON: {error}") from None


def _weight_files(checkpoint: Path) -> list[Path]:
    index = checkpoint / "model.safetensors.index.json"
    if not index.exists():
        return [checkpoint / "model.safetensors"]
    shards = _json(index)["weight_map"].values()
    return [checkpoint / name for name in sorted(set(shards))]


def _check_safetensors(file: Path) -> None:
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        size = file.stat().st_size
        if length > size - 8:
            raise ValueError(f"{file.name} ends within its header")
        header = parse_json(opened.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{file.name} has {size} bytes, its header says {expected}")


def _check_archive(file: Path) -> None:
    """torch.save writes zip archives, whose directory comes last: what was cut off has none."""
    try:
        with zipfile.ZipFile(file) as archive:
            if not archive.namelist():
                raise ValueError(f"{file.name} is empty")
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file.name} is cut off: {error}") from None
