"""Which checkpoints of a run count. There are two levels, and every reader asks here for the one that it needs:

- *complete*: everything was written. Reports, cards and trajectories consist of complete checkpoints. (Readers of
  weights ask for weights too: a report can do without.)
- *resumable*: also what Trainer continues from (optimizer, scheduler and random states) is intact.

Training writes `checksums.json` last. A checkpoint that has it is complete, and a file that it names and that is
missing or differs is damage: an error for whoever reads the file, never a reason to skip the checkpoint. A checkpoint
without it, in a run whose other checkpoints have it, is incomplete. In runs of other programs, which have no
checksums, a checkpoint is complete with its configuration, and its weights where they are asked for.
"""

import logging
import os
import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs import layout
from hf_lowrank.runs.run_files import read_trainer_state
from hf_lowrank.storage.checksums import damage_by_checksums
from hf_lowrank.storage.parsing import parse_json

logger = logging.getLogger(__name__)


def why_incomplete(checkpoint: Path, *, weights: bool) -> str | None:
    """What is missing in a checkpoint that was not written to its end, with or without weights; None if complete."""
    if (checkpoint / layout.CHECKSUMS).is_file():
        return None
    if not (checkpoint / layout.CONFIG).is_file():
        if not (checkpoint / layout.ADAPTER_CONFIG).is_file():
            return f"{layout.CONFIG} is missing"
        has_adapter = (checkpoint / layout.ADAPTER_WEIGHTS).is_file()
        return None if has_adapter else f"{layout.ADAPTER_WEIGHTS} is missing{_about_pickles(checkpoint)}"
    if weights and not any((checkpoint / name).is_file() for name in (layout.WEIGHTS, layout.INDEX)):
        return f"{layout.WEIGHTS} is missing{_about_pickles(checkpoint)}"
    if checkpoint.name.startswith("checkpoint-") and layout.has_checksums(checkpoint.parent):
        return f"{layout.CHECKSUMS} is missing"
    # Trainer writes trainer_state.json after the weights: with it, damaged weights are damage.
    if weights and not (checkpoint / layout.TRAINER_STATE).is_file() and (checkpoint / layout.OPTIMIZER).is_file():
        try:
            weight_files(checkpoint)
        except UserError as error:
            return str(error)
    return None


def complete_checkpoints(run: Path) -> dict[int, Path]:
    """The complete checkpoints of `run`, with or without weights, in step order."""
    return {
        step: folder
        for step, folder in layout.step_folders(run).items()
        if why_incomplete(folder, weights=False) is None
    }


def damage_of(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What differs from the `checksums.json` of a checkpoint or tokenizer, in the files `names` or in all, or that it
    is missing; None for an intact or a foreign folder."""
    if (folder / layout.CHECKSUMS).is_file():
        return damage_by_checksums(folder, names)
    expected = folder.name.startswith("checkpoint-") and layout.has_checksums(folder.parent)
    return f"{layout.CHECKSUMS} is missing" if expected else None


def check_files(folder: Path, names: Iterable[str] | None = None) -> None:
    """Raises a `UserError` for what `damage_of` finds."""
    damage = damage_of(folder, names)
    if damage is not None:
        raise UserError(f"{folder}: damaged: {damage}")


def last_resumable_checkpoint(run: Path) -> Path | None:
    """The latest checkpoint of `run` that Trainer can continue from; others are skipped with a warning."""
    # checkpoint-0 holds the initial weights and no state: training starts from the seed.
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[1-9]\d*", path.name)]
    for checkpoint in sorted((path for path in found if path.is_dir()), key=layout.step_of, reverse=True):
        reason = why_not_resumable(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s is skipped: incomplete or damaged: %s", checkpoint, reason)
    return None


def why_not_resumable(checkpoint: Path) -> str | None:
    """Why Trainer cannot continue from `checkpoint`, None where it can."""
    damage = damage_by_checksums(checkpoint)
    if damage is not None:
        return damage
    try:
        state = read_trainer_state(checkpoint)
        if state is None or state.step != layout.step_of(checkpoint):
            return f"{layout.TRAINER_STATE} " + ("is missing" if state is None else f"says step {state.step}")
        _check_json(checkpoint / layout.CONFIG)
        weight_files(checkpoint)
        random_states = sorted(checkpoint.glob(layout.RANDOM_STATES))
        if not random_states:
            return "rng_state.pth is missing"
        if is_sharded(checkpoint):
            states = [checkpoint / layout.SCHEDULER]
            for name in layout.SHARDED_STATE:
                if not (checkpoint / name / ".metadata").is_file():
                    return f"{name} is incomplete"
        else:
            states = [checkpoint / layout.OPTIMIZER, checkpoint / layout.SCHEDULER]
        for file in [*states, *random_states]:
            _check_archive(file)
        return damage_of(checkpoint)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, struct.error) as error:
        return one_line(error)


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint was written under FSDP2, which alone can continue from it."""
    return any((checkpoint / name).is_dir() for name in layout.SHARDED_STATE)


def _check_json(file: Path) -> None:
    try:
        parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file.name} is not JSON: {error}") from None


def _check_archive(file: Path) -> None:
    """torch.save writes zip archives, whose directory comes last: a truncated one has none."""
    try:
        with zipfile.ZipFile(file) as archive:
            if not archive.namelist():
                raise UserError(f"{file.name} is empty")
    except zipfile.BadZipFile as error:
        raise UserError(f"{file.name} is truncated: {error}") from None


def weight_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor, by the tensor's name.

    Raises:
        UserError: there are no safetensors weights, one is damaged, or a file that the index names is missing.
    """
    index = folder / layout.INDEX
    if (folder / layout.WEIGHTS).is_file():
        return dict.fromkeys(tensor_names(folder / layout.WEIGHTS), folder / layout.WEIGHTS)
    if not index.is_file():
        raise UserError(f"{folder}: {layout.WEIGHTS} is missing{_about_pickles(folder)}")
    try:
        names = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): folder / str(file) for name, file in names.items()}
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise UserError(f"{index}: not a readable weight index: {one_line(error)}") from None
    for file in sorted(set(files.values())):
        if file.parent != folder:
            raise UserError(f"{index}: must name files in its own folder, got {file}")
        if not os.path.isfile(file):  # also false for a name too long for any file
            raise UserError(f"{file}: missing, though {index.name} names it")
        tensor_names(file)
    return files


def _about_pickles(folder: Path) -> str:
    """What to add where safetensors weights are missing."""
    pickles = sorted(file.name for file in folder.glob(layout.PICKLES))
    return f" ({pickles[0]} is a pickle, which is not read; save the model with save_pretrained)" if pickles else ""


def tensor_names(file: Path) -> list[str]:
    """The tensor names in a safetensors file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a complete safetensors file: {one_line(error)}") from None
