"""Exporting a checkpoint to its base architecture, which loads without this package."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_lowrank.adapters.modeling import LowRankForCausalLM
from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs.foreign_adapters import is_adapter, merged
from hf_lowrank.runs.layout import CONFIG, TOKENIZER, TOKENIZER_FILES
from hf_lowrank.runs.loading import load_in_float32
from hf_lowrank.runs.selection import find_checkpoint
from hf_lowrank.runs.weights import check_checkpoint, quantization_of, quiet_transformers, read_config

MAKING = ".making"


def export(checkpoint: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Writes the model of a checkpoint, `RUN@STEP` or its folder, in its base architecture and with the tokenizer, to
    a new or empty folder, and returns that. Quantised weights become dense ones of the configuration's type.

    Raises:
        UserError: the checkpoint is missing or damaged, has no dense equivalent (CoLA), or the folder is not empty.
    """
    folder = Path(find_checkpoint(checkpoint).path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give RUN@STEP or the folder of a checkpoint")
    if is_adapter(folder) and not (folder / CONFIG).is_file():
        folder = merged(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not a checkpoint ({CONFIG} is missing); give RUN@STEP or a folder")
    target = Path(output)
    making = target / MAKING if target.is_dir() else target.with_name(f".{target.name}{MAKING}")
    if target.exists() and (not target.is_dir() or set(target.iterdir()) - {making}):
        raise UserError(f"{target}: the output must be a new or empty folder")
    check_checkpoint(folder)
    try:
        config = read_config(folder)
        with quiet_transformers():
            if quantization_of(config) is not None:
                model: Any = load_in_float32(folder, config)
                model.to(config.dtype or torch.float32)
            else:
                model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    except Exception as error:  # transformers raises whatever a broken file leads it to
        raise UserError(f"{folder}: cannot be loaded: {one_line(error)}") from None
    dense = model.to_dense() if isinstance(model, LowRankForCausalLM) else model
    shutil.rmtree(making, ignore_errors=True)
    try:
        with quiet_transformers():
            dense.save_pretrained(making)
        for source in (folder, folder.parent / TOKENIZER):
            found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
            for file in found:
                shutil.copyfile(file, making / file.name)
            if found:
                break
        if target.is_dir():  # keep it, as it may be a mount or a link; config.json comes last and completes the model
            for file in sorted(making.iterdir(), key=lambda file: file.name == CONFIG):
                os.replace(file, target / file.name)
        else:
            os.replace(making, target)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return target
