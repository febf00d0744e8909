"""Linear layers that keep their weight in eight bits (Q-GaLore, arXiv 2407.08296).

The weight exists during one product of the forward and one of the backward pass. While a model trains, each layer has
a parameter without values, whose gradient is that of the weight; an optimizer of this package reads and writes the
codes, and rounds each value up or down at random, so that small updates are not lost.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters.functional import compute_dtype
from hf_lowrank.adapters.layers import linear_shape
from hf_lowrank.errors import UserError
from hf_lowrank.storage.codes import Codes, coded_layer, decode, encode, group_count, without_values
from hf_lowrank.targets import target_modules

BITS = 8


class EightBitLinear(nn.Module):
    """y = W x + bias, with W (out, in) as codes of eight bits in row-major groups of 256 values.

    Attributes:
        weight: in training a parameter without values, see `train_weights`; else None.
        codes: uint8, (out, in).
        grid: each group's scale and zero point as the bits of float32, (2, groups) int32: a model's conversion to
            another type leaves integers as they are.
    """

    keeps_codes = True
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    codes: Tensor
    grid: Tensor
    placement: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = linear_shape(layer)
        self.was_conv1d = isinstance(layer, Conv1D)
        weight = layer.weight.detach()
        self.register_parameter("weight", None)
        self._parameters["bias"] = layer.bias  # registering it would move it to the device in whose context this runs
        shape = self.out_features, self.in_features
        # Follows .to() and is not in checkpoints: the weight's type and device.
        self.register_buffer("placement", weight.new_empty(0), persistent=False)
        self.register_buffer("codes", weight.new_empty(shape, dtype=torch.uint8))
        groups = group_count(self.out_features * self.in_features)
        self.register_buffer("grid", weight.new_empty((2, groups), dtype=torch.int32))
        if not weight.is_meta:
            self.write_weight(weight.T if self.was_conv1d else weight)

    @torch.no_grad()
    def read_weight(self) -> Tensor:
        """The weight (out, in), in float32, or float64 for a layer of that type."""
        return decoded(self.codes, self.grid, torch.promote_types(self.placement.dtype, torch.float32))

    @torch.no_grad()
    def write_weight(self, values: Tensor, noise: Tensor | None = None, changed: Tensor | None = None) -> None:
        """Stores a weight (out, in), rounded to the nearest, or at random by `noise`, uniform from 0 to below 1.

        Args:
            changed: a flag, on the layer's device, without which everything stays as it is.
        """
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        noise = torch.full_like(wide, 0.5) if noise is None else noise
        codes, scale, zero = encode(wide.unsqueeze(0), BITS, noise.unsqueeze(0))
        new = codes.view(self.codes.shape), torch.cat([scale, zero]).view(torch.int32)
        for held, fresh in zip((self.codes, self.grid), new, strict=True):
            held.copy_(fresh if changed is None else torch.where(changed, fresh, held))

    def dense_weight(self) -> Tensor:
        """The weight (out, in) in the layer's type."""
        return self.read_weight().to(self.placement.dtype)

    def train_weight(self) -> None:
        """Gives the layer the parameter by which its weight trains."""
        self.weight = without_values(self.placement, (self.out_features, self.in_features), self)
        # DistributedDataParallel does not know of it, as it cannot send what has no values.
        self.weight.register_hook(_mean_over_processes)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None and coded_layer(self.weight) is not self:
            raise UserError("weights in eight bits must not be sharded or replaced; use DDP or weight_dtype=parameter")
        dtype = compute_dtype(x, self.placement)
        y: Tensor = _CodedProduct.apply(x.to(dtype), self.weight, self.codes, self.grid)
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={BITS}"

    # What has no values is neither moved, copied, saved nor loaded.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight, self._parameters["weight"] = self.weight, None
        super()._apply(fn, recurse)
        self._parameters["weight"] = weight
        if weight is not None and (weight.dtype, weight.device) != (self.placement.dtype, self.placement.device):
            weight.data = self.placement.new_zeros(1).expand(weight.shape)
            weight.grad = None if weight.grad is None else fn(weight.grad)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        nn.Module.__init__(copied)
        memo[id(self)] = copied
        for name in ("out_features", "in_features", "was_conv1d", "training"):
            setattr(copied, name, getattr(self, name))
        copied.register_parameter("weight", None)
        bias = self.bias
        copied._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        copied.register_buffer("placement", self.placement.clone(), persistent=False)
        copied.register_buffer("codes", self.codes.clone())
        copied.register_buffer("grid", self.grid.clone())
        if self.weight is not None:
            copied.train_weight()
        return copied

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight", None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        weight, self._parameters["weight"] = self.weight, None
        super()._load_from_state_dict(*args, **kwargs)
        self._parameters["weight"] = weight


def decoded(codes: Tensor, grid: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that codes and a grid stand for, computed in `dtype`."""
    scale, zero = grid.view(torch.float32).to(dtype).unbind()
    return decode(Codes(codes.view(1, -1), scale.unsqueeze(0), zero.unsqueeze(0)), codes.shape, BITS).squeeze(0)


class _CodedProduct(torch.autograd.Function):
    """x Wᵀ in the type of x, keeping x and the codes for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, codes: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes, grid)
        ctx.weight_dtype = None if weight is None else weight.dtype
        return linear(x, _for_products(codes, grid, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, grid = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _for_products(codes, grid, grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None


def _for_products(codes: Tensor, grid: Tensor, dtype: torch.dtype) -> Tensor:
    return decoded(codes, grid, torch.promote_types(dtype, torch.float32)).to(dtype)


def _mean_over_processes(grad: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return grad
    grad = grad.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(grad)
    return grad / dist.get_world_size()


def eight_bit_layers(model: nn.Module) -> dict[str, EightBitLinear]:
    """The layers of `model` that keep their weight in eight bits, by dotted name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, EightBitLinear)}


def keep_in_eight_bits(model: nn.Module, modules: str | list[str]) -> None:
    """Replaces the linear layers that `modules` selects (see `target_modules`) by layers with codes, one at a time.

    Raises:
        UserError: nothing is selected, or a weight is shared with another layer; names it.
    """
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name, layer in target_modules(model, modules).items():
        if uses[id(layer.weight)] > 1:
            raise UserError(f"{name} must have a weight of its own to keep it in eight bits; leave it out")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, EightBitLinear(layer))


def train_weights(model: nn.Module) -> None:
    """Lets all weights that are kept in eight bits train, by an optimizer of this package."""
    for layer in eight_bit_layers(model).values():
        layer.train_weight()
