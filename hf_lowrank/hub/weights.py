"""Whether a checkpoint's weights are those that its configuration describes, from headers alone."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_lowrank.checkpoint_sources import weight_files
from hf_lowrank.errors import UserError

Shapes = dict[str, tuple[int, ...]]


def check_weights(folder: Path) -> None:
    """Compares names and shapes in the safetensors files with the architecture of config.json, without any weights.

    Raises:
        UserError: a file is damaged or missing, or a tensor is missing, left over or of another shape.
    """
    import hf_lowrank.adapters  # noqa: F401  AutoConfig learns this package's own model type

    stored = _stored(folder)
    model = _skeleton(folder)
    if model is None:
        return
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() & stored.keys()):
        if expected[name] != stored[name]:
            raise UserError(
                f"{folder}: the weights do not match config.json: {name} has shape {list(stored[name])}, "
                f"the configuration says {list(expected[name])}"
            )
    missing = sorted(expected.keys() - stored.keys() - tied)
    unknown = sorted(stored.keys() - expected.keys())
    # Architectures that are stored under other names than they run under (fused experts) have the same numbers.
    if (missing or unknown) and _count(stored) != _count({n: s for n, s in expected.items() if n not in tied}):
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} belongs to nothing"
        raise UserError(f"{folder}: the weights do not match config.json: {what}")


def _stored(folder: Path) -> Shapes:
    shapes: Shapes = {}
    for file in set(weight_files(folder).values()):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in names})
    return shapes


def _skeleton(folder: Path) -> PreTrainedModel | None:
    """The architecture on the meta device; None for one that is not in this installation."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / 'config.json'}: not a readable configuration: {reason}") from None
    with torch.device("meta"):
        for name in config.architectures or ():
            architecture = getattr(transformers, name, None)
            if isinstance(architecture, type) and issubclass(architecture, PreTrainedModel):
                return architecture(config)
        try:
            return AutoModelForCausalLM.from_config(config)
        except ValueError:
            return None


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
