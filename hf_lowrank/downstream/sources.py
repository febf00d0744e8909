"""The tokenizer and the context length of a checkpoint."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_lowrank.errors import UserError, first_line
from hf_lowrank.runs.checkpoints import check_files
from hf_lowrank.runs.layout import TOKENIZER, TOKENIZER_FILES
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.runs.weights import positions_of


def tokenizer_folder(trajectory: Trajectory, step: int) -> str:
    """The folder of a checkpoint's tokenizer: its own, else the run's `tokenizer/`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    where = trajectory.where(step)
    if not Path(where).is_dir():
        return where
    for folder in filter(None, (Path(where), trajectory.extra(TOKENIZER))):
        if files := [name for name in TOKENIZER_FILES if (folder / name).is_file()]:
            check_files(folder, files)
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
        raise UserError(f"{folder}: the tokenizer cannot be read: {first_line(error)}") from None


def context_length(trajectory: Trajectory) -> int:
    """The context length in tokens: that of the recipe's sequences, at most that of the architecture."""
    limits = [positions_of(trajectory.config)]
    recipe = trajectory.run.recipe or {}
    limits.append((recipe.get("data") or {}).get("sequence_length"))
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min([*known, 2048])
