"""Checkpoints that hold an adapter of PEFT alone, such as anyone's LoRA: merged into their base model in the cache."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER_FILES
from hf_lowrank.storage.cache import cached_folder
from hf_lowrank.storage.checksums import fingerprint
from hf_lowrank.storage.parsing import parse_json

# Part of the cache's key: checkpoints that were merged in another way are merged again.
MERGING = "float32"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return all((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


def merged(folder: Path) -> Path:
    """A checkpoint of the plain architecture with the adapter merged into its base model, in float32.

    Raises:
        UserError: the adapter names no base model, that cannot be loaded, or the adapter cannot be merged (CoLA).
    """
    try:
        config = parse_json((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: not a readable adapter configuration: {one_line(error)}"
        ) from None
    if not base:
        raise UserError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path must name the adapter's base model")
    # A base model in a folder may change under its name; one of the Hub has a revision.
    files = {file.name for file in Path(base).glob("*.safetensors")}
    content = fingerprint(Path(base), files) if files else revision
    key = f"{MERGING} {fingerprint(folder, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))} {base} {content}"
    return cached_folder("merged", key, lambda made: _merge(folder, str(base), revision, made))


def _merge(folder: Path, base: str, revision: str | None, made: Path) -> None:
    from peft import PeftModel

    import hf_lowrank.adapters  # noqa: F401  (PEFT learns this package's adapters)
    from hf_lowrank.runs.weights import quiet_transformers

    try:
        # Rows and factors are drawn before they are loaded.
        with quiet_transformers(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            model: Any = _base_model(base, revision or "main")
            _resize_vocabulary(model, folder / ADAPTER_WEIGHTS)
            model = PeftModel.from_pretrained(model, str(folder))
            if not hasattr(model, "merge_and_unload"):
                kind = getattr(model.active_peft_config, "peft_type", "its kind")
                raise ValueError(f"{getattr(kind, 'value', kind)} changes no weights, so there is nothing to merge")
            model = model.merge_and_unload()
            model.save_pretrained(made)
    except Exception as error:  # transformers and PEFT raise whatever a broken file leads them to
        raise UserError(f"{folder}: its adapter cannot be merged into {base}: {one_line(error)}") from None
    for source in (folder, Path(base)):
        found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
        for file in found:
            shutil.copyfile(file, made / file.name)
        if found:
            break


def _base_model(base: str, revision: str) -> Any:
    """The base model in float32; a quantised one dequantised, or merging would round the adapter to its codes."""
    from hf_lowrank.runs.loading import load_in_float32
    from hf_lowrank.runs.weights import check_weights

    if Path(base).is_dir():
        check_weights(Path(base), exact=False)
    config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    return load_in_float32(base, config, revision=revision)


def _resize_vocabulary(model: Any, weights: Path) -> None:
    """Gives the model the rows of the embedding that its adapter was saved with, if that has one."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    stored = f"base_model.model.{name}.weight"
    with safe_open(weights, framework="pt") as tensors:
        names = set(tensors.keys())
        rows = tensors.get_slice(stored).get_shape()[0] if stored in names else len(embedding.weight)
    if rows != len(embedding.weight):
        model.resize_token_embeddings(rows, mean_resizing=False)
