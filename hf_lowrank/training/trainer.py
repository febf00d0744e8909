"""A run's Trainer: built from its recipe, evaluating per token, resuming with all the weights of a checkpoint."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_lowrank.errors import UserError
from hf_lowrank.runs.checkpoints import weight_files
from hf_lowrank.runs.layout import INDEX, WEIGHTS
from hf_lowrank.runs.weights import quiet_transformers
from hf_lowrank.training.corpus import Corpus
from hf_lowrank.training.recipe import Recipe
from hf_lowrank.training.sequences import IGNORED, HeldOutSequences, collate


class RunTrainer(Trainer):
    """Trainer resumes by the names that tensors have in a running model, and skips all others with a warning.

    Some architectures are stored under other names (the head of GPT-NeoX, the experts of a mixture one by one), and
    would resume from their initial weights. This class can go once Trainer loads those.
    """

    model: PreTrainedModel

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        has_weights = any((folder / name).is_file() for name in (WEIGHTS, INDEX))
        loadable = not self.is_fsdp_enabled and isinstance(self.model, PreTrainedModel) and has_weights
        if loadable and _stored_under_other_names(self.model, folder):
            _load_renamed(self.model, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def _stored_under_other_names(model: PreTrainedModel, folder: Path) -> bool:
    return bool(set(model.state_dict()) - set(weight_files(folder)) - set(model.all_tied_weights_keys))


def _load_renamed(model: PreTrainedModel, folder: Path) -> None:
    with quiet_transformers():
        loaded: Any = type(model).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
        )
    stored, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{folder}: cannot resume: its weights do not contain {missing[0]}")
    model.load_state_dict(stored.state_dict())


def build_trainer(
    recipe: Recipe,
    args: TrainingArguments,
    model: PreTrainedModel,
    corpus: Corpus,
    sequences_per_step: int,
    callbacks: Sequence[TrainerCallback],
) -> RunTrainer:
    """The Trainer of a run, with the optimizer and schedule of the recipe's method.

    Raises:
        UserError: FSDP is asked for where accelerate cannot shard.
    """
    method, settings = recipe.method, recipe.settings
    trainer = RunTrainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=corpus.training_set(args.max_steps * sequences_per_step, recipe.seed),
        eval_dataset=HeldOutSequences(corpus.evaluation.first(recipe.data.evaluation_sequences_in_training)),
        processing_class=corpus.tokenizer,
        callbacks=list(callbacks),
        compute_metrics=token_loss,
        preprocess_logits_for_metrics=drop_logits,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled:
        _shard_states(trainer)
    elif args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise UserError(
            f"FSDP (training.fsdp, or accelerate's configuration) must be left out on {args.device.type}: accelerate "
            "shards on accelerators only, and would train unsharded replicas"
        )
    if method.build_optimizer is not None:
        # After Trainer has moved the parameters to their device; under FSDP2 accelerate exchanges them for shards.
        trainer.optimizer = method.build_optimizer(model, settings, args)
    if method.build_scheduler is not None:
        # create_optimizer returns the optimizer above, or Trainer's own if the method has none.
        scheduler: Any = method.build_scheduler(trainer.create_optimizer(), settings, args, args.max_steps)
        trainer.lr_scheduler = scheduler
    return trainer


def _shard_states(trainer: Trainer) -> None:
    """Under FSDP2 every process saves its own shard of the optimizer state, and initialises the full model itself."""
    plugin = trainer.accelerator.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # left over from the type set before
    plugin.set_state_dict_type("SHARDED_STATE_DICT")
    plugin.cpu_ram_efficient_loading = False


def drop_logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Replaces a batch's logits, which Trainer would gather over the whole evaluation set, by one entry of each."""
    first = logits[0] if isinstance(logits, tuple) else logits
    return first[:, :1, :1].clone()  # a view would keep all of them alive


def token_loss(prediction: EvalPrediction) -> dict[str, float]:
    """The mean loss per predicted token, from the batch means that Trainer assigns to each sequence of a batch.

    Trainer itself weights batches by their sequences, which differs where sequences are padded. Under the name `loss`
    the result replaces Trainer's `eval_loss`.
    """
    tokens = (np.asarray(prediction.label_ids)[:, 1:] != IGNORED).sum(1)
    return {"loss": float((np.asarray(prediction.losses, dtype=np.float64) * tokens).sum() / tokens.sum())}
