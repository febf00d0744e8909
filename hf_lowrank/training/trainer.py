"""transformers' Trainer, resuming with all the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from hf_lowrank.errors import UserError
from hf_lowrank.runs.sources import INDEX, WEIGHTS, weight_files
from hf_lowrank.runs.weights import quiet_transformers


class WholeTrainer(Trainer):
    """Trainer loads by the names that a model's tensors have while it runs, and passes over all others with a warning.

    Some architectures are stored under other names, as GPT-NeoX's head, or a mixture's experts one by one: those would
    go on from their first weights. Where Trainer learns to load those this class has no more to do.
    """

    model: PreTrainedModel

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        has_weights = any((folder / name).is_file() for name in (WEIGHTS, INDEX))
        stored = not self.is_fsdp_enabled and isinstance(self.model, PreTrainedModel) and has_weights
        if stored and _lacking(self.model, folder):
            _load_stored(self.model, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def _lacking(model: PreTrainedModel, folder: Path) -> set[str]:
    """Tensors of `model` that are in a checkpoint under no name of theirs."""
    return set(model.state_dict()) - set(weight_files(folder)) - set(model.all_tied_weights_keys)


def _load_stored(model: PreTrainedModel, folder: Path) -> None:
    with quiet_transformers():
        loaded: Any = type(model).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
        )
    stored, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"{folder}: cannot be continued from: {missing[0]} is not among its weights")
    model.load_state_dict(stored.state_dict())
