"""Updating each weight inside the backward pass, so that at most one layer's gradient exists at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor

from hf_lowrank.errors import UserError

if TYPE_CHECKING:
    from hf_lowrank.optim.base import TargetedAdamW


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


class Layerwise:
    """The hooks of one optimizer.

    Whether a backward pass ends an optimizer step is accelerate's `sync_gradients`, which Trainer and
    `accelerator.accumulate` set; `accumulating` says it in a loop without accelerate.
    """

    def __init__(self, optimizer: TargetedAdamW) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise UserError(
                "layerwise=True needs a single process, got a world size of "
                f"{dist.get_world_size()}: gradients would be used before they are averaged; leave it out"
            )
        self._optimizer = weakref.ref(optimizer)
        self._groups: dict[Tensor, int] = {}
        self._accumulating = False

    def attach(self, group: int, params: Sequence[Tensor]) -> None:
        """Hooks the parameters of group number `group`."""
        for param in params:
            self._groups[param] = group
            param.register_post_accumulate_grad_hook(self._after_gradient)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    @torch.no_grad()
    def _after_gradient(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or param.grad is None:
            return
        group = optimizer.param_groups[self._groups[param]]
        if self._accumulating or not GradientState().sync_gradients:
            if optimizer._keep_part(group, param):
                param.grad = None
            return
        optimizer._update_one(group, param)
        param.grad = None
