"""The layers that replace a linear layer.

Each is a PEFT tuner layer whose `base_layer` is a shell with the shape, bias, device and dtype of the replaced layer,
but without its weight. Factors are always A (r, in) and B (out, r), also if the replaced layer is a `Conv1D`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from hf_lowrank.adapters.functional import bottleneck, compute_dtype, sltrain_linear, sltrain_weight, truncated_svd
from hf_lowrank.adapters.linears import WeightlessLinear, check_rank, dense_linear, onloaded
from hf_lowrank.adapters.seeding import draw_support, fill, kaiming_uniform, keyed_generator, uniform
from hf_lowrank.compat import buffer_dict
from hf_lowrank.errors import UserError

INT32_LIMIT = 2**31


class ReplacedLinear(nn.Module, BaseTunerLayer):
    """A linear layer replaced by its active adapter, of which there is exactly one.

    Attributes:
        layer_name: dotted name in the dense model, used as the key of the random draws and in errors.
    """

    title: ClassVar[str]
    factor_names: ClassVar[tuple[str, str]]

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
        self._create(adapter_name, r, options)
        if self._on_meta(adapter_name):
            pass
        elif init == "svd":
            self._init_from(adapter_name, weight, seed)
        else:
            self._draw(adapter_name, seed)
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=inference_mode)

    def _create(self, adapter_name: str, r: int, options: dict[str, Any]) -> None:
        raise NotImplementedError

    def _draw(self, adapter_name: str, seed: int) -> None:
        raise NotImplementedError

    def _init_from(self, adapter_name: str, weight: Any, seed: int) -> None:
        raise NotImplementedError

    def _empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(self.base_layer.placement.new_empty(shape))

    def _on_meta(self, adapter_name: str) -> bool:
        return getattr(self, self.factor_names[0])[adapter_name].is_meta

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        placement: Any = base_layer.weight if self.merged else base_layer.placement
        return placement.device, placement.dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Undoes a side effect of PEFT's method, which makes frozen parameters trainable when it moves them."""
        if adapter_name not in self.r:
            return
        kept = {name: getattr(self, name)[adapter_name].requires_grad for name in self.adapter_layer_names}
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for name, trainable in kept.items():
            getattr(self, name)[adapter_name].requires_grad_(trainable)

    def tensor_names(self) -> tuple[str, ...]:
        """Names of the containers that hold each adapter's tensors."""
        return self.adapter_layer_names

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
        name_A, name_B = self.factor_names
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
        """The layer's dense weight (out, in) in the factors' dtype, computed at each call; a surrogate is B A."""
        B, A, scaling = self.low_rank_factors()
        return (B * scaling) @ A

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Builds the dense weight and uses it until `unmerge`.

        Raises:
            UserError: the layer has no dense equivalent, or `safe_merge` finds NaN or Inf.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        if self.dense_weight_kind != "exact":
            raise UserError(
                f"{self.layer_name}: {self.title} cannot be merged: its non-linearity between the factors has no "
                "dense equivalent; save the adapter or the LowRankForCausalLM instead"
            )
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
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class CoLALinear(ReplacedLinear):
    """y = B · σ(A x) + bias (arXiv 2502.10940)."""

    title = "CoLA"
    factor_names = ("cola_A", "cola_B")
    adapter_layer_names = ("cola_A", "cola_B")
    other_param_names = ("r", "bottleneck_act", "keep_bottleneck")
    cola_A: nn.ParameterDict
    cola_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        super().__init__(base_layer, layer_name)
        self.bottleneck_act: dict[str, str] = {}
        self.keep_bottleneck: dict[str, bool] = {}
        self._act: dict[str, Callable[[Tensor], Tensor]] = {}

    def _create(self, adapter_name: str, r: int, options: dict[str, Any]) -> None:
        self.bottleneck_act[adapter_name] = options["bottleneck_act"]
        self.keep_bottleneck[adapter_name] = options["keep_bottleneck"]
        self._act[adapter_name] = ACT2FN[options["bottleneck_act"]]
        self.cola_A[adapter_name] = self._empty(r, self.in_features)
        self.cola_B[adapter_name] = self._empty(self.out_features, r)

    def _draw(self, adapter_name: str, seed: int) -> None:
        std = (self.r[adapter_name] * (self.in_features + self.out_features)) ** -0.25
        generator = keyed_generator(seed, self.layer_name)
        for factor in (self.cola_A[adapter_name], self.cola_B[adapter_name]):
            fill(factor, torch.empty(factor.shape).normal_(0, std, generator=generator))

    def _init_from(self, adapter_name: str, weight: Tensor, seed: int) -> None:
        B, A = truncated_svd(weight, self.r[adapter_name])
        fill(self.cola_A[adapter_name], A)
        fill(self.cola_B[adapter_name], B)

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

    def __repr__(self) -> str:
        return "cola." + super().__repr__()


class SLTrainLinear(ReplacedLinear):
    """y = x ((α/r) B A + S)ᵀ + bias (arXiv 2406.02214)."""

    title = "SLTrain"
    factor_names = ("sltrain_A", "sltrain_B")
    adapter_layer_names = ("sltrain_A", "sltrain_B", "sltrain_values")
    other_param_names = ("r", "scaling", "sltrain_support")
    sltrain_A: nn.ParameterDict
    sltrain_B: nn.ParameterDict
    sltrain_values: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        super().__init__(base_layer, layer_name)
        self.scaling: dict[str, float] = {}
        self.sltrain_support = buffer_dict()

    def tensor_names(self) -> tuple[str, ...]:
        return (*self.adapter_layer_names, "sltrain_support")

    def _create(self, adapter_name: str, r: int, options: dict[str, Any]) -> None:
        entries = self.in_features * self.out_features
        if entries >= INT32_LIMIT:
            raise UserError(
                f"{self.layer_name}: SLTrain stores its support as 32-bit indices, so a layer must have fewer than "
                f"2^31 entries, got {self.out_features} × {self.in_features}; exclude it by exclude_modules"
            )
        count = round(options["sparsity"] * entries)
        if not 0 < count < entries:
            raise UserError(
                f"{self.layer_name}: sparsity {options['sparsity']} keeps {count} of {entries} entries; "
                "it must keep at least one and drop at least one"
            )
        self.scaling[adapter_name] = options["scaling"]
        self.sltrain_A[adapter_name] = self._empty(r, self.in_features)
        self.sltrain_B[adapter_name] = self._empty(self.out_features, r)
        self.sltrain_values[adapter_name] = self._empty(count)
        device = self.sltrain_values[adapter_name].device
        self.sltrain_support[adapter_name] = torch.empty(count, dtype=torch.int32, device=device)

    def _draw_support(self, adapter_name: str, seed: int) -> None:
        support = self.sltrain_support[adapter_name]
        generator = keyed_generator(seed, self.layer_name, "support")
        fill(support, draw_support(self.out_features, self.in_features, support.numel(), generator))

    def _draw(self, adapter_name: str, seed: int) -> None:
        A, B, values = self.sltrain_A[adapter_name], self.sltrain_B[adapter_name], self.sltrain_values[adapter_name]
        self._draw_support(adapter_name, seed)
        generator = keyed_generator(seed, self.layer_name)
        fill(A, kaiming_uniform(A.shape[0], A.shape[1], generator))
        fill(B, torch.zeros(B.shape))
        fill(values, uniform(tuple(values.shape), self.in_features**-0.5, generator))

    def _init_from(self, adapter_name: str, weight: Tensor, seed: int) -> None:
        self._draw_support(adapter_name, seed)
        B, A = truncated_svd(weight, self.r[adapter_name])
        support = self.sltrain_support[adapter_name].to(weight.device)
        residual = (weight.float() - B @ A).reshape(-1)
        fill(self.sltrain_A[adapter_name], A)
        fill(self.sltrain_B[adapter_name], B / self.scaling[adapter_name])
        fill(self.sltrain_values[adapter_name], residual[support.long()])

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        B, A, _ = super().low_rank_factors()
        return B, A, self.scaling[self.adapter]

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        name = self.adapter
        A, B = self.factors()
        return sltrain_weight(A, B, self.sltrain_values[name], self.sltrain_support[name], self.scaling[name])

    def _compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        name = self.adapter
        A, B = self.factors()
        values, support = self.sltrain_values[name], self.sltrain_support[name]
        return sltrain_linear(x, A, B, values, support, self.scaling[name], bias)

    def __repr__(self) -> str:
        return "sltrain." + super().__repr__()
