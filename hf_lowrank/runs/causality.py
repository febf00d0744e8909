"""Whether a model predicts every token from those before it alone, without which its loss says nothing."""

from typing import Any

import torch
from torch import Tensor

from hf_lowrank.errors import UserError
from hf_lowrank.runs.weights import positions_of

# Enough for attention to mix tokens; a model of any size computes them in moments.
PROBED_TOKENS = 32
# Earlier logits may differ by rounding, e.g. where a mixture groups tokens by expert: so many units of the dtype.
ROUNDING = 64.0


@torch.no_grad()
def leak(model: Any, input_ids: Tensor) -> float:
    """How far the last token of a sequence changes the logits before it, relative to the largest logit.

    Args:
        model: returns `.logits` (1, T, V).
        input_ids: (1, T), at least two tokens, on the model's device.
    """
    other = input_ids.clone()
    other[:, -1] = torch.where(other[:, -1] == 0, 1, other[:, -1] - 1)
    training = model.training
    model.eval()
    try:
        one, two = (model(input_ids=ids, use_cache=False).logits.float() for ids in (input_ids, other))
    finally:
        model.train(training)
    return float((one[:, :-1] - two[:, :-1]).abs().max() / one.abs().max())


def check_causal(model: Any, where: str, input_ids: Tensor | None = None) -> None:
    """Raises a `UserError` if a token changes the predictions before it.

    Args:
        model: a causal language model, in any mode.
        where: what to name in the message: a checkpoint, or a recipe.
        input_ids: (N, T) the sequences of which the start of the first is tried; default: drawn from a fixed seed.
    """
    config = model.config.get_text_config()
    if input_ids is None:
        length = min(PROBED_TOKENS, positions_of(config) or PROBED_TOKENS)
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    sequence = input_ids[:1, :PROBED_TOKENS].to(next(model.parameters()).device)
    if sequence.shape[1] < 2 or not leak(model, sequence) > ROUNDING * torch.finfo(model.dtype).eps:
        return
    switch = next((name for name in ("is_decoder", "causal") if getattr(config, name, None) is False), None)
    remedy = f"set {switch}: true in its configuration" if switch else "choose a causal architecture"
    raise UserError(
        f"{where}: {config.model_type} is not causal here: a token changes the predictions before it, which would be "
        f"given the answer; {remedy}"
    )
