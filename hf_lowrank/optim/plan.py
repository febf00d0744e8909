"""How a step's parameters were divided into what is stepped together, kept from one step to the next.

On a GPU the host takes longer to look all of that up anew than the GPU takes for the step. A plan keeps nothing that
holds memory: weights, gradients and state are taken from the optimizer at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_lowrank.optim.base import TargetedAdamW


class Entry(NamedTuple):
    """A parameter that is to be stepped.

    Attributes:
        group: its group.
        param: the parameter, whose state this is.
        weight, grad: what this process holds of it and of its gradient.
    """

    group: dict[str, Any]
    param: Tensor
    weight: Tensor
    grad: Tensor


def with_gradient(entry: Entry, grad: Tensor) -> Entry:
    return Entry(entry.group, entry.param, entry.weight, grad)


State = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Parameters that are stepped together.

    Attributes:
        entries: the parameters, each in the place of its gradient.
        update: steps them, given the optimizer, their entries and their states.
        is_due: whether one cannot be stepped before something else is done, given the optimizer and the states.
        of_one_age: whether they must have made equally many steps.
    """

    entries: list[Entry]
    update: Callable[[Any, list[Entry], list[State]], None]
    is_due: Callable[[Any, list[State]], bool] = lambda optimizer, states: False
    of_one_age: bool = False

    def holds(self, optimizer: TargetedAdamW, states: list[State]) -> bool:
        """Whether they are still of one age and none is due."""
        if self.of_one_age and len({(state.get("step"), state.get("reset_at")) for state in states}) != 1:
            return False
        return not self.is_due(optimizer, states)


class Plan:
    """Steps like the last one.

    It holds while the optimizer has the same groups of the same parameters of the same types, all with a state, while
    the same ones have gradients, of their own type, while those that are stepped together stay of one age, and while
    none is due.
    """

    def __init__(self, optimizer: TargetedAdamW, parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self._all = [(group, param) for group in optimizer.param_groups for param in group["params"]]
        stepped = [entry.param for part in parts for entry in part.entries]
        self._stepped = [(param, param.dtype, param.device) for param in stepped]
        with_gradients = set(map(id, stepped))
        self._idle = [param for _, param in self._all if id(param) not in with_gradients]
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for place, param in enumerate(stepped):
            kinds.setdefault((param.dtype, param.device), []).append(place)
        self._kinds = list(kinds.values())

    def take(self, optimizer: TargetedAdamW) -> tuple[list[Tensor], list[State]] | None:
        """Gradients and states of what is stepped; None where the plan does not hold."""
        now = [(group, param) for group in optimizer.param_groups for param in group["params"]]
        if len(now) != len(self._all):
            return None
        for (group, param), (known_group, known_param) in zip(now, self._all, strict=True):
            if group is not known_group or param is not known_param:
                return None
        grads: list[Tensor] = []
        states: list[State] = []
        for param, dtype, device in self._stepped:
            grad, state = param.grad, optimizer.state.get(param)
            if grad is None or grad.dtype is not dtype or grad.layout is not torch.strided:
                return None
            if not state or param.dtype is not dtype or param.device != device:
                return None
            grads.append(grad)
            states.append(state)
        left = iter(states)
        idle = all(param.grad is None for param in self._idle)
        holds = all(part.holds(optimizer, [next(left) for _ in part.entries]) for part in self._parts)
        return (grads, states) if idle and holds else None

    def alike(self, grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """The gradients that share type and device."""
        return [[grads[place] for place in places] for places in self._kinds]

    def step(self, optimizer: TargetedAdamW, grads: Sequence[Tensor], states: Sequence[State]) -> None:
        """Steps all parts."""
        start = 0
        for part in self._parts:
            stop = start + len(part.entries)
            entries = list(map(with_gradient, part.entries, grads[start:stop]))
            part.update(optimizer, entries, list(states[start:stop]))
            start = stop
