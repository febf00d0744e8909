"""Which safetensors file of a checkpoint holds which tensor, from headers alone."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs.layout import INDEX, WEIGHTS
from hf_lowrank.storage.parsing import parse_json


def weight_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor, by the tensor's name.

    Raises:
        UserError: there are no safetensors weights, one is damaged, or a file that the index names is missing.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(tensor_names(folder / WEIGHTS), folder / WEIGHTS)
    if not index.is_file():
        pickles = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
        hint = f" ({pickles[0]} is a pickle, which is not read)" if pickles else ""
        raise UserError(f"{folder}: {WEIGHTS} is missing{hint}; convert the checkpoint to safetensors")
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


def tensor_names(file: Path) -> list[str]:
    """The tensor names in a safetensors file.

    Raises:
        UserError: the file is truncated or damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a complete safetensors file: {one_line(error)}") from None
