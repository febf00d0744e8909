"""Similarity of two models' activations, layer by layer, in one pass over both.

Only sums are kept, so memory is O(layers · H²) for any number of tokens. Shapes: N positions (rows), D and E features
of the two sides, B × T tokens of a batch, H hidden units.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .directions import keyed_generator
from .losses import returning_input
from .sharding import ProcessGroup


@dataclass(frozen=True)
class LayerSimilarity:
    """One layer of a model compared with the same layer of its baseline.

    Attributes:
        l2: mean distance of the hidden states divided by the mean norm of the baseline's; 0 where they are equal.
        cosine: mean cosine per position, in [−1, 1].
        cka: linear CKA (the biased estimator), in [0, 1]; NaN for a constant layer.
        cka_debiased: the debiased estimator, at most 1; NaN for fewer than four positions or a constant layer.
    """

    l2: float
    cosine: float
    cka: float
    cka_debiased: float


class CkaSums:
    """Running float64 sums that determine linear CKA, biased and debiased; rows may arrive in batches of any size."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def update(self, x_ND: Tensor, y_NE: Tensor) -> None:
        """Adds N rows of both sides."""
        if x_ND.shape[0] != y_NE.shape[0]:
            raise ValueError(f"both sides need the same number of rows, got {x_ND.shape[0]} and {y_NE.shape[0]}")
        x, y = x_ND.double(), y_NE.double()
        a, b = x.square().sum(1), y.square().sum(1)
        terms = {
            "xx": x.mT @ x, "xy": x.mT @ y, "yy": y.mT @ y, "x": x.sum(0), "y": y.sum(0),
            "a": a.sum(), "b": b.sum(), "aa": a @ a, "ab": a @ b, "bb": b @ b,
            "ax": a @ x, "ay": a @ y, "bx": b @ x, "by": b @ y,
        }  # fmt: skip
        self.count += x.shape[0]
        for name, term in terms.items():
            self.sums[name] = self.sums[name].add_(term) if name in self.sums else term

    def value(self, *, debiased: bool = False) -> float:
        """Linear CKA of all rows so far.

        Raises:
            ValueError: a side is constant over the rows, or there are too few of them.
        """
        if self.count < (4 if debiased else 2):
            raise ValueError(f"CKA needs at least {4 if debiased else 2} rows, got {self.count}")
        both = self._similarity("x", "y", debiased)
        one, other = self._similarity("x", "x", debiased), self._similarity("y", "y", debiased)
        for side, letter in (("first", "x"), ("second", "y")):
            gram, total = self.sums[letter * 2], self.sums[letter]
            spread = float(torch.trace(gram)) - float(total @ total) / self.count
            if not spread > 1e-12 * float(torch.trace(gram)):
                raise ValueError(f"CKA is undefined: the {side} side is constant over the rows")
        return both / math.sqrt(one * other) if one > 0 and other > 0 else math.nan

    def _similarity(self, left: str, right: str, debiased: bool) -> float:
        """‖X̃ᵀỸ‖_F² of the centred sides, without the diagonal's bias if `debiased`."""
        n, s = self.count, self.sums
        mean_left, mean_right = s[left] / n, s[right] / n
        gram = s[left + right]
        value = float((gram - n * torch.outer(mean_left, mean_right)).square().sum())
        if not debiased:
            return value
        norm = {"x": "a", "y": "b"}
        a, b = s[norm[left]], s[norm[right]]
        m, k = mean_left @ mean_left, mean_right @ mean_right
        diagonal = (
            s[norm[left] + norm[right]]
            - 2 * mean_right @ s[norm[left] + right]
            - 2 * mean_left @ s[norm[right] + left]
            + 4 * mean_left @ gram @ mean_right
            + k * a
            + m * b
            - 3 * n * m * k
        )
        spread = (a - n * m) * (b - n * k)
        return value - n / (n - 2) * float(diagonal) + float(spread) / ((n - 1) * (n - 2))


def linear_cka(x_ND: Tensor, y_NE: Tensor, *, debiased: bool = False) -> float:
    """Linear centred kernel alignment of two sets of features of the same N positions (arXiv 1905.00414).

    Invariant to rotation and scale of either side. In [0, 1] for the usual biased estimator; the debiased one
    (arXiv 2010.15327) is at most 1, and near 0 for independent features. Rows are positions.

    Raises:
        ValueError: the numbers of rows differ, there are too few, or a side is constant.
    """
    sums = CkaSums()
    sums.update(x_ND, y_NE)
    return sums.value(debiased=debiased)


class _Layer:
    def __init__(self) -> None:
        self.distance = self.norm = self.cosine = 0.0
        self.cka = CkaSums()

    def update(self, x: Tensor, y: Tensor) -> None:
        norm_x, norm_y = (torch.linalg.vector_norm(side, dim=1) for side in (x, y))
        self.distance += float(torch.linalg.vector_norm(x - y, dim=1).double().sum())
        self.norm += float(norm_y.double().sum())
        product = (x * y).sum(1) / (norm_x * norm_y).clamp_min(1e-30)
        self.cosine += float(product.double().sum())
        self.cka.update(x, y)

    def result(self, positions: int) -> LayerSimilarity | None:
        """None where the hidden states are not finite."""
        if not math.isfinite(self.distance + self.norm):
            return None
        ckas = []
        for debiased in (False, True):
            try:
                ckas.append(self.cka.value(debiased=debiased))
            except ValueError:
                ckas.append(math.nan)
        distance = self.distance / self.norm if self.norm > 0 else math.nan
        return LayerSimilarity(distance, self.cosine / positions, *ckas)


HiddenStates = Callable[[Any, Tensor, Tensor], Sequence[Tensor]]


def causal_lm_hidden_states(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> Sequence[Tensor]:
    """Embedding output, every block's output, the last one after the final norm: L + 1 tensors (B, T, H).

    For models with the calling convention of transformers; the output head is bypassed, so no logits are computed.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    padded = not bool((mask_BT == 1).all())
    with nullcontext() if head is None else returning_input(head):
        output = model(
            input_ids=ids_BT,
            attention_mask=mask_BT if padded else None,
            use_cache=False,
            output_hidden_states=True,
        )
    return output.hidden_states


@torch.no_grad()
def activation_similarity(
    model: nn.Module,
    base: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    hidden_states: HiddenStates = causal_lm_hidden_states,
    shards: ProcessGroup | None = None,
) -> list[LayerSimilarity]:
    """Distance, cosine and CKA of two models' hidden states over all unmasked positions, for every layer.

    Args:
        model, base: in eval mode; sums are kept on the device of the batches.
        batches: pairs (ids, mask) of (B, T); mask 1 for tokens, 0 for padding.
        hidden_states: (model, ids, mask) -> tensors (B, T, H), the same number for both models.
        shards: the processes over which both models are sharded. Each runs its slice of a batch, and keeps the sums of
            every `shards.size`-th layer, to which all send their hidden states.

    Raises:
        ValueError: layers differ in number or size, there is no unmasked position, or a value is not finite.
    """
    layers: list[_Layer] = []
    positions = 0
    for ids, mask in batches:
        rows = mask.flatten() == 1
        inputs = (ids, mask) if shards is None else (shards.batch_slice(ids), shards.batch_slice(mask))
        ours, theirs = list(hidden_states(model, *inputs)), list(hidden_states(base, *inputs))
        if len(ours) != len(theirs):
            raise ValueError(f"the models must have as many layers, got {len(ours)} and {len(theirs)} hidden states")
        layers = layers or [_Layer() for _ in ours]
        positions += int(rows.sum())
        for index, layer in enumerate(layers):
            pair: list[Any] = [ours[index], theirs[index]]
            ours[index] = theirs[index] = rows[:0]  # frees the hidden states after their layer
            sizes = [states.shape[-1] for states in pair]
            if sizes[0] != sizes[1]:
                raise ValueError(f"hidden states {index} must have one size, got {sizes[0]} and {sizes[1]}")
            if shards is not None:
                pair = [shards.gather_batch_at(index % shards.size, states, ids.shape[0]) for states in pair]
            if pair[0] is not None:
                layer.update(*(states.flatten(0, 1).to(rows.device)[rows] for states in pair))
            del pair
    if positions == 0:
        raise ValueError("there is no unmasked position to compare")
    results = [layer.result(positions) for layer in (layers if shards is None else shards.strided(layers))]
    if shards is not None:
        results = shards.interleave(shards.all_gather(results), len(layers))
    found = [result for result in results if result is not None]
    if len(found) < len(layers):
        raise ValueError(f"hidden states {results.index(None)} are not finite")
    return found


def random_positions(total: int, count: int, seed: int) -> Tensor:
    """At most `count` of `total` positions, drawn without replacement, ascending."""
    return torch.randperm(total, generator=keyed_generator("positions", seed))[:count].sort().values


@torch.no_grad()
def sampled_hidden_states(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    positions_N: Tensor,
    *,
    hidden_states: HiddenStates = causal_lm_hidden_states,
    shards: ProcessGroup | None = None,
) -> list[Tensor]:
    """Every layer's hidden states (N, H) at some of the unmasked positions, on the CPU.

    Args:
        model, batches, hidden_states: as for `activation_similarity`.
        positions_N: ascending indices into the unmasked positions of all batches.
        shards: the processes over which the model is sharded; each runs its slice of a batch, and all get the result.

    Raises:
        ValueError: a hidden state is not finite.
    """
    layers: list[list[Tensor]] = []
    seen = 0
    for ids, mask in batches:
        rows = (mask.flatten() == 1).nonzero().squeeze(1).cpu()
        chosen = rows[positions_N[(positions_N >= seen) & (positions_N < seen + len(rows))] - seen]
        seen += len(rows)
        inputs = (ids, mask) if shards is None else (shards.batch_slice(ids), shards.batch_slice(mask))
        for index, states in enumerate(hidden_states(model, *inputs)):
            whole = states.cpu() if shards is None else shards.gather_batch(states.cpu(), ids.shape[0])
            if len(layers) == index:
                layers.append([])
            layers[index].append(whole.flatten(0, 1)[chosen].clone())
    found = [torch.cat(parts) for parts in layers]
    if (bad := next((i for i, x in enumerate(found) if not bool(x.isfinite().all())), None)) is not None:
        raise ValueError(f"hidden states {bad} are not finite")
    return found
