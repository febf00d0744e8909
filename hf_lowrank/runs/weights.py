"""A checkpoint's configuration, and whether its weights match it, from headers alone.

Faults are a `UserError` that names the file, and the tensor that is missing, of another shape, or left over.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from hf_lowrank.errors import LowRankWarning, UserError
from hf_lowrank.runs.checkpoints import check_files, weight_files
from hf_lowrank.runs.layout import CONFIG

Shapes = dict[str, tuple[int, ...]]

FLOATING_TYPES = {"F64", "F32", "F16", "BF16"}
# In which nothing but codes is stored; masks of early versions are BOOL, U8 or wider integers.
CODE_TYPES = {"I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4"}

# Building more layers, even without weights, would take minutes: such a number comes from a damaged file.
MOST_LAYERS = 4096


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a checkpoint's folder."""
    import hf_lowrank.adapters  # noqa: F401  AutoConfig learns this package's own model type

    file = folder / CONFIG
    check_files(folder, [file.name] if file.is_file() else [])
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        layers = getattr(config, "num_hidden_layers", 1)
    except Exception as error:  # transformers raises whatever a broken file leads it to
        raise UserError(f"{file}: not a readable configuration: {_one_line(error)}") from None
    if not isinstance(layers, int) or not 0 <= layers <= MOST_LAYERS:
        raise UserError(f"{file}: num_hidden_layers must be between 0 and {MOST_LAYERS}, got {layers!r:.40}")
    return config


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """How a checkpoint's weights are quantised, as its configuration says; None where they are not."""
    given: Any = getattr(config, "quantization_config", None)
    return given.to_dict() if hasattr(given, "to_dict") else given


def positions_of(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model takes; None where its configuration names no limit."""
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((count for count in named if isinstance(count, int) and count > 0), None)


def unexplained_codes(where: object, name: str, kind: str) -> UserError:
    """The error about a weight that is stored as codes although its configuration does not say what they stand for."""
    return UserError(
        f"{where}: {name} is stored as codes of type {kind}, and {CONFIG} has no quantization_config that says what "
        "they stand for"
    )


def skeleton(folder: Path, config: PreTrainedConfig) -> PreTrainedModel | None:
    """The architecture of a checkpoint on the meta device; None for an architecture that is not installed."""
    known = [getattr(transformers, name, None) for name in config.architectures or ()]
    classes = [cls for cls in known if isinstance(cls, type) and issubclass(cls, PreTrainedModel)]
    if not classes and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", LowRankWarning)  # about target modules, which nobody chooses here
            return classes[0](config) if classes else AutoModelForCausalLM.from_config(config)
    except Exception as error:  # any operation may fail on a nonsensical size
        raise UserError(f"{folder / 'config.json'}: does not describe a model: {_one_line(error)}") from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' progress bars and warnings while checkpoints are loaded and written."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def check_checkpoint(folder: Path) -> None:
    """Compares a checkpoint's weights with its configuration, and both with their checksums."""
    check_weights(folder, exact=False)
    check_files(folder, [CONFIG, *{file.name for file in weight_files(folder).values()}])


def check_weights(folder: Path, *, exact: bool = True) -> None:
    """Compares names and shapes in the safetensors files with the architecture of config.json, without any weights.

    Args:
        folder: a checkpoint; nothing is compared where its weights are quantised, in shapes of their library.
        exact: whether surplus tensors are a fault too; older versions of transformers stored buffers.
    """
    stored, kinds = _stored(folder)
    config = read_config(folder)
    model = skeleton(folder, config) if quantization_of(config) is None else None
    if model is None:
        return
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    own = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    for name, kind in kinds.items():
        has_codes = kind in CODE_TYPES and name not in own
        if has_codes or (kind not in FLOATING_TYPES and name in own and own[name].is_floating_point()):
            raise unexplained_codes(folder, name, kind)
    for name in sorted(expected.keys() & stored.keys()):
        if expected[name] != stored[name]:
            raise UserError(
                f"{folder}: the weights do not match config.json: {name} has shape {list(stored[name])}, "
                f"the configuration says {list(expected[name])}"
            )
    missing = sorted(expected.keys() - stored.keys() - tied)
    unknown = sorted(stored.keys() - expected.keys())
    # Some architectures are stored under other names than they run under (fused experts): compare element counts.
    surplus = _count(stored) - _count({n: s for n, s in expected.items() if n not in tied})
    if (missing or unknown) and (surplus != 0 if exact else missing and surplus < 0):
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not part of the model"
        raise UserError(f"{folder}: the weights do not match config.json: {what}")


def _stored(folder: Path) -> tuple[Shapes, dict[str, str]]:
    """Shapes and types of a checkpoint's tensors by name, from its headers."""
    shapes: Shapes = {}
    kinds: dict[str, str] = {}
    for file in set(weight_files(folder).values()):
        with safe_open(file, framework="pt") as tensors:
            for name in list(tensors.keys()):
                header = tensors.get_slice(name)
                shapes[name], kinds[name] = tuple(header.get_shape()), header.get_dtype()
    return shapes, kinds


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _one_line(error: BaseException) -> str:
    # The last line of a strict dataclass's complaint carries what was expected and what was given.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[-1].split())[:300]
