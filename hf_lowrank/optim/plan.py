"""The lists of tensors that an optimizer step goes through, kept from one step to the next.

On a GPU the host takes longer to look every tensor up anew than the GPU takes for the step. A plan holds as long as
the same parameters have gradients, no subspace is due, and no tensor was put in the place of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor


@dataclass
class Part:
    """Parameters that are stepped together.

    Attributes:
        group: their group.
        params, states: the parameters, and the optimizer's state of each.
        update: steps them, given the optimizer and their gradients in the same order; keeps none of these.
        in_subspaces: whether they change their subspaces every `update_proj_gap` steps.
    """

    group: dict[str, Any]
    params: list[Tensor]
    states: list[dict[str, Any]]
    update: Callable[[Any, list[Tensor]], None]
    in_subspaces: bool = False

    def __post_init__(self) -> None:
        self._kept = [
            (state, key, value) for state in self.states for key, value in state.items() if isinstance(value, Tensor)
        ]

    def holds(self) -> bool:
        """Whether the state's tensors are those of before, and no subspace is due."""
        if self.in_subspaces:
            gap = self.group["update_proj_gap"]
            if any(state["step"] % gap == 0 for state in self.states):
                return False
        return all(state.get(key) is value for state, key, value in self._kept)


class Plan:
    """What a step does while nothing but gradients and the groups' numbers changes.

    Args:
        all_params: of the optimizer, those without gradients too.
        parts: what is stepped, in order.
    """

    def __init__(self, all_params: Sequence[Tensor], parts: Sequence[Part]) -> None:
        self._all_params = list(all_params)
        self.parts = list(parts)
        self._stepped = [param for part in parts for param in part.params]
        self._places = [(param.data_ptr(), param.stride(), param.dtype) for param in self._stepped]
        stepped = set(map(id, self._stepped))
        self._idle = [param for param in all_params if id(param) not in stepped]
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for number, param in enumerate(self._stepped):
            alike.setdefault((param.device, param.dtype), []).append(number)
        self._alike = list(alike.values())

    def gradients(self, all_params: Sequence[Tensor]) -> list[Tensor] | None:
        """The gradients of what is stepped; None where the plan does not hold."""
        if len(all_params) != len(self._all_params) or not all(map(is_, all_params, self._all_params)):
            return None
        if any(param.grad is not None for param in self._idle) or not all(part.holds() for part in self.parts):
            return None
        grads: list[Tensor] = []
        for param, (pointer, stride, dtype) in zip(self._stepped, self._places, strict=True):
            grad = param.grad
            if grad is None or grad.layout is not torch.strided or grad.dtype is not dtype or grad.stride() != stride:
                return None
            if param.data_ptr() != pointer:
                return None
            grads.append(grad)
        return grads

    def alike(self, grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """The gradients that share device and type."""
        return [[grads[number] for number in numbers] for numbers in self._alike]

    def step(self, optimizer: Any, grads: Sequence[Tensor]) -> None:
        """Steps all parts."""
        start = 0
        for part in self.parts:
            for state in part.states:
                state["step"] += 1
            stop = start + len(part.params)
            part.update(optimizer, list(grads[start:stop]))
            start = stop
