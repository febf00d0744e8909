"""Linear layers without their weight, and with it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.errors import UserError


def linear_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of an `nn.Linear` or `Conv1D`."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def check_rank(name: str, r: int, out_features: int, in_features: int) -> None:
    """Raises UserError when a product of rank `r` cannot be what a layer of this shape wants."""
    largest = min(out_features, in_features)
    if not 1 <= r <= largest:
        raise UserError(
            f"{name}: rank r must be at most {largest}, the smaller side of its {out_features} × {in_features} "
            f"weight, got {r}"
        )


def dense_linear(weight: Tensor, bias: nn.Parameter | None, as_conv1d: bool) -> nn.Module:
    """An `nn.Linear`, or a `Conv1D`, that holds `weight` (out, in) and `bias` themselves."""
    out_features, in_features = weight.shape
    layer: Any
    with torch.device("meta"):
        layer = (
            Conv1D(out_features, in_features)
            if as_conv1d
            else nn.Linear(in_features, out_features, bias=bias is not None)
        )
    layer.weight = nn.Parameter(weight.T.contiguous() if as_conv1d else weight)
    layer.bias = bias
    return layer


class WeightlessLinear(nn.Module):
    """What is left of a linear layer whose weight is gone: its shape, its bias, its device and dtype."""

    placement: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = linear_shape(layer)
        self.was_conv1d = isinstance(layer, Conv1D)
        self.register_parameter("weight", None)
        # Not registered anew: where PEFT builds on the meta device, that would move the bias there.
        self._parameters["bias"] = layer.bias
        # Not in checkpoints; follows .to(), so that a factor can be put where the model is.
        self.register_buffer("placement", layer.weight.detach().new_empty(0), persistent=False)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight=None"

    def forward(self, x: Tensor) -> Tensor:
        raise UserError("this layer keeps no dense weight; it computes nothing without its adapter")


def onloaded(layer: nn.Module) -> AbstractContextManager[Any]:
    """Brings offloaded factors back while `layer` computes; accelerate does so only for modules that are called."""
    hooked = [module for module in layer.children() if getattr(module, "_hf_hook", None) is not None]
    return _onloaded(hooked) if hooked else nullcontext()


@contextmanager
def _onloaded(modules: list[Any]) -> Iterator[None]:
    for module in modules:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in modules:
            module._hf_hook.post_forward(module, None)
