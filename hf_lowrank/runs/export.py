"""Exporting a trained checkpoint to the plain architecture, which loads without this package."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_lowrank.adapters.modeling import LowRankForCausalLM
from hf_lowrank.runs.weights import check_checkpoint, quiet_transformers
from hf_lowrank.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
)

MAKING = ".making"


def checkpoint_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """The folder that `RUN@STEP`, or the path of a checkpoint itself, names.

    Raises:
        UserError: there is no such run, no such step (the message lists those there are), or no config.json.
    """
    text = os.fspath(checkpoint)
    folder = Path(text)
    if not folder.is_dir() and "@" in text:
        run, _, step = text.rpartition("@")
        if not Path(run).is_dir():
            raise UserError(f"{run}: no run directory there")
        folder = Path(run) / f"checkpoint-{step.removeprefix('step-')}"
        if not folder.is_dir():
            names = (path.name.removeprefix("checkpoint-") for path in Path(run).iterdir())
            steps = ", ".join(map(str, sorted(int(name) for name in names if name.isdigit()))) or "none"
            raise UserError(f"{run}: no checkpoint of step {step}; there are: {steps}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no checkpoint there (config.json is missing); give RUN@STEP or a folder")
    return folder


def export(checkpoint: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Writes the checkpoint's model as the plain base architecture, with its tokenizer, to the folder `output`.

    Args:
        checkpoint: `RUN@STEP`, or the path of a checkpoint folder.
        output: a folder that is not there yet, or is empty.

    Returns:
        The folder.

    Raises:
        UserError: the checkpoint is not there or damaged, has no dense equivalent (CoLA), or the folder is not empty.
    """
    folder = checkpoint_folder(checkpoint)
    target = Path(output)
    making = target / MAKING if target.is_dir() else target.with_name(f".{target.name}{MAKING}")
    if target.exists() and (not target.is_dir() or set(target.iterdir()) - {making}):
        raise UserError(f"{target}: the output must be a new or empty folder")
    check_checkpoint(folder)
    try:
        with quiet_transformers():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    except Exception as error:  # transformers raises whatever a broken file leads it to
        raise UserError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    dense = model.to_dense() if isinstance(model, LowRankForCausalLM) else model
    shutil.rmtree(making, ignore_errors=True)
    try:
        with quiet_transformers():
            dense.save_pretrained(making)
        for source in (folder, folder.parent / "tokenizer"):
            found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
            for file in found:
                shutil.copyfile(file, making / file.name)
            if found:
                break
        if target.is_dir():  # it may be a mount or a link: it stays, and is a model with its last file
            for file in sorted(making.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, target / file.name)
        else:
            os.replace(making, target)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return target
