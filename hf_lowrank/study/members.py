"""Whether a study's members can be compared: one architecture, one size, one tokenizer, one corpus."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_lowrank.errors import UserError
from hf_lowrank.runs.layout import TOKENIZER
from hf_lowrank.runs.selection import size_of
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.study.layout import Run
from hf_lowrank.study.spec import StudyFile
from hf_lowrank.training.recipe import Recipe
from hf_lowrank.training.tokenization import load_tokenizer

logger = logging.getLogger(__name__)

# Of a configuration, what changes neither the weights' shapes nor what the model computes with them.
HARMLESS = {
    "architectures", "attention_dropout", "attn_pdrop", "dtype", "embd_pdrop", "hidden_dropout", "initializer_range",
    "resid_pdrop", "torch_dtype", "transformers_version", "use_cache", "_name_or_path", "name_or_path",
}  # fmt: skip
# Of a data block, what changes neither the training text nor what losses are measured on.
ASIDE = {"evaluation_sequences_in_training"}


@dataclass(frozen=True)
class Looks:
    """What of a member must be as it is with the others.

    Attributes:
        model: configuration fields; `data`: of the recipe's data block, empty for strangers.
        tokenizer: its fingerprint, None where it is not known.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    tokenizer: str | None


def check_members(file: StudyFile, runs: list[Run], recipes: dict[str, Recipe]) -> dict[str, Trajectory]:
    """Compares every member with the baseline; returns the strangers' trajectories by run name.

    Raises:
        UserError: a stranger has no checkpoints, or a member's architecture, size, tokenizer or data differ; names
            the member, the key and both values.
    """
    settings = file.settings
    strangers: dict[str, Trajectory] = {}
    for run in runs:
        if run.source is not None:
            revisions = settings.members[run.member].revisions
            try:
                strangers[run.name] = Trajectory(run.source, revisions=revisions)
                size_of(strangers[run.name])
            except UserError as error:
                raise file.fault(f"members.{run.member}.runs", f"is wrong: {error}") from None
            twice = [other for other in runs if other.source == run.source and other is not run]
            if twice:
                raise file.fault(f"members.{run.member}.runs", f"must name each run once, {run.source} is there twice")
    looks = {name: _of_recipe(recipe) for name, recipe in recipes.items()}
    _compare_recipes(file, looks)
    if strangers:
        _compare_strangers(file, runs, strangers, recipes)
    return strangers


def _of_recipe(recipe: Recipe) -> Looks:
    config = {key: value for key, value in recipe.config().to_dict().items() if key not in HARMLESS}
    if "vocab_size" not in recipe.model:
        config.pop("vocab_size", None)  # the tokenizer's, which the data block decides
    data = {key: value for key, value in recipe.data.model_dump(mode="json").items() if key not in ASIDE}
    return Looks(config, data, None)


def _compare_recipes(file: StudyFile, looks: dict[str, Looks]) -> None:
    """Members that are trained here, against the baseline or, where that is a stranger, the first of them."""
    if not looks:
        return
    baseline = file.settings.baseline if file.settings.baseline in looks else next(iter(looks))
    base = looks[baseline]
    for name, look in looks.items():
        for block, ours, theirs in (("model", look.model, base.model), ("data", look.data, base.data)):
            keys = [*theirs, *(key for key in ours if key not in theirs)]
            for key in sorted(keys, key=lambda key: key != "model_type"):
                if ours.get(key) != theirs.get(key):
                    raise file.fault(
                        f"members.{name}",
                        f"has {block}.{key} {ours.get(key)!r}, the baseline {baseline} has {theirs.get(key)!r}; "
                        "members of a study share model and data",
                    )


def _compare_strangers(
    file: StudyFile, runs: list[Run], strangers: dict[str, Trajectory], recipes: dict[str, Recipe]
) -> None:
    baseline = file.settings.baseline
    # Where the baseline is a stranger, it is compared with what is trained here, and so is every other stranger.
    reference = baseline if baseline in recipes or not recipes else next(iter(recipes))
    tokenizer: PreTrainedTokenizerBase | None
    if reference in recipes:
        shape, tokenizer = _shape_of_recipe(recipes[reference])
    else:
        first = strangers[next(run.name for run in runs if run.member == baseline)]
        shape, tokenizer = json.loads(size_of(first)), tokenizer_of(first)
    mark = None if tokenizer is None else ids_fingerprint(tokenizer)
    for run in runs:
        if run.source is None:
            continue
        key, trajectory = f"members.{run.member}.runs", strangers[run.name]
        for name, value in json.loads(size_of(trajectory)).items():
            if value != shape[name]:
                raise file.fault(
                    key,
                    f"{run.source} has model.{name} {value!r}, {reference} has {shape[name]!r}; members of a study "
                    "share architecture, size and tokenizer",
                )
        own = tokenizer_of(trajectory)
        if own is None:
            logger.warning("%s: has no tokenizer; taken to be that of %s", run.source, reference)
        elif mark is not None and ids_fingerprint(own) != mark:
            raise file.fault(
                key, f"{run.source} has another tokenizer than {reference}; losses per token would not compare"
            )


def ids_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex; equal for tokenizers that turn plain text into the same ids, whatever their class and special tokens."""
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
    """A stranger's tokenizer; None where it has none."""
    folder = trajectory.extra(TOKENIZER)
    candidates = [str(folder)] if folder is not None and Path(folder).is_dir() else []
    where = trajectory.tokenizer_source
    has_files = not Path(where).is_dir() or any(
        (Path(where) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    )
    for source in [*candidates, *([where] if has_files else [])]:
        try:
            return load_tokenizer(source, key="tokenizer")
        except UserError as error:
            logger.debug("%s", error)
    if Path(trajectory.path).is_dir() and (Path(trajectory.path) / "tokenizer.json").is_file():
        return load_tokenizer(trajectory.path, key="tokenizer")
    return None
