"""How alike two models' activations are, layer by layer, in one pass over both.

Nothing but sums is kept: memory is O(layers · H²), whatever the number of tokens. Shapes: N positions (rows), D and
E features of the two sides, B × T tokens of a batch, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .losses import returning_input
from .team import Team


@dataclass(frozen=True)
class LayerSimilarity:
    """One layer of a model against the same of its baseline.

    Attributes:
        l2: mean distance of the hidden states over the mean norm of the baseline's; 0 for equal ones.
        cosine: mean cosine per position, in [−1, 1].
        cka: linear CKA, in [0, 1], the biased estimator; NaN for a constant layer.
        cka_debiased: the debiased estimator, at most 1; NaN below four positions or for a constant layer.
    """

    l2: float
    cosine: float
    cka: float
    cka_debiased: float


class CkaSums:
    """Running float64 sums from which linear CKA follows, biased or debiased; rows may come in any portions."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def update(self, x_ND: Tensor, y_NE: Tensor) -> None:
        """Adds N rows of both sides."""
        if x_ND.shape[0] != y_NE.shape[0]:
            raise ValueError(f"both sides need as many rows, got {x_ND.shape[0]} and {y_NE.shape[0]}")
        x, y = x_ND.double(), y_NE.double()
        a, b = x.square().sum(1), y.square().sum(1)
        parts = {
            "xx": x.mT @ x, "xy": x.mT @ y, "yy": y.mT @ y, "x": x.sum(0), "y": y.sum(0),
            "a": a.sum(), "b": b.sum(), "aa": a @ a, "ab": a @ b, "bb": b @ b,
            "ax": a @ x, "ay": a @ y, "bx": b @ x, "by": b @ y,
        }  # fmt: skip
        self.count += x.shape[0]
        for name, part in parts.items():
            if name in self.sums:
                self.sums[name] += part
            else:
                self.sums[name] = part

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
        """‖X̃ᵀỸ‖_F² of the centred sides, with the diagonal's bias taken out if asked for."""
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
    (arXiv 2010.15327) is at most 1 and near 0 for independent features. Rows are positions.

    Raises:
        ValueError: the numbers of rows differ, there are too few, or a side is constant.
    """
    sums = CkaSums()
    sums.update(x_ND, y_NE)
    return sums.value(debiased=debiased)


HiddenStates = Callable[[Any, Tensor, Tensor], Sequence[Tensor]]


def causal_lm_hidden_states(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> Sequence[Tensor]:
    """Embedding output, every block's output, the last one after the final norm: L + 1 tensors (B, T, H).

    For models called as transformers' are; the output head is passed over, so no logits exist.
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
    team: Team | None = None,
) -> list[LayerSimilarity]:
    """Distance, cosine and CKA of two models' hidden states over all unmasked positions, for every layer.

    Args:
        model, base: in eval mode; sums are kept where the batches are.
        batches: pairs (ids, mask) of (B, T); mask 1 for tokens, 0 for padding.
        hidden_states: (model, ids, mask) -> tensors (B, T, H), as many for both models.
        team: the processes that hold both models together. Each takes its share of a batch's sequences, and keeps
            the sums of every `team.size`-th layer, to which all bring their hidden states.

    Raises:
        ValueError: layers differ in number or size, there is no unmasked position, or a value is not finite.
    """
    layers: list[_Layer] = []
    positions = 0
    for ids, mask in batches:
        rows = mask.flatten() == 1
        mine = (ids, mask) if team is None else (team.share(ids), team.share(mask))
        ours, theirs = list(hidden_states(model, *mine)), list(hidden_states(base, *mine))
        if len(ours) != len(theirs):
            raise ValueError(f"the models must have as many layers, got {len(ours)} and {len(theirs)} hidden states")
        layers = layers or [_Layer() for _ in ours]
        positions += int(rows.sum())
        for index, layer in enumerate(layers):
            sizes = [states[index].shape[-1] for states in (ours, theirs)]
            if sizes[0] != sizes[1]:
                raise ValueError(f"hidden states {index} must have one size, got {sizes[0]} and {sizes[1]}")
            x, y = (_gathered(states[index], index, ids.shape[0], team) for states in (ours, theirs))
            if x is not None and y is not None:
                layer.update(*(side.flatten(0, 1).to(rows.device)[rows] for side in (x, y)))
            ours[index] = theirs[index] = x = y = rows[:0]  # let go of what is summed up
    if positions == 0:
        raise ValueError("there is no unmasked position to compare")
    if team is None:
        return [layer.result(index, positions) for index, layer in enumerate(layers)]
    return _results(layers, positions, team)


def _gathered(states_BTH: Tensor, layer: int, length: int, team: Team | None) -> Tensor | None:
    """The hidden states of all of a batch, at the process that sums up this layer; None at the others."""
    return states_BTH if team is None else team.join_at(layer % team.size, states_BTH, length)


def _results(layers: Sequence[_Layer], positions: int, team: Team) -> list[LayerSimilarity]:
    """Every process's results on all of them; an error of one is raised on all."""
    own: list[LayerSimilarity | ValueError] = []
    for index in team.own(range(len(layers))):
        try:
            own.append(layers[index].result(index, positions))
        except ValueError as error:
            own.append(error)
    results: list[LayerSimilarity] = []
    for result in team.in_order(team.exchange(own), len(layers)):
        if isinstance(result, ValueError):
            raise result
        results.append(result)
    return results


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

    def result(self, index: int, positions: int) -> LayerSimilarity:
        if not math.isfinite(self.distance + self.norm):
            raise ValueError(f"hidden states {index} are not finite")
        ckas = []
        for debiased in (False, True):
            try:
                ckas.append(self.cka.value(debiased=debiased))
            except ValueError:
                ckas.append(math.nan)
        distance = self.distance / self.norm if self.norm > 0 else math.nan
        return LayerSimilarity(distance, self.cosine / positions, *ckas)
