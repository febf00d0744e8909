"""Updating each weight inside the backward pass, so that at most one layer's gradient exists at a time."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor

from hf_lowrank.errors import UserError


def check_layerwise(*, max_grad_norm: float, fp16: bool) -> None:
    """Refuses what needs all gradients at once.

    Raises:
        UserError: naming the training argument.
    """
    if max_grad_norm:
        raise UserError(
            f"max_grad_norm must be 0 with layerwise=True, got {max_grad_norm}: the norm over all gradients is not "
            "known when the first weight is updated; set it to 0 or leave layerwise out"
        )
    if fp16:
        raise UserError("fp16 must be off with layerwise=True: its loss scale is only checked at the end; use bf16")


class StepsInsideBackward(Protocol):
    """An optimizer that can step one parameter at a time."""

    def step_inside_backward(self, group: int, position: int, param: Tensor, *, ends_step: bool) -> None: ...


class Layerwise:
    """The gradient hooks of one optimizer.

    Whether a backward pass ends an optimizer step is accelerate's `sync_gradients`, which Trainer and
    `accelerator.accumulate` set; a loop without accelerate uses `accumulating`.
    """

    def __init__(self, optimizer: StepsInsideBackward) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise UserError(
                "layerwise=True needs a single process, got a world size of "
                f"{dist.get_world_size()}: gradients would be used before they are averaged; leave it out"
            )
        self._optimizer = weakref.ref(optimizer)
        self._accumulating = False

    def attach(self, group: int, first: int, params: Sequence[Tensor]) -> None:
        """Adds hooks to the parameters of group number `group`, the optimizer's parameters from number `first`."""
        for position, param in enumerate(params, first):
            param.register_post_accumulate_grad_hook(partial(self._after_gradient, group, position))

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    @torch.no_grad()
    def _after_gradient(self, group: int, position: int, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and param.grad is not None:
            ends_step = not self._accumulating and GradientState().sync_gradients
            optimizer.step_inside_backward(group, position, param, ends_step=ends_step)
