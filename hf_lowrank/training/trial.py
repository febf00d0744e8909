"""A new model's first forward and backward pass, before a run begins: what fails, does nothing or cheats is named."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import PreTrainedModel

from hf_lowrank.adapters.eight_bit import EightBitLinear
from hf_lowrank.errors import LowRankWarning, UserError, one_line
from hf_lowrank.runs.causality import PROBED_TOKENS, check_causal
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.training.kernels import attention_of_any_device
from hf_lowrank.training.sequences import IGNORED, HeldOutSequences, collate

logger = logging.getLogger(__name__)

# What a model's own loss is: the next-token cross-entropy, that plus a mixture's auxiliary loss, or anything else.
OwnLoss = Literal["plain", "auxiliary", "other"]

TRIED_SEQUENCES = 2


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of each label that is not -100 under the logits one position before it, in nats.

    Args:
        logits: (B, T, V).
        labels: (B, T), not shifted.
    """
    following = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    flat = logits.float().reshape(-1, logits.shape[-1])
    total = functional.cross_entropy(
        flat, following.reshape(-1).to(flat.device), ignore_index=IGNORED, reduction="sum"
    )
    return total / (following != IGNORED).sum()


def auxiliary_weight(model: PreTrainedModel) -> float:
    """How much of its auxiliary loss a mixture adds to its loss; 0 for other models."""
    return getattr(model.config.get_text_config(), "router_aux_loss_coef", None) or 0.0


def try_model(model: PreTrainedModel, evaluation: EvaluationSet, where: str) -> OwnLoss:
    """Runs the model forward and backward on the start of a few sequences, and says what its own loss is.

    Weights, buffers and torch's global generator stay as they are.

    Raises:
        UserError: the model is not causal or cannot compute, or an adapted layer is not used; names the module.
    """
    rows = EvaluationSet(
        *(t[:TRIED_SEQUENCES, :PROBED_TOKENS] for t in (evaluation.input_ids, evaluation.attention_mask))
    )
    batch = collate([HeldOutSequences(rows)[index] for index in range(len(rows))])
    longest = evaluation.input_ids[:1].to(model.device)
    entered: list[nn.Module] = []
    names = {module: name for name, module in model.named_modules()}
    training = model.training
    try:
        with (
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            attention_of_any_device(model),
            _tracing(entered) as active,
        ):
            warnings.simplefilter("ignore")
            check_causal(model, where, rows.input_ids)
            with torch.no_grad():
                model.eval()(input_ids=longest)
            entered.clear()
            outputs = model.train()(**batch)
            outputs.loss.backward()
            inert = {
                n: p.numel() for n, p in model.named_parameters() if p.ndim > 1 and p.requires_grad and p.grad is None
            }
    except UserError:
        raise
    except Exception as error:  # any operation may fail, with any error
        inside = next((names[module] for module in reversed(active) if names.get(module)), type(model).__name__)
        hint = ""
        if getattr(model.config.get_text_config(), "pad_token_id", 0) is None:
            hint = "; if it needs a padding token, choose a tokenizer with one that the text does not contain"
        raise UserError(
            f"{where}: the model cannot compute: {inside}: {type(error).__name__}: {one_line(error)}{hint}"
        ) from error
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
    if inert:
        share = sum(inert.values()) / sum(map(nn.Parameter.numel, model.parameters()))
        more = f" and {len(inert) - 1} more" if len(inert) > 1 else ""
        warnings.warn(
            f"{next(iter(inert))}{more}, {share:.0%} of the model, take no part in a prediction and do not train (or "
            f"are experts that {batch['labels'].numel()} tokens do not reach)",
            LowRankWarning,
            stacklevel=2,
        )
    _check_used(model, {names[module] for module in entered if module in names}, where)
    return _own_loss(model, outputs, batch["labels"])


@torch.no_grad()
def check_documents_apart(model: PreTrainedModel, evaluation: EvaluationSet, where: str) -> None:
    """Raises a `UserError` if a document's logits depend on what shares its sequence, whatever the positions say.

    Recurrent blocks and convolutions carry state across documents, and some architectures take positions from the
    place in the sequence alone.
    """
    lengths = evaluation.attention_mask.sum(1).tolist()
    one = evaluation.input_ids[0, : min(lengths[0], PROBED_TOKENS)].to(model.device)
    two = evaluation.input_ids[-1, : min(lengths[-1], PROBED_TOKENS // 2)].to(model.device)
    ids = torch.stack([torch.cat([one, two]), torch.cat([two, one])])
    positions = [torch.arange(len(document), device=model.device) for document in (one, two)]
    orders = torch.stack([torch.cat(positions), torch.cat(positions[::-1])])
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]), attention_of_any_device(model):
            model.eval()
            alone = [model(input_ids=document[None], use_cache=False).logits[0].float() for document in (one, two)]
            packed = model(input_ids=ids, position_ids=orders, use_cache=False).logits.float()
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        found = f"fails: {type(error).__name__}: {one_line(error)}"
    else:
        expected = torch.stack([torch.cat(alone), torch.cat(alone[::-1])])
        difference = float((packed - expected).abs().max() / expected.abs().max())
        # float32's own rounding stays below 1e-5; a model that carries anything across changes its logits by percents.
        if difference <= max(1e-4, 4 * torch.finfo(model.dtype).eps):
            return
        found = f"changes a document's logits by {difference:.1g} of the largest"
    finally:
        model.train(training)
    raise UserError(
        f"{where}: data.shape must be packed or documents with model.architecture "
        f"{model.config.get_text_config().model_type}, which {found} when documents share a sequence"
    )


@contextmanager
def _tracing(entered: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Appends the modules that are called to `entered`, and yields those that are being called, outermost first."""
    active: list[nn.Module] = []

    def enter(module: nn.Module, *_: Any) -> None:
        entered.append(module)
        active.append(module)

    def leave(*_: Any) -> None:
        active.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield active
    finally:
        for hook in hooks:
            hook.remove()


def _check_used(model: nn.Module, called: set[str], where: str) -> None:
    """Raises a `UserError` for a replaced layer that the module around it does not call but reads the weight of."""
    for name, layer in model.named_modules():
        parent = name.rpartition(".")[0]
        if isinstance(layer, BaseTunerLayer | EightBitLinear) and name not in called and parent in called:
            missed = "adapter would do nothing" if isinstance(layer, BaseTunerLayer) else "codes would not be read"
            raise UserError(
                f"{where}: {name.removeprefix('lm.')} is never called by the module around it, so its {missed}; "
                "choose method.target_modules without it"
            )


def _own_loss(model: PreTrainedModel, outputs: Any, labels: Tensor) -> OwnLoss:
    with torch.no_grad():
        plain, extra = float(next_token_loss(outputs.logits, labels)), getattr(outputs, "aux_loss", None)
        added = 0.0 if extra is None else auxiliary_weight(model) * float(extra)
    own = float(outputs.loss.detach())
    kind: OwnLoss = "other"
    if abs(own - plain - added) <= 1e-4 * plain:
        kind = "auxiliary" if added else "plain"
    elif math.isfinite(own):
        logger.info("%s: training by the next-token cross-entropy, which its own loss is not", type(model).__name__)
    return kind
