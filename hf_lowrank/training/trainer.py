"""Trainer for runs: whatever the architecture, it learns to predict the next token and reports how well it does."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, Trainer
from transformers.trainer_pt_utils import LabelSmoother

from hf_lowrank.errors import UserError
from hf_lowrank.runs.checkpoints import weight_files
from hf_lowrank.runs.layout import INDEX, WEIGHTS
from hf_lowrank.runs.weights import quiet_transformers
from hf_lowrank.training.sequences import IGNORED
from hf_lowrank.training.trial import OwnLoss, auxiliary_weight, next_token_loss


def training_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Any = None, *, smoothing: float, auxiliary: float
) -> Tensor:
    """The next-token cross-entropy with label smoothing, plus `auxiliary` times a mixture's auxiliary loss.

    transformers decides by a model's class name whether to shift labels, and some of its decoders (BART, TrOCR) never
    do: they would learn to repeat the present token.
    """
    loss = LabelSmoother(smoothing)(outputs, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)
    extra = getattr(outputs, "aux_loss", None)
    return loss if extra is None or not auxiliary else loss + auxiliary * extra.to(loss.device)


class RunTrainer(Trainer):
    """Trainer, of which two things differ for every architecture and method.

    - The loss. `eval_loss` is the plain next-token cross-entropy, whatever training adds to it (label smoothing, a
      mixture's auxiliary loss) and whatever else a model returns. The training loss is the model's own where that
      predicts the next token, and where accumulation does not count an auxiliary loss several times.
    - Resuming. Trainer resumes by the names that tensors have in a running model, and skips all others with a
      warning. Some architectures are stored under other names (the head of GPT-NeoX, the experts of a mixture one by
      one), and would resume from their initial weights. That can go once Trainer loads those.

    Args:
        own_loss: what `try_model` found.
    """

    model: PreTrainedModel

    def __init__(self, *, own_loss: OwnLoss = "plain", **options: Any) -> None:
        self._own_loss = own_loss
        smoothing, parts = options["args"].label_smoothing_factor, options["args"].gradient_accumulation_steps
        if smoothing or own_loss == "other" or (own_loss == "auxiliary" and parts > 1):
            # Of a step in parts, the auxiliary loss is the mean over them, not the sum.
            auxiliary = auxiliary_weight(options["model"]) / parts
            options["compute_loss_func"] = partial(training_loss, smoothing=smoothing, auxiliary=auxiliary)
        super().__init__(**options, preprocess_logits_for_metrics=drop_logits, compute_metrics=token_loss)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A batch's mean loss per predicted token, its logits and its labels."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        tokens = (labels[:, 1:] != IGNORED).sum()
        options = {"num_items_in_batch": tokens} if self.model_accepts_loss_kwargs else {}
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, **options)
        loss = outputs.loss if self._own_loss == "plain" else next_token_loss(outputs.logits, labels)
        return loss.detach(), outputs.logits, labels

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        has_weights = any((folder / name).is_file() for name in (WEIGHTS, INDEX))
        if self.is_fsdp_enabled or not isinstance(self.model, PreTrainedModel) or not has_weights:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not set(self.model.state_dict()) - set(weight_files(folder)) - set(self.model.all_tied_weights_keys):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        options: Any = {"dtype": self.model.dtype, "use_safetensors": True, "output_loading_info": True}
        with quiet_transformers():
            loaded: Any = type(self.model).from_pretrained(folder, **options)
        stored, info = loaded
        if info["missing_keys"]:
            raise UserError(f"{folder}: cannot resume: its weights do not contain {min(info['missing_keys'])}")
        self.model.load_state_dict(stored.state_dict())


def drop_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Replaces a batch's logits, which Trainer would gather over the whole evaluation set, by one entry of each."""
    return logits[:, :1, :1].clone()  # a view would keep all of them alive


def token_loss(prediction: EvalPrediction) -> dict[str, float]:
    """The mean loss per predicted token, from the batch means that Trainer assigns to each sequence of a batch.

    Trainer itself weights batches by their sequences, which differs where sequences are padded. Under the name `loss`
    the result replaces Trainer's `eval_loss`.
    """
    tokens = (np.asarray(prediction.label_ids)[:, 1:] != IGNORED).sum(1)
    return {"loss": float((np.asarray(prediction.losses, dtype=np.float64) * tokens).sum() / tokens.sum())}
