"""Losses for the landscape metrics: callables from a model to one number.

Any `loss(model) -> float` works; `TokenLoss` is the one for causal language models. Shapes: N sequences of
T tokens, V words, H hidden units.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from .sharding import ProcessGroup

Loss = Callable[[nn.Module], float]


class TokenLoss:
    """Mean negative log-likelihood per token, in nats, of fixed sequences under a causal language model.

    The model is called as `model(input_ids=…, attention_mask=…, use_cache=False)` and must return `.logits`
    (batch, T, V). The first token of a sequence and padding (mask 0) are not predicted. Sums are kept in float64, so
    that the batch size changes the result by rounding only.

    Args:
        input_ids_NT: (N, T) int64.
        attention_mask_NT: (N, T), 1 for tokens, 0 for padding; None: no padding.
        batch_tokens: about how many tokens a batch has.
        vocabulary_chunk: rows of the output head whose logits are computed at a time; None: all of them where a batch
            of logits takes less than 256 MiB. Chunks need a model with `get_output_embeddings()` whose logits are
            that head's plain output; any other model computes all logits at once.
        shards: the processes over which the model is sharded. A batch has `batch_tokens` for each of them, and each
            evaluates its slice; the sums are gathered in the order of the sequences.

    Raises:
        ValueError: shapes do not match, or no token is predicted.
    """

    def __init__(
        self,
        input_ids_NT: Tensor,
        attention_mask_NT: Tensor | None = None,
        *,
        batch_tokens: int = 4096,
        vocabulary_chunk: int | None = None,
        shards: ProcessGroup | None = None,
    ) -> None:
        mask = torch.ones_like(input_ids_NT) if attention_mask_NT is None else attention_mask_NT
        if input_ids_NT.ndim != 2 or mask.shape != input_ids_NT.shape:
            raise ValueError(
                f"sequences must be (N, T) with a mask of that shape, got {tuple(input_ids_NT.shape)} "
                f"and {tuple(mask.shape)}"
            )
        self.input_ids = input_ids_NT
        self.attention_mask = mask.long()
        self.padded = not bool((self.attention_mask == 1).all())
        self.tokens = int(_predicted(self.attention_mask).sum())
        if self.tokens == 0:
            raise ValueError("the evaluation sequences predict no token: all are shorter than two tokens")
        self.shards = shards
        self.batch_size = max(1, batch_tokens // input_ids_NT.shape[1]) * (1 if shards is None else shards.size)
        self.vocabulary_chunk = vocabulary_chunk
        self._chunkable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def __call__(self, model: nn.Module) -> float:
        """Mean over all predicted tokens; not finite where the model's logits are not."""
        return float(self.per_sequence(model).sum()) / self.tokens

    @torch.no_grad()
    def per_sequence(self, model: nn.Module) -> Tensor:
        """(N,) float64: summed negative log-likelihood of each sequence."""
        shards, sums = self.shards, []
        for ids, mask in self.batches(model):
            if shards is None:
                sums.append(self._batch(model, ids, mask).cpu())
            else:
                own = self._batch(model, shards.batch_slice(ids), shards.batch_slice(mask)).cpu()
                sums.append(shards.gather_batch(own, ids.shape[0]))
        return torch.cat(sums)

    def terms(self, model: nn.Module) -> Iterator[Tensor]:
        """The loss as differentiable scalars that sum to it, one per batch; for gradients and Hessians."""
        for ids, mask in self.batches(model):
            with torch.enable_grad():
                loss = self._cross_entropy(model, ids, mask)
                yield (loss.view(ids.shape[0], -1) * _predicted(mask).to(loss.device)).sum() / self.tokens

    def batches(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (ids, mask) on the model's device, all of one size but the last."""
        device = next(model.parameters()).device
        for start in range(0, self.input_ids.shape[0], self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self.input_ids[rows].to(device), self.attention_mask[rows].to(device)

    def _batch(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        targets, counted = ids[:, 1:], _predicted(mask)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chunk = self._chunk(head, ids)
        if chunk is not None and self._is_plain(model, head, ids):
            with returning_input(head):
                hidden = self._forward(model, ids, mask)[:, :-1]
            with unsharded_root(model):
                loss = chunked_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), head, chunk)
        else:
            loss = self._cross_entropy(model, ids, mask)
        return (loss.view_as(targets).double() * counted.to(loss.device)).sum(1)

    def _cross_entropy(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self._forward(model, ids, mask)[:, :-1].float()
        flat = logits.reshape(-1, logits.shape[-1])
        return functional.cross_entropy(flat, ids[:, 1:].reshape(-1).to(flat.device), reduction="none")

    def _forward(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask if self.padded else None, use_cache=False).logits

    def _chunk(self, head: Any, ids: Tensor) -> int | None:
        if not isinstance(head, nn.Linear):
            return None
        if self.vocabulary_chunk is not None:
            return self.vocabulary_chunk
        logits_bytes = ids.numel() * head.out_features * 4
        return None if logits_bytes < 256 * 2**20 else max(1, 64 * 2**20 // (ids.numel() * 4))

    def _is_plain(self, model: nn.Module, head: Any, ids: Tensor) -> bool:
        """Whether the model's logits are its head's output; some cap or scale them. Tested once per model."""
        if model not in self._chunkable:
            few = self.input_ids[:1, :8].to(ids.device)  # the same in all processes
            mask = torch.ones_like(few)
            expected = self._forward(model, few, mask)
            with returning_input(head):
                hidden = self._forward(model, few, mask)
            same = hidden.shape[:-1] == expected.shape[:-1] and hidden.shape[-1] == head.weight.shape[1]
            with unsharded_root(model):
                self._chunkable[model] = same and torch.allclose(head(hidden), expected, rtol=1e-4, atol=1e-5)
        return self._chunkable[model]


def chunked_cross_entropy(hidden_NH: Tensor, targets_N: Tensor, head: Any, chunk: int) -> Tensor:
    """Negative log-likelihood (N,) float32 of `targets` under `head(hidden)`, `chunk` logits per row at a time.

    A head may have `row_block(start, stop) -> (weight, bias)`; the low-memory engine adds it, so that a perturbed
    output head never exists as a whole.
    """
    rows = getattr(head, "row_block", None) or (
        lambda start, stop: (head.weight[start:stop], None if head.bias is None else head.bias[start:stop])
    )
    hidden_NH, targets_N = hidden_NH.to(head.weight.device), targets_N.to(head.weight.device)
    total = hidden_NH.new_full((hidden_NH.shape[0],), -torch.inf, dtype=torch.float32)
    chosen = torch.zeros_like(total)
    for start in range(0, head.out_features, chunk):
        stop = min(start + chunk, head.out_features)
        logits = functional.linear(hidden_NH, *rows(start, stop)).float()
        inside = (targets_N >= start) & (targets_N < stop)
        index = (targets_N - start).clamp(0, stop - start - 1)
        chosen = torch.where(inside, logits.gather(1, index[:, None]).squeeze(1), chosen)
        total = torch.logaddexp(total, logits.logsumexp(1))
    return total - chosen


@contextmanager
def unsharded_root(model: Any) -> Iterator[None]:
    """Gathers the parameters of the root of a model under FSDP2 (embeddings, output head) in the block."""
    with ExitStack() as stack:
        if hasattr(model, "unshard"):
            model.unshard()
            stack.callback(model.reshard)
        yield


@contextmanager
def returning_input(module: Any) -> Iterator[None]:
    """Makes calls of `module` return their input for the time of the block."""
    had = module.__dict__.get("forward")
    module.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if had is not None:
            module.forward = had


def _predicted(mask: Tensor) -> Tensor:
    """(N, T−1) bool: positions where neither the token nor the next one is padding."""
    return (mask[:, 1:] == 1) & (mask[:, :-1] == 1)
