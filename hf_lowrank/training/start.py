"""What a run directory holds before the first step, and which recipe it belongs to."""

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_lowrank.errors import UserError
from hf_lowrank.runs.checkpoints import damage_of, last_resumable_checkpoint
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.layout import EVALUATION_SET, RECIPE, TOKENIZER, checkpoint_folder
from hf_lowrank.runs.run_files import read_facts, read_recipe, read_trainer_state, section, write_facts, write_recipe
from hf_lowrank.storage.checksums import write_checksums
from hf_lowrank.storage.parsing import dump_yaml, parse_yaml
from hf_lowrank.training.corpus import Corpus
from hf_lowrank.training.recipe import Recipe

# Of a method, that a later version may have added without a run of before becoming another one.
MOST_NEW_SETTINGS = 3
# The keys by which a process takes its share of a step.
PER_PROCESS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def is_started(run: Path) -> bool:
    """Whether a recipe has claimed the folder."""
    return (run / RECIPE).exists()


def is_finished(run: Path) -> bool:
    """Whether the run has a complete checkpoint of its last step, and its start files are intact."""
    checkpoint = last_resumable_checkpoint(run) if is_started(run) else None
    if checkpoint is None or not is_last(checkpoint):
        return False
    try:
        return has_start(run)
    except UserError:  # `pretrain` reports it
        return False


def is_last(checkpoint: Path) -> bool:
    """Whether a checkpoint is that of the run's last step."""
    state = read_trainer_state(checkpoint)
    return state is not None and state.finished


def has_start(run: Path) -> bool:
    """Whether everything that is written before the first step is there.

    Raises:
        UserError: some of it is damaged; names the file.
    """
    for folder in (run / TOKENIZER, checkpoint_folder(run, 0)):
        damage = damage_of(folder) if folder.is_dir() else None
        if damage is not None:
            raise UserError(f"{folder}: damaged: {damage}; remove that folder and rerun, which writes it again")
    if (run / EVALUATION_SET).exists():
        EvaluationSet.load(run)
    written = (run / RECIPE, run / EVALUATION_SET, run / TOKENIZER, checkpoint_folder(run, 0))
    return bool(read_facts(run)) and all(path.exists() for path in written)


def write_start(run: Path, recipe: Recipe, corpus: Corpus, model: PreTrainedModel, sizes: dict[str, int]) -> None:
    """Writes what is fixed before the first step, with `sizes` among the facts; existing files stay."""
    run.mkdir(parents=True, exist_ok=True)
    # The recipe comes first: it claims the folder, whatever else is missing.
    if not (run / RECIPE).exists():
        write_recipe(run, recipe.plain())
    if not (run / EVALUATION_SET).exists():
        corpus.evaluation.save(run)
    _save_folder(run / TOKENIZER, corpus.tokenizer)
    _save_folder(checkpoint_folder(run, 0), model)
    if not read_facts(run):
        write_facts(
            run,
            {
                "recipe": next(_digests(recipe)),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "unigram_loss": corpus.unigram_loss,
                "train_sequences": len(corpus.train) if corpus.train is not None else None,
                "corpus_fingerprint": corpus.fingerprint,
                "evaluation_fingerprint": corpus.evaluation.fingerprint,
                **sizes,
                "device": str(torch.accelerator.current_accelerator() or "cpu"),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "versions": {name: version(name) for name in ("hf_lowrank", "transformers", "accelerate", "peft")},
            },
        )


def _save_folder(folder: Path, content: PreTrainedModel | PreTrainedTokenizerBase) -> None:
    """Saves all of `content` or nothing; an existing folder stays."""
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(partial, ignore_errors=True)
    content.save_pretrained(partial)
    write_checksums(partial)
    os.replace(partial, folder)


def check_belongs(run: Path, recipe: Recipe) -> bool:
    """Whether `run` was started by `recipe`; False if it is not there or empty.

    Raises:
        UserError: it belongs to something else; names the first difference.
    """
    if not run.exists():
        return False
    if not run.is_dir():
        raise UserError(f"{run}: --output must be a folder, this is a file")
    if not (run / RECIPE).exists():
        known = read_facts(run).get("recipe")
        if any(known == digest for digest in _digests(recipe)):
            return True  # it was damaged, and the user removed it
        # A lock, or a temporary file of a killed process, makes no run.
        if any(not path.name.startswith(".") for path in run.iterdir()):
            raise UserError(f"{run}: --output must be a run directory or empty; it contains no {RECIPE}")
        return False
    theirs: Any = read_recipe(run)
    ours = parse_yaml(dump_yaml(recipe.plain()))
    fields = type(recipe.settings).model_fields.items()
    if isinstance(theirs, dict) and isinstance(theirs.get("method"), dict):
        # Method settings that did not exist when it was written have their defaults.
        new = {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}
        theirs = {**theirs, "method": {**new, **theirs["method"]}}
    if read_facts(run).get("processes", 1) != int(os.environ.get("WORLD_SIZE", "1")):
        # Another number of processes splits a step differently; `check_same_step` compares its size.
        for key in PER_PROCESS:
            section(theirs, "training").pop(key, None)
            ours["training"].pop(key, None)
    difference = _first_difference(theirs, ours)
    if difference is not None:
        raise UserError(
            f"{run}: the run directory belongs to another recipe: {difference}; choose another --output or remove it"
        )
    return True


def check_same_step(run: Path, args: TrainingArguments, sequences_per_step: int) -> None:
    """Raises a `UserError` if a step has another number of sequences than when the run started."""
    known = read_facts(run).get("sequences_per_step")
    if known is not None and known != sequences_per_step:
        raise UserError(
            f"{run}: a step must have {known} sequences, as when the run started, got {sequences_per_step} on "
            f"{args.world_size} processes; change training.{' or training.'.join(PER_PROCESS)}"
        )


def check_same_corpus(run: Path, corpus: Corpus) -> None:
    """Raises a `UserError` if the corpus or the held-out sequences differ from those that the run started with."""
    known = read_facts(run).get("corpus_fingerprint")
    if known is not None and known != corpus.fingerprint:
        raise UserError(
            f"{run}: the corpus has changed since the run started (data.source {corpus.data.source}); choose another "
            "--output"
        )
    if (run / EVALUATION_SET).exists() and EvaluationSet.load(run).fingerprint != corpus.evaluation.fingerprint:
        raise UserError(f"{run / EVALUATION_SET}: the held-out sequences have changed; choose another --output")


def _digests(recipe: Recipe) -> Iterator[str]:
    """Of the recipe, then as versions may have recorded it that lacked up to three of its method's settings."""
    plain = recipe.plain()
    yield _digest(plain)
    defaults = {name: field.get_default(call_default_factory=True)
                for name, field in type(recipe.settings).model_fields.items()}  # fmt: skip
    settings = plain["method"]
    at_default = [name for name in settings if name in defaults and settings[name] == defaults[name]]
    for count in range(1, MOST_NEW_SETTINGS + 1):
        for new in itertools.combinations(at_default, count):
            kept = {name: value for name, value in settings.items() if name not in new}
            yield _digest({**plain, "method": kept})


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(dump_yaml(plain).encode()).hexdigest()


def _first_difference(theirs: Any, ours: Any, key: str = "") -> str | None:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return None if theirs == ours else f"{key or 'recipe'} is {ours!r} now, {theirs!r} there"
    for name in dict.fromkeys([*ours, *theirs]):
        dotted = f"{key}.{name}" if key else str(name)
        if name not in theirs:
            return f"{dotted} is {ours[name]!r} now, not set there"
        if name not in ours:
            return f"{dotted} is not set now, {theirs[name]!r} there"
        difference = _first_difference(theirs[name], ours[name], dotted)
        if difference is not None:
            return difference
    return None
