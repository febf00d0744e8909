"""Structured feed-forwards (arXiv 2406.16450): two factors in place of each weight of an MLP, one or both in blocks.

With x (…, in), b blocks and k between the factors:
    low_rank       B (out, k) · A (k, in)
    block_dense    B (out, k) · blockdiag(A), A (b, k/b, in/b)
    block_shuffle  P' · blockdiag(B) · P · blockdiag(A), A (b, k/b, in/b), B (b, out/b, k/b), k = min(in, out)
P and P' are shuffles: they read their argument as a matrix of b rows and give it column by column, so that each block
of B sees every block of A.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_lowrank.adapters.functional import (
    compute_dtype,
    fill,
    keyed_generator,
    structured_product,
    truncated_svd,
    whole,
)
from hf_lowrank.adapters.layers import ReplacedLinear
from hf_lowrank.errors import UserError


class StructuredLinear(ReplacedLinear):
    """y = (structured product of A and B) x + bias (arXiv 2406.16450)."""

    title = "Structured"
    adapter_layer_names = tensor_names = ("structured_A", "structured_B")
    other_param_names = ("r", "structure", "blocks")
    structured_A: nn.ParameterDict
    structured_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        super().__init__(base_layer, layer_name)
        self.structure: dict[str, str] = {}
        self.blocks: dict[str, int] = {}

    def _set_options(self, adapter_name: str, options: dict[str, Any]) -> None:
        self.structure[adapter_name], self.blocks[adapter_name] = options["structure"], options["blocks"]
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "r": self.r[adapter_name]}
        cut = {"low_rank": (), "block_dense": ("in_features", "r"), "block_shuffle": ("in_features", "out_features")}
        for name in cut[options["structure"]]:
            if sizes[name] % options["blocks"]:
                raise UserError(
                    f"{self.layer_name}: blocks must divide {name} = {sizes[name]} with structure "
                    f"{options['structure']}, got {options['blocks']}"
                )

    def _factor_shapes(self, adapter_name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        structure, b, k = self.structure[adapter_name], self.blocks[adapter_name], self.r[adapter_name]
        if structure == "low_rank":
            return super()._factor_shapes(adapter_name)
        if structure == "block_dense":
            return (b, k // b, self.in_features // b), (self.out_features, k)
        k = min(self.in_features, self.out_features)
        return (b, k // b, self.in_features // b), (b, self.out_features // b, k // b)

    def _initialise(self, adapter_name: str, seed: int, weight: Tensor | None) -> None:
        A, B = self.structured_A[adapter_name], self.structured_B[adapter_name]
        if weight is None:
            # Outputs have the scale of those of CoLA's initialisation, which is this one for low_rank.
            gain = self.in_features / (self.in_features + self.out_features)
            std = (gain / (A.shape[-1] * B.shape[-1])) ** 0.25
            generator = keyed_generator(seed, self.layer_name)
            for factor in (A, B):
                fill(factor, torch.empty(factor.shape).normal_(0, std, generator=generator))
            return
        if B.ndim == 3:
            raise UserError(
                f"{self.layer_name}: init must be 'random' with structure block_shuffle, which has no SVD, got 'svd'"
            )
        count = A.shape[0] if A.ndim == 3 else 1
        halves = [truncated_svd(part, B.shape[1] // count) for part in weight.chunk(count, 1)]
        fill(A, torch.stack([half for _, half in halves]).view(A.shape))
        fill(B, torch.cat([half for half, _ in halves], 1))

    def _dense_weight(self) -> Tensor:
        A, B = (whole(factor) for factor in self.factors())
        return structured_product(torch.eye(self.in_features, dtype=A.dtype, device=A.device), A, B).T.contiguous()

    def _compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        A, B = self.factors()
        dtype = compute_dtype(x, A)
        y = structured_product(x.to(dtype), A.to(dtype), B.to(dtype))
        return y if bias is None else y + bias.to(dtype)
