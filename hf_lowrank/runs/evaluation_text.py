"""Evaluation sets that a user names: a safetensors file, or a text file for models without a set of their own."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs.checkpoints import check_files
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.layout import TOKENIZER
from hf_lowrank.runs.trajectory import Trajectory

SEQUENCE_LENGTH = 256


def resolve_evaluation_set(
    given: EvaluationSet | str | os.PathLike[str] | None, trajectory: Trajectory
) -> EvaluationSet | None:
    """The set that a safetensors file or its folder holds, or that a `.txt` file gives with the run's tokenizer."""
    if given is None or isinstance(given, EvaluationSet):
        return given
    path = Path(given)
    return evaluation_set_from_text(path, trajectory) if path.suffix == ".txt" else EvaluationSet.load(path)


def evaluation_set_from_text(path: Path, trajectory: Trajectory, length: int = SEQUENCE_LENGTH) -> EvaluationSet:
    """The file's text, packed into sequences of `length` tokens of the trajectory's tokenizer; a shorter rest is
    dropped.

    Raises:
        UserError: the file is unreadable or too short, or the checkpoints have no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {one_line(error)}") from None
    folder = trajectory.extra(TOKENIZER)
    if folder is not None:
        check_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder or trajectory.tokenizer_source)
    except (OSError, ValueError) as error:
        raise UserError(f"{trajectory.path}: has no tokenizer: {one_line(error, 200)}") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = len(ids) // length
    if count == 0:
        raise UserError(f"{path}: must hold at least {length} tokens, got {len(ids)}")
    input_ids = torch.tensor(ids[: count * length]).view(count, length)
    return EvaluationSet(input_ids, torch.ones_like(input_ids))
