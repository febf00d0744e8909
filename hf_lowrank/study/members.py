"""Whether a study's members are comparable: the same architecture, size, tokenizer and corpus."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_lowrank.errors import UserError
from hf_lowrank.runs.layout import TOKENIZER
from hf_lowrank.runs.selection import size_of
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.study.layout import ExternalRun, Run
from hf_lowrank.study.spec import StudyFile
from hf_lowrank.training.recipe import Recipe
from hf_lowrank.training.tokenization import load_tokenizer

logger = logging.getLogger(__name__)

# Fields of a configuration that change neither the shapes of weights nor what the model computes with them.
HARMLESS = {
    "architectures", "attention_dropout", "attn_pdrop", "dtype", "embd_pdrop", "hidden_dropout", "initializer_range",
    "resid_pdrop", "torch_dtype", "transformers_version", "use_cache", "_name_or_path", "name_or_path",
}  # fmt: skip
# Keys of a data block that change neither the training text nor the held-out sequences.
HARMLESS_DATA = {"evaluation_sequences_in_training"}


def check_members(file: StudyFile, runs: Sequence[Run], recipes: Mapping[str, Recipe]) -> dict[str, Trajectory]:
    """Compares every member with the baseline; returns the trajectories of external runs by run name.

    Raises:
        UserError: an external run has no checkpoints, or a member's architecture, size, tokenizer or data differ;
            names the member, the key and both values.
    """
    trajectories: dict[str, Trajectory] = {}
    external = [run for run in runs if isinstance(run, ExternalRun)]
    for run in external:
        key = f"members.{run.member}.runs"
        try:
            trajectories[run.name] = Trajectory(run.source, revisions=file.settings.members[run.member].revisions)
            size_of(trajectories[run.name])
        except UserError as error:
            raise file.fault(key, f"is wrong: {error}") from None
        if [other.source for other in external].count(run.source) > 1:
            raise file.fault(key, f"must name each run once, got {run.source} twice")
    _compare_recipes(file, recipes)
    if external:
        _compare_external(file, external, trajectories, recipes)
    return trajectories


def _compare_recipes(file: StudyFile, recipes: Mapping[str, Recipe]) -> None:
    """Compares trained members with the baseline or, if that is external, with the first of them."""
    blocks = {name: _comparable(recipe) for name, recipe in recipes.items()}
    baseline = file.settings.baseline if file.settings.baseline in blocks else next(iter(blocks), "")
    for name, own in blocks.items():
        for block, theirs in blocks[baseline].items():
            ours = own[block]
            keys = [*theirs, *(key for key in ours if key not in theirs)]
            for key in sorted(keys, key=lambda key: key != "model_type"):
                if ours.get(key) != theirs.get(key):
                    raise file.fault(
                        f"members.{name}",
                        f"has {block}.{key} {ours.get(key)!r}, the baseline {baseline} has {theirs.get(key)!r}; "
                        "members of a study share model and data",
                    )


def _comparable(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What of a recipe must be the same for all members, by block."""
    config = {key: value for key, value in recipe.config().to_dict().items() if key not in HARMLESS}
    if "vocab_size" not in recipe.model:
        config.pop("vocab_size", None)  # the tokenizer's, which the data block determines
    data = recipe.data.model_dump(mode="json")
    return {"model": config, "data": {key: value for key, value in data.items() if key not in HARMLESS_DATA}}


def _compare_external(
    file: StudyFile,
    runs: Sequence[ExternalRun],
    trajectories: Mapping[str, Trajectory],
    recipes: Mapping[str, Recipe],
) -> None:
    baseline = file.settings.baseline
    # An external baseline is compared with what is trained here, as every other external run.
    reference = baseline if baseline in recipes or not recipes else next(iter(recipes))
    tokenizer: PreTrainedTokenizerBase | None
    if reference in recipes:
        shape, tokenizer = _shape_of_recipe(recipes[reference])
    else:
        first = trajectories[next(run.name for run in runs if run.member == baseline)]
        shape, tokenizer = json.loads(size_of(first)), tokenizer_of(first)
    fingerprint = None if tokenizer is None else ids_fingerprint(tokenizer)
    for run in runs:
        key, trajectory = f"members.{run.member}.runs", trajectories[run.name]
        for name, value in json.loads(size_of(trajectory)).items():
            if value != shape[name]:
                raise file.fault(
                    key,
                    f"{run.source} has model.{name} {value!r}, {reference} has {shape[name]!r}; members of a study "
                    "share architecture, size and tokenizer",
                )
        own = tokenizer_of(trajectory)
        if own is None:
            logger.warning("%s: has no tokenizer; assuming that of %s", run.source, reference)
        elif fingerprint is not None and ids_fingerprint(own) != fingerprint:
            raise file.fault(
                key, f"{run.source} has another tokenizer than {reference}; losses per token are not comparable"
            )


def ids_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex; equal for tokenizers that encode plain text to the same ids, whatever their class and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    content = json.loads(backend.to_str())
    parts = {key: content.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _shape_of_recipe(recipe: Recipe) -> tuple[dict[str, Any], PreTrainedTokenizerBase]:
    from hf_lowrank.training.corpus import corpus_tokenizer

    tokenizer = corpus_tokenizer(recipe.data)
    fields = recipe.config(vocab_size=len(tokenizer)).to_dict()
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: fields.get(name) for name in (*names, "vocab_size")}, tokenizer


def tokenizer_of(trajectory: Trajectory) -> PreTrainedTokenizerBase | None:
    """The tokenizer of an external run; None if it has none."""
    folder = trajectory.extra(TOKENIZER)
    candidates = [str(folder)] if folder is not None and Path(folder).is_dir() else []
    folder_or_repo = trajectory.tokenizer_source
    has_files = not Path(folder_or_repo).is_dir() or any(
        (Path(folder_or_repo) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    )
    for source in [*candidates, *([folder_or_repo] if has_files else [])]:
        try:
            return load_tokenizer(source, key="tokenizer")
        except UserError as error:
            logger.debug("%s", error)
    if Path(trajectory.path).is_dir() and (Path(trajectory.path) / "tokenizer.json").is_file():
        return load_tokenizer(trajectory.path, key="tokenizer")
    return None
