"""Which modules a low-rank method acts on.

The rule is decided here once; the optimizers' groups, the adapters and the metrics all ask this module, so that a
run is measured on the same matrices that it was trained on.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from hf_lowrank.errors import LowRankWarning, UserError

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
            blocks = _blocks(model)
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


def stacked_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters inside repeated blocks that are stacks of matrices, by dotted name, in module order.

    transformers keeps the experts of a mixture so, (experts, rows, columns), in no linear layer.
    """
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, _ConvNd):
            continue
        for name, param in module.named_parameters(recurse=False):
            if param.ndim == 3 and min(param.shape[1:]) > 1:
                found[f"{prefix}.{name}" if prefix else name] = param
    blocks = _blocks(model)
    return {name: param for name, param in found.items() if name.startswith(blocks)}


def warn_of_stacks(model: nn.Module, fate: str, taken: Container[int] = ()) -> None:
    """Warns where a choice of targets that nobody made by hand leaves such stacks out.

    Args:
        fate: what becomes of them.
        taken: the `id`s of those that are targets.
    """
    stacks = {
        n: param for n, param in stacked_parameters(model).items() if param.requires_grad and id(param) not in taken
    }
    if stacks:
        share = sum(map(nn.Parameter.numel, stacks.values())) / sum(map(nn.Parameter.numel, model.parameters()))
        more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
        warnings.warn(
            f"{next(iter(stacks))}{more}, {share:.0%} of the model, are stacks of matrices, in no linear layer, "
            f"and {fate}",
            LowRankWarning,
            stacklevel=4,
        )


def target_parameters(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of `model` with these names or name endings (`"experts.down_proj"`), by dotted name.

    Raises:
        UserError: one matches no parameter of at least two dimensions.
    """
    matrices = {name: param for name, param in model.named_parameters() if param.ndim > 1}
    chosen: dict[str, nn.Parameter] = {}
    for wanted in names:
        matches = {n: param for n, param in matrices.items() if n == wanted or n.endswith("." + wanted)}
        if not matches:
            known = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in matrices})[:12])
            raise UserError(
                f"target_parameters {wanted!r} matches no matrix of {type(model).__name__}; there are: {known}"
            )
        chosen.update(matches)
    return chosen


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """How names inside repeated blocks begin."""
    return tuple(name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"target_modules must be a regular expression, got {pattern!r}: {error}") from None


def _matches_nothing(pattern: str, model: nn.Module, linears: dict[str, nn.Module]) -> str:
    endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
    there = ", ".join(endings[:12]) if endings else "none: the model has no linear layers"
    return f"target_modules {pattern!r} matches no linear module of {type(model).__name__}; there are: {there}"
