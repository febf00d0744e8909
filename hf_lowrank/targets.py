"""Which modules a low-rank method acts on.

The rule is decided here once; the optimizers' groups, the adapters and the metrics all ask this module, so that a
run is measured on the same matrices that it was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.errors import UserError

LINEAR_TYPES = (nn.Linear, Conv1D)


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every `nn.Linear` and `Conv1D` of `model` by its dotted name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LINEAR_TYPES)}


def target_modules(model: nn.Module, patterns: str | Sequence[str] = "auto") -> dict[str, nn.Module]:
    """The linear modules of `model` that `patterns` selects, by dotted name, in module order.

    `"auto"` takes every linear layer inside the model's repeated blocks (anything under an `nn.ModuleList`): the
    attention and MLP projections, never embeddings, norms or the output head. `"all-linear"` takes every linear
    layer but the output head. Another string is a regular expression that must match the whole name; a sequence
    gives names or name endings (`"q_proj"`, `"mlp.down_proj"`), each of which must match at least one module.

    Raises:
        UserError: a pattern matches no linear module; the message names it and gives examples that exist.
    """
    linears = linear_modules(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {name: module for name, module in linears.items() if module is not output}
    if isinstance(patterns, str):
        if patterns == "all-linear":
            chosen = linears
        elif patterns == "auto":
            blocks = tuple(name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
            chosen = {name: module for name, module in linears.items() if name.startswith(blocks)}
        else:
            expression = _compiled(patterns)
            chosen = {name: module for name, module in linears.items() if expression.fullmatch(name)}
        if not chosen:
            raise UserError(_matches_nothing(patterns, model, linears))
        return chosen

    wanted: set[str] = set()
    for pattern in patterns:
        matches = [name for name in linears if name == pattern or name.endswith("." + pattern)]
        if not matches:
            raise UserError(_matches_nothing(pattern, model, linears))
        wanted.update(matches)
    if not wanted:
        raise UserError("target_modules must name at least one module, got an empty list")
    return {name: module for name, module in linears.items() if name in wanted}


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"target_modules must be a regular expression, got {pattern!r}: {error}") from None


def _matches_nothing(pattern: str, model: nn.Module, linears: dict[str, nn.Module]) -> str:
    endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
    there = ", ".join(endings[:12]) if endings else "none: the model has no linear layers"
    return f"target_modules {pattern!r} matches no linear module of {type(model).__name__}; there are: {there}"
