"""Which modules a low-rank method targets, and what Trainer would pass to an optimizer.

The optimizers' groups, the adapters and the metrics all use these rules, so that a run is measured on the same
matrices that it was trained on.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from hf_lowrank.errors import LowRankWarning, UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

LINEAR_TYPES = (nn.Linear, Conv1D)
# Trainer's own exemptions from weight decay (`Trainer.get_decay_parameter_names`): biases and norms.
NO_DECAY_PATTERNS = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every `nn.Linear` and `Conv1D` of `model`, and those that keep codes, by dotted name, in module order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_TYPES) or keeps_codes(module)
    }


def keeps_codes(module: nn.Module) -> bool:
    """Whether a module is a linear layer that stores its weight in eight bits."""
    return bool(getattr(type(module), "keeps_codes", False))


def is_plain(module: nn.Module) -> bool:
    """Whether a linear module computes what its type does: some routers inherit `nn.Linear` and return more.

    A class with a forward pass of its own is tried once.
    """
    kind = type(module)
    if keeps_codes(module) or kind.forward in [linear.forward for linear in LINEAR_TYPES]:
        return True
    if kind not in _TRIED:
        _TRIED[kind] = _computes_linearly(module)
    return _TRIED[kind]


_TRIED: dict[type[nn.Module], bool] = {}


def _computes_linearly(module: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device="cpu")

    drawn = {name: draw(*parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    weight = drawn["weight"].T if isinstance(module, Conv1D) else drawn["weight"]
    rows = draw(2, 3, weight.shape[1])
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = functional_call(module, drawn, (rows,))
    except Exception:  # it takes other arguments
        return False
    expected = linear(rows, weight, drawn.get("bias"))
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def compiled(pattern: str, option: str = "target_modules") -> re.Pattern[str]:
    """`pattern` as a regular expression; raises UserError, naming `option`, if it is not valid."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{option} must be a regular expression, got {pattern!r}: {error}") from None


def target_modules(model: nn.Module, patterns: str | Sequence[str] = "auto") -> dict[str, nn.Module]:
    """The linear modules of `model` that `patterns` selects, by dotted name, in module order.

    `"auto"` selects every linear layer inside the model's repeated blocks (anything under an `nn.ModuleList`): the
    attention and MLP projections, never embeddings, norms or the output head. `"all-linear"` selects every linear
    layer except the output head. Both leave out vectors (a gate with one output) and routers with a forward pass of
    their own. Another string is a regular expression that must match the whole name; a sequence
    contains names or name endings (`"q_proj"`, `"mlp.down_proj"`), each of which must match at least one module.

    Raises:
        UserError: a pattern matches no linear module; the message names it and gives existing names.
    """
    linears = linear_modules(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {name: module for name, module in linears.items() if module is not output}
    if isinstance(patterns, str):
        matrices = {n: module for n, module in linears.items() if is_plain(module) and 1 not in _shape(module)}
        if patterns == "all-linear":
            chosen = matrices
        elif patterns == "auto":
            blocks = _blocks(model)
            chosen = {name: module for name, module in matrices.items() if name.startswith(blocks)}
        else:
            expression = compiled(patterns)
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

    transformers stores the experts of a mixture like this, (experts, rows, columns), outside any linear layer.
    """
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            continue
        for name, param in module.named_parameters(recurse=False):
            if param.ndim == 3 and min(param.shape[1:]) > 1:
                found[f"{prefix}.{name}" if prefix else name] = param
    blocks = _blocks(model)
    return {name: param for name, param in found.items() if name.startswith(blocks)}


def warn_about_stacks(model: nn.Module, fate: str, targets: Container[int] = ()) -> None:
    """Warns if the automatic choice of targets leaves out stacks of matrices.

    Args:
        fate: what happens to them, to follow "and".
        targets: the `id`s of the targets.
    """
    stacks = {
        n: param for n, param in stacked_parameters(model).items() if param.requires_grad and id(param) not in targets
    }
    if stacks:
        share = sum(map(nn.Parameter.numel, stacks.values())) / sum(map(nn.Parameter.numel, model.parameters()))
        more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
        warnings.warn(
            f"{next(iter(stacks))}{more}, {share:.0%} of the model, are stacks of matrices outside any linear layer "
            f"and {fate}",
            LowRankWarning,
            stacklevel=4,
        )


def target_parameters(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of `model` with these names or name endings (`"experts.down_proj"`), by dotted name.

    Raises:
        UserError: a name matches no parameter of at least two dimensions.
    """
    matrices = {name: param for name, param in model.named_parameters() if param.ndim > 1}
    chosen: dict[str, nn.Parameter] = {}
    for wanted in names:
        matches = {n: param for n, param in matrices.items() if n == wanted or n.endswith("." + wanted)}
        if not matches:
            known = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in matrices})[:12])
            raise UserError(
                f"target_parameters {wanted!r} matches no matrix of {type(model).__name__}; available: {known}"
            )
        chosen.update(matches)
    return chosen


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that Trainer would decay."""
    from transformers.trainer_pt_utils import get_parameter_names

    return set(get_parameter_names(model, [nn.LayerNorm], list(NO_DECAY_PATTERNS)))


def decay_groups(
    model: nn.Module, weight_decay: float, *, without: Iterable[nn.Parameter | None] = ()
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in groups with and without weight decay as Trainer's, but for `without`."""
    decayed, left_out = decayed_names(model), set(map(id, without))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in left_out]
    groups = [
        {"params": [p for name, p in trained if (name in decayed) is decays], "weight_decay": weight_decay * decays}
        for decays in (True, False)
    ]
    return [group for group in groups if group["params"]]


def adam_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The keyword arguments of an optimizer that `TrainingArguments` hold: lr, betas, eps and weight_decay.

    For `Trainer(optimizer_cls_and_kwargs=(GaLoreAdamW, {"model": model, "rank": 128, **adam_arguments(args)}))`.
    """
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }


def _shape(module: Any) -> tuple[int, ...]:
    return (module.out_features, module.in_features) if keeps_codes(module) else tuple(module.weight.shape)


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names inside repeated blocks."""
    return tuple(name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def _matches_nothing(pattern: str, model: nn.Module, linears: dict[str, nn.Module]) -> str:
    endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
    available = ", ".join(endings[:12]) if endings else "none, the model has no linear layers"
    return f"target_modules {pattern!r} matches no linear module of {type(model).__name__}; available: {available}"
