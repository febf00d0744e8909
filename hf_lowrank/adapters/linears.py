"""Linear layers whose weight is removed or restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.compat import offload_hook
from hf_lowrank.errors import UserError


def linear_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of an `nn.Linear` or `Conv1D`."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def check_rank(name: str, r: int, out_features: int, in_features: int) -> None:
    """Raises UserError if `r` is not between 1 and the smaller side of the layer's weight."""
    largest = min(out_features, in_features)
    if not 1 <= r <= largest:
        raise UserError(
            f"{name}: rank r must be at most {largest}, the smaller side of its {out_features} × {in_features} "
            f"weight, got {r}"
        )


def dense_linear(weight: Tensor, bias: nn.Parameter | None, as_conv1d: bool) -> nn.Module:
    """An `nn.Linear` or `Conv1D` that holds `weight` (out, in) and `bias` without copies."""
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
    """The shape, bias, device and dtype of a linear layer, without its weight."""

    placement: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = linear_shape(layer)
        self.was_conv1d = isinstance(layer, Conv1D)
        self.register_parameter("weight", None)
        # Registering it would move the bias to the meta device while PEFT builds there.
        self._parameters["bias"] = layer.bias
        # Follows .to() and is not in checkpoints: factors are created with its device and dtype.
        self.register_buffer("placement", layer.weight.detach().new_empty(0), persistent=False)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight=None"

    def forward(self, x: Tensor) -> Tensor:
        raise UserError("this layer has no dense weight and cannot compute without its adapter")


def onloaded(layer: nn.Module) -> AbstractContextManager[Any]:
    """Loads offloaded factors while `layer` computes; accelerate itself does so only for modules that are called."""
    offloaded = [module for module in layer.children() if offload_hook(module) is not None]
    return _onloaded(offloaded) if offloaded else nullcontext()


@contextmanager
def _onloaded(modules: list[nn.Module]) -> Iterator[None]:
    for module in modules:
        offload_hook(module).pre_forward(module)
    try:
        yield
    finally:
        for module in modules:
            offload_hook(module).post_forward(module, None)
