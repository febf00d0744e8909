"""LayerNorm scaling (arXiv 2502.05795): the output of both norms of block i, counted from 0, times 1/√(i + 1).

The final norm is not scaled. While a model trains, the factor acts on a norm's output, so that its weight has the same
scale, and the same learning rate, in every block; in a model of the plain architecture the weight absorbs the factor.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hf_lowrank.errors import UserError


class ScaledOutput:
    """A forward hook that multiplies a module's output by `factor`."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output * self.factor


def norm_factors(model: nn.Module) -> dict[str, float]:
    """The factor of each scaled norm of a model of the plain architecture, by dotted name.

    Raises:
        UserError: the blocks have no norms of their own, more than two each, or norms whose weight cannot absorb a
            factor (those that multiply by 1 + weight, or have none); names a block or norm.
    """
    factors: dict[str, float] = {}
    checked: set[type[nn.Module]] = set()
    for block, index, module in _blocks(model):
        norms = {name: child for name, child in module.named_children() if type(child).__name__.endswith("Norm")}
        if len(norms) > 2:
            raise UserError(
                f"layernorm_scaling needs blocks with one or two norms, {block} of {type(model).__name__} has "
                f"{len(norms)}: {', '.join(norms)}"
            )
        for name, norm in norms.items():
            if type(norm) not in checked and not _is_proportional(norm):
                raise UserError(
                    f"layernorm_scaling needs norms whose output is proportional to their weight, {block}.{name} is a "
                    f"{type(norm).__name__}"
                )
            checked.add(type(norm))
            factors[f"{block}.{name}"] = (index + 1) ** -0.5
    if not factors:
        raise UserError(f"layernorm_scaling needs a model whose blocks have norms, got {type(model).__name__}")
    return factors


def scale_norms(model: nn.Module) -> None:
    """Scales the output of the norms from now on."""
    for name, factor in norm_factors(model).items():
        model.get_submodule(name).register_forward_hook(ScaledOutput(factor))


@torch.no_grad()
def fold_scaling(model: nn.Module) -> None:
    """Moves the factors of `scale_norms` from the norms' outputs into their weights and biases."""
    for norm in model.modules():
        for key, hook in list(norm._forward_hooks.items()):
            if isinstance(hook, ScaledOutput):
                for parameter in norm.parameters(recurse=False):
                    parameter.mul_(hook.factor)
                del norm._forward_hooks[key]


def _blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, int, nn.Module]]:
    """The entries of the outermost module lists with their dotted name and number."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{prefix}{name}.{index}", index, block) for index, block in enumerate(child))
        else:
            yield from _blocks(child, f"{prefix}{name}.")


@torch.no_grad()
def _is_proportional(norm: nn.Module) -> bool:
    """Whether doubling the parameters doubles the output; found with a copy on the CPU."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    parameters = list(probe.parameters())
    if not parameters:
        return False
    with torch.device("cpu"):
        outputs = []
        for value in (1.0, 2.0):
            for parameter in parameters:
                parameter.fill_(value)
            outputs.append(probe(torch.linspace(-1.0, 2.0, parameters[0].numel())))
    return torch.allclose(2 * outputs[0], outputs[1])
