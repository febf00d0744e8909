"""The layers that replace a linear layer.

Each is a PEFT tuner layer whose `base_layer` is a shell with the shape, bias, device and dtype of the replaced layer,
but without its weight. Factors are always A (r, in) and B (out, r), also if the replaced layer is a `Conv1D`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters.functional import (
    bottleneck,
    compute_dtype,
    draw_support,
    fill,
    kaiming_uniform,
    keyed_generator,
    sltrain_linear,
    sltrain_weight,
    truncated_svd,
    uniform,
)
from hf_lowrank.compat import BufferDict, offload_hook
from hf_lowrank.errors import UserError
from hf_lowrank.targets import is_plain

INT32_LIMIT = 2**31


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


def check_plain(name: str, layer: nn.Module) -> None:
    """Raises UserError if an adapter cannot stand in for the layer, which does not compute as a linear layer does."""
    if not is_plain(layer):
        raise UserError(
            f"{name}: {type(layer).__name__} has a forward pass of its own, which an adapter would replace; leave it "
            "out of target_modules"
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


class ReplacedLinear(nn.Module, BaseTunerLayer):
    """A linear layer replaced by its active adapter, of which there is exactly one.

    Attributes:
        layer_name: dotted name in the dense model, used as the key of the random draws and in errors.
        adapter_layer_names: containers of each adapter's parameters by adapter, first those of A and B.
        tensor_names: these, and the containers of its frozen parameters and buffers.
        guide, guide_share: a dense guide in training and its share of the output, see `hf_lowrank.adapters.guide`.
        frozen_names, sparse_names: which of them hold frozen parameters, and a sparse part.
    """

    title: ClassVar[str]
    guide: nn.Parameter | None
    tensor_names: ClassVar[tuple[str, ...]]
    frozen_names: ClassVar[tuple[str, ...]] = ()
    sparse_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        nn.Module.__init__(self)
        self.base_layer: Any = WeightlessLinear(base_layer)
        self.layer_name = layer_name
        self.in_features, self.out_features = self.base_layer.in_features, self.base_layer.out_features
        self.r: dict[str, int] = {}
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self._shell: list[WeightlessLinear] = []
        self.register_parameter("guide", None)
        self.guide_share = 0.0
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        *,
        init: str,
        seed: int,
        weight: Tensor | None,
        options: dict[str, Any],
        inference_mode: bool = False,
    ) -> None:
        """Adds the adapter `adapter_name` of rank `r`; `weight` (out, in) is the dense weight if it still exists.

        Raises:
            UserError: the rank exceeds the layer's smaller side, or `init="svd"` lacks the dense weight.
        """
        check_rank(self.layer_name, r, self.out_features, self.in_features)
        if init == "svd" and weight is None:
            raise UserError(f"{self.layer_name}: init='svd' needs the dense weight, which an earlier adapter replaced")
        self.r[adapter_name] = r
        self._set_options(adapter_name, options)
        name_A, name_B, *_ = self.adapter_layer_names
        for name, shape in zip((name_A, name_B), self._factor_shapes(adapter_name), strict=True):
            getattr(self, name)[adapter_name] = self._empty(*shape)
        if not getattr(self, name_A)[adapter_name].is_meta:
            self._initialise(adapter_name, seed, weight if init == "svd" else None)
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=inference_mode)

    def _factor_shapes(self, adapter_name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""
        return (self.r[adapter_name], self.in_features), (self.out_features, self.r[adapter_name])

    def _set_options(self, adapter_name: str, options: dict[str, Any]) -> None:
        """Keeps the options of a new adapter and creates what it has besides its factors."""
        raise NotImplementedError

    def _initialise(self, adapter_name: str, seed: int, weight: Tensor | None) -> None:
        """Fills a new adapter's tensors from the SVD of the dense weight, or by random draws without one."""
        raise NotImplementedError

    def _empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(self.base_layer.placement.new_empty(shape))

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        placement: Any = base_layer.weight if self.merged else base_layer.placement
        return placement.device, placement.dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Undoes a side effect of PEFT's method, which makes frozen parameters trainable when it moves them."""
        if adapter_name not in self.r:
            return
        names = (*self.adapter_layer_names, *self.frozen_names)
        kept = {name: getattr(self, name)[adapter_name].requires_grad for name in names}
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for name, trainable in kept.items():
            getattr(self, name)[adapter_name].requires_grad_(trainable)

    @property
    def adapter(self) -> str:
        """The active adapter's name.

        Raises:
            UserError: no adapter is active here, or more than one.
        """
        active = [name for name in self.active_adapters if name in self.r]
        if len(active) != 1:
            raise UserError(
                f"{self.layer_name}: exactly one adapter must be active in a replaced linear layer, "
                f"got {', '.join(self.active_adapters) or 'none'}; available: {', '.join(self.r) or 'none'}"
            )
        return active[0]

    def enable_adapters(self, enabled: bool) -> None:
        """Enables the adapter.

        Raises:
            UserError: on disabling, because there is no dense weight to fall back to.
        """
        if not enabled:
            raise UserError(
                f"{self.layer_name}: {self.title} replaces the layer and keeps no dense weight, "
                "so it has no disabled state"
            )
        super().enable_adapters(True)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The active adapter's parameters A (r, in) and B (out, r)."""
        name_A, name_B, *_ = self.adapter_layer_names
        return getattr(self, name_A)[self.adapter], getattr(self, name_B)[self.adapter]

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        """B (out, r), A (r, in) and the scale of their product, detached."""
        A, B = self.factors()
        return B.detach(), A.detach(), 1.0

    @property
    def dense_weight_kind(self) -> Literal["exact", "surrogate"]:
        """Whether `dense_weight()` is equivalent to the layer ("exact") or only a stand-in ("surrogate")."""
        return "exact"

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The layer's dense weight (out, in) in the factors' dtype, computed at each call; a surrogate is B A.

        Autocast does not apply.
        """
        with torch.autocast(self.factors()[0].device.type, enabled=False):
            return self._dense_weight()

    def _dense_weight(self) -> Tensor:
        B, A, scaling = self.low_rank_factors()
        return (B * scaling) @ A

    def check_mergeable(self) -> None:
        """Raises UserError if the layer has no dense equivalent."""
        if self.dense_weight_kind != "exact":
            raise UserError(
                f"{self.layer_name}: {self.title} cannot be merged: its non-linearity between the factors has no "
                "dense equivalent; save the adapter or the LowRankForCausalLM instead"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Builds the dense weight and uses it until `unmerge`.

        Raises:
            UserError: the layer has no dense equivalent, or `safe_merge` finds NaN or Inf.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        self.check_mergeable()
        if names != [self.adapter]:
            raise UserError(
                f"{self.layer_name}: only the active adapter {self.adapter!r} can be merged, got {', '.join(names)}"
            )
        shell = self.base_layer
        weight = self.dense_weight().to(shell.placement.dtype)
        if safe_merge and not torch.isfinite(weight).all():
            raise UserError(f"{self.layer_name}: the merged weight of adapter {names[0]!r} contains NaN or Inf")
        merged = dense_linear(weight, shell.bias, shell.was_conv1d)
        merged.requires_grad_(False)
        self._shell = [shell]  # a list keeps it out of the submodules and state dicts
        self.base_layer = merged
        self.merged_adapters = list(names)

    def unmerge(self) -> None:
        """Drops the dense weight that `merge` built."""
        if self.merged:
            (shell,) = self._shell
            shell.to(self.base_layer.weight.device)
            shell.bias = self.base_layer.bias
            self.base_layer = shell
            self.merged_adapters = []

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            return self.base_layer(x)
        with onloaded(self):
            y = self._compute(x, self.base_layer.bias)
        if self.guide is not None and self.training:
            bias = self.base_layer.bias
            guided = linear(x.to(y.dtype), self.guide.to(y.dtype), bias if bias is None else bias.to(y.dtype))
            y = torch.lerp(y, guided, self.guide_share)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{self.title.lower()}.{super().__repr__()}"


class CoLALinear(ReplacedLinear):
    """y = B · σ(A x) + bias (arXiv 2502.10940)."""

    title = "CoLA"
    adapter_layer_names = tensor_names = ("cola_A", "cola_B")
    other_param_names = ("r", "bottleneck_act", "keep_bottleneck")
    cola_A: nn.ParameterDict
    cola_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        super().__init__(base_layer, layer_name)
        self.bottleneck_act: dict[str, str] = {}
        self.keep_bottleneck: dict[str, bool] = {}
        self._act: dict[str, Callable[[Tensor], Tensor]] = {}

    def _set_options(self, adapter_name: str, options: dict[str, Any]) -> None:
        self.bottleneck_act[adapter_name] = options["bottleneck_act"]
        self.keep_bottleneck[adapter_name] = options["keep_bottleneck"]
        self._act[adapter_name] = ACT2FN[options["bottleneck_act"]]

    def _initialise(self, adapter_name: str, seed: int, weight: Tensor | None) -> None:
        factors = self.cola_A[adapter_name], self.cola_B[adapter_name]
        if weight is None:
            std = (self.r[adapter_name] * (self.in_features + self.out_features)) ** -0.25
            generator = keyed_generator(seed, self.layer_name)
            A, B = (torch.empty(factor.shape).normal_(0, std, generator=generator) for factor in factors)
        else:
            B, A = truncated_svd(weight, self.r[adapter_name])
        for factor, start in zip(factors, (A, B), strict=True):
            fill(factor, start)

    @property
    def dense_weight_kind(self) -> Literal["exact", "surrogate"]:
        return "exact" if self.bottleneck_act[self.adapter] == "linear" else "surrogate"

    def _compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        A, B = self.factors()
        if self.keep_bottleneck[self.adapter]:
            low = bottleneck(x, A)
        else:
            dtype = compute_dtype(x, A)
            low = linear(x.to(dtype), A.to(dtype))
        return linear(self._act[self.adapter](low), B, bias if bias is None else bias.to(B.dtype))


class SLTrainLinear(ReplacedLinear):
    """y = x ((α/r) B A + S)ᵀ + bias (arXiv 2406.02214)."""

    title = "SLTrain"
    adapter_layer_names = ("sltrain_A", "sltrain_B", "sltrain_values")
    sparse_names = ("sltrain_values", "sltrain_support")
    tensor_names = (*adapter_layer_names, "sltrain_support")
    other_param_names = ("r", "scaling", "sltrain_support")
    sltrain_A: nn.ParameterDict
    sltrain_B: nn.ParameterDict
    sltrain_values: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        super().__init__(base_layer, layer_name)
        self.scaling: dict[str, float] = {}
        self.sltrain_support = BufferDict(persistent=True)

    def _set_options(self, adapter_name: str, options: dict[str, Any]) -> None:
        entries = self.in_features * self.out_features
        if entries >= INT32_LIMIT:
            raise UserError(
                f"{self.layer_name}: SLTrain stores its support as 32-bit indices, so a layer must have fewer than "
                f"2^31 entries, got {self.out_features} × {self.in_features}; exclude it by exclude_modules"
            )
        count = int(options["sparsity"] * entries)
        if not 0 < count < entries:
            raise UserError(
                f"{self.layer_name}: sparsity {options['sparsity']} keeps {count} of {entries} entries; "
                "it must keep at least one and drop at least one"
            )
        self.scaling[adapter_name] = options["scaling"]
        self.sltrain_values[adapter_name] = self._empty(count)
        device = self.sltrain_values[adapter_name].device
        self.sltrain_support[adapter_name] = torch.empty(count, dtype=torch.int32, device=device)

    def _initialise(self, adapter_name: str, seed: int, weight: Tensor | None) -> None:
        support = self.sltrain_support[adapter_name]
        generator = keyed_generator(seed, self.layer_name, "support")
        fill(support, draw_support(self.out_features, self.in_features, support.numel(), generator))
        if weight is None:
            generator = keyed_generator(seed, self.layer_name)
            A = kaiming_uniform(self.r[adapter_name], self.in_features, generator)
            B = torch.zeros(self.out_features, self.r[adapter_name])
            values = uniform((support.numel(),), self.in_features**-0.5, generator)
        else:
            B, A = truncated_svd(weight, self.r[adapter_name])
            values = (weight.float() - B @ A).reshape(-1)[support.to(weight.device).long()]
            B = B / self.scaling[adapter_name]
        fill(self.sltrain_A[adapter_name], A)
        fill(self.sltrain_B[adapter_name], B)
        fill(self.sltrain_values[adapter_name], values)

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        B, A, _ = super().low_rank_factors()
        return B, A, self.scaling[self.adapter]

    def _dense_weight(self) -> Tensor:
        name = self.adapter
        A, B = self.factors()
        return sltrain_weight(A, B, self.sltrain_values[name], self.sltrain_support[name], self.scaling[name])

    def _compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        name = self.adapter
        A, B = self.factors()
        values, support = self.sltrain_values[name], self.sltrain_support[name]
        return sltrain_linear(x, A, B, values, support, self.scaling[name], bias)
