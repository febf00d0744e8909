"""The checkpoints that `pretrained=` may name, with their tokenizer and context length."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_lowrank.errors import UserError
from hf_lowrank.runs.checkpoints import check_files
from hf_lowrank.runs.layout import CONFIG, RECIPE, TOKENIZER, TOKENIZER_FILES
from hf_lowrank.runs.trajectory import Trajectory

AT_STEP = re.compile(r"(?P<run>.+)@(?P<step>\d+|last)")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as lm-eval's `pretrained` and `revision` name it.

    Attributes:
        path: a folder with the weights, or a repository on the Hub.
        revision: of a repository; None for a folder.
        run: the run directory of the folder; None if it is not in one.
    """

    path: str
    revision: str | None = None
    run: Path | None = None


def find_checkpoint(pretrained: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """The checkpoint that `pretrained` names: `RUN/checkpoint-N`, `RUN@N`, `RUN@last`, `RUN` (its last one), an
    exported folder, or `user/repo` with a `revision` such as `step-N`.

    Raises:
        UserError: a local run has no such checkpoint.
    """
    text = os.fspath(pretrained)
    local = Path(text)
    match = None if local.is_dir() else AT_STEP.fullmatch(text)
    if match and Path(match["run"]).is_dir():
        trajectory = Trajectory(match["run"])
        step = trajectory.steps[-1] if match["step"] == "last" else int(match["step"])
        return Checkpoint(trajectory.where(step), None, Path(match["run"]))
    if local.is_dir():
        if (local / CONFIG).is_file():
            folder = local.resolve().parent
            return Checkpoint(text, None, folder if (folder / RECIPE).is_file() else None)
        trajectory = Trajectory(text)
        return Checkpoint(trajectory.where(trajectory.steps[-1]), None, local)
    if os.sep in text and (text.startswith((".", "/", "~")) or text.count("/") > 1):
        raise UserError(f"{text}: no such folder; give RUN/checkpoint-N, RUN@N, an exported folder or user/repo")
    repository, _, named = text.partition("@")
    return Checkpoint(repository, named or revision)


def tokenizer_folder(trajectory: Trajectory, step: int) -> str:
    """The folder of a checkpoint's tokenizer: its own, else the run's `tokenizer/`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    where = trajectory.where(step)
    if not Path(where).is_dir():
        return where
    candidates = [Path(where), trajectory.extra(TOKENIZER)]
    for folder in candidates:
        files = [] if folder is None else [name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
        if files:
            check_files(Path(folder), files)
            return str(folder)
    raise UserError(
        f"{where}: has no tokenizer, which downstream tasks need, nor has its run; save one there with save_pretrained"
    )


def load_tokenizer(trajectory: Trajectory, step: int) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer.

    Raises:
        UserError: it has none, or it cannot be read.
    """
    folder = tokenizer_folder(trajectory, step)
    repository, _, revision = folder.partition("@") if not Path(folder).is_dir() else (folder, "", "")
    try:
        return AutoTokenizer.from_pretrained(repository, revision=revision or None)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the tokenizer cannot be read: {reason}") from None


def context_length(trajectory: Trajectory) -> int:
    """The context length in tokens: that of the recipe's sequences, at most that of the architecture."""
    config = trajectory.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    recipe = trajectory.run.recipe or {}
    limits.append((recipe.get("data") or {}).get("sequence_length"))
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min([*known, 2048])
