"""From a recipe to a run directory: Trainer, started, continued or found finished."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging
from yaml import YAMLError

from hf_lowrank.errors import StoppedError, UserError
from hf_lowrank.memory.recorder import memory_recorder
from hf_lowrank.optim.engines import refuse_engines
from hf_lowrank.runs.evaluation_set import FILE_NAME as EVALUATION_FILE
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.facts import read_facts, write_facts
from hf_lowrank.runs.resume import is_sharded, last_whole_checkpoint, step_of
from hf_lowrank.storage.checksums import damage_by_checksums, read_sealed_text, sealed_text, write_checksums
from hf_lowrank.storage.files import refusal_of, write_text
from hf_lowrank.storage.locks import is_first_process, locked
from hf_lowrank.storage.parsing import dump_yaml, parse_json, parse_yaml
from hf_lowrank.training.callbacks import (
    Checksums,
    FinalCheckpoint,
    NumbersOnly,
    Progress,
    WholeWeights,
    drop_logits,
    token_loss,
)
from hf_lowrank.training.corpus import Corpus, prepare_corpus
from hf_lowrank.training.facts import FactsRecorder
from hf_lowrank.training.recipe import Recipe, first_line
from hf_lowrank.training.sequences import HeldOutSequences, collate
from hf_lowrank.training.stopping import InterimRemoved, StopOnSignal, is_interim, remove_interim
from hf_lowrank.training.tokenization import load_tokenizer, padding_id
from hf_lowrank.training.trainer import WholeTrainer

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
# How a process takes its share of a step.
PER_PROCESS = ("per_device_train_batch_size", "gradient_accumulation_steps")
# How gloo and NCCL say that a process is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "remote process exit")


def pretrain(recipe: Recipe, output: str | os.PathLike[str] | None = None) -> Path:
    """Trains by `recipe` into the run directory `output` (`runs/<name>-seed<seed>`), and returns it.

    A run that was interrupted continues from its last whole checkpoint, bit for bit as if it never had been; of a
    finished one nothing is done again. The initial weights and the order of the data follow from the recipe's seed
    alone, whatever the method.

    Raises:
        UserError: the corpus or the model cannot be had, or `output` belongs to another recipe or is in use by
            another process: nothing is written; or it cannot be written on, another process of the launch was lost, or
            the training diverged.
        StoppedError: SIGTERM came; the run saved, and the next call goes on.
    """
    run = Path(output) if output is not None else Path("runs") / f"{recipe.name}-seed{recipe.seed}"
    transformers_logging.disable_progress_bar()
    with ExitStack() as held:
        try:
            return _pretrain(recipe, run, held)
        except (OSError, RuntimeError, SafetensorError) as error:
            refusal = refusal_of(error) or _loss_of_another(error)
            if refusal is None:
                raise
            raise UserError(f"{run}: {refusal}; the next call goes on from the last whole checkpoint") from error


def _loss_of_another(error: BaseException) -> str | None:
    """One line where another process of this launch has ended, None where `error` is something else."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not isinstance(error, RuntimeError):
        return None
    lost = type(error).__name__ in ("DistNetworkError", "DistStoreError") or any(words in str(error) for words in LOST)
    return "another process of this launch has ended, or cannot be reached" if lost else None


def _pretrain(recipe: Recipe, run: Path, held: ExitStack) -> Path:
    started = check_belongs(run, recipe)
    if started:
        held.enter_context(locked(run, "train"))
    checkpoint = last_whole_checkpoint(run) if started else None
    if checkpoint is not None and is_first_process():
        remove_interim(run, step_of(checkpoint))
    finished = checkpoint is not None and _is_finished(checkpoint)
    begun = started and _has_start(run)
    if checkpoint is not None and finished and begun:
        logger.info("%s is finished at step %d: nothing to do", run, step_of(checkpoint))
        return run

    args = recipe.arguments(run)
    refuse_engines(args)
    # Of several processes the first fills the cache, the others read it.
    with args.main_process_first(desc="corpus"):
        corpus = _corpus(recipe, _saved_tokenizer(run) if started else None)
    _check_same_corpus(run, corpus)
    sequences_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    _check_same_step(run, args, sequences_per_step)
    workers = "one process" if args.world_size == 1 else f"{args.world_size} processes"
    logger.info("training: %d sequences a step by %s on %s", sequences_per_step, workers, args.device.type)
    if args.max_steps <= 0 and corpus.train is not None:
        args.max_steps = math.ceil(args.num_train_epochs * len(corpus.train) / sequences_per_step)
    model = _initial_model(recipe, corpus)

    if not started:
        held.enter_context(locked(run, "train"))
        if args.should_save and is_started(run):
            raise UserError(f"{run}: another process has begun this run in the meantime; call again to continue it")
    if args.should_save:
        _write_start(
            run, recipe, corpus, model, {"processes": args.world_size, "sequences_per_step": sequences_per_step}
        )
    if finished:
        logger.info("%s is finished: only what was missing of its beginning is written", run)
        return run
    facts = read_facts(run)
    memory = memory_recorder(recipe, args, model, facts)
    held.callback(memory.close)
    stopping = StopOnSignal(checkpoint)
    held.callback(stopping.release)
    trainer = stopping.trainer = _trainer(recipe, args, model, corpus, sequences_per_step, stopping)
    if checkpoint is not None and is_sharded(checkpoint) != trainer.is_fsdp_enabled:
        written, now = ("under", "with") if is_sharded(checkpoint) else ("without", "without")
        raise UserError(f"{checkpoint} was written {written} FSDP2; continue the run {now} FSDP2, as it began")
    trainer.add_callback(memory)
    trainer.add_callback(
        FactsRecorder(
            run,
            facts,
            tokens_per_step=sequences_per_step * recipe.data.sequence_length,
            resumed_step=step_of(checkpoint) if checkpoint else 0,
            keep_resumed=checkpoint is not None and not is_interim(checkpoint),
        )
    )
    if checkpoint is not None:
        logger.info("%s continues from step %d", run, step_of(checkpoint))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stopping.stopped is not None:
        raise StoppedError(
            f"{run}: stopped by SIGTERM after step {stopping.stopped}, which is saved; call again to go on"
        )
    return run


def _has_start(run: Path) -> bool:
    """Whether all that is written before the first step is there.

    Raises:
        UserError: some of it is damaged; names the file.
    """
    for folder in (run / "tokenizer", run / "checkpoint-0"):
        damage = damage_by_checksums(folder) if folder.is_dir() else None
        if damage is not None:
            raise UserError(f"{folder}: damaged: {damage}; remove that folder, and call again: it is written again")
    if (run / EVALUATION_FILE).exists():
        EvaluationSet.load(run)
    names = (RECIPE_FILE, EVALUATION_FILE, "tokenizer", "checkpoint-0")
    return bool(read_facts(run)) and all((run / name).exists() for name in names)


def is_started(run: Path) -> bool:
    """Whether a recipe has claimed the folder."""
    return (run / RECIPE_FILE).exists()


def is_finished(run: Path) -> bool:
    """Whether the run directory's training has come to its last step, and what it began with is whole."""
    checkpoint = last_whole_checkpoint(run) if is_started(run) else None
    if checkpoint is None or not _is_finished(checkpoint):
        return False
    try:
        return _has_start(run)
    except UserError:  # `pretrain` names it
        return False


def check_belongs(run: Path, recipe: Recipe) -> bool:
    """Whether `run` was started by `recipe`, False where nothing is there.

    Raises:
        UserError: it is something else's; names the first difference.
    """
    if not run.exists():
        return False
    if not run.is_dir():
        raise UserError(f"{run}: --output must be a folder, this is a file")
    file = run / RECIPE_FILE
    if not file.exists():
        if read_facts(run).get("recipe") == _digest(recipe):
            return True  # it was taken away, being damaged
        # A lock, or a file that was being written when its process was killed, is nobody's run.
        if any(not path.name.startswith(".") for path in run.iterdir()):
            raise UserError(f"{run}: --output must be a run directory, or empty; there is no {RECIPE_FILE} in it")
        return False
    try:
        theirs = parse_yaml(read_sealed_text(file))
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(
            f"{file}: not readable: {first_line(error)}; remove it, and call again with the run's recipe"
        ) from None
    ours = parse_yaml(dump_yaml(recipe.plain()))
    theirs = _with_defaults(theirs, recipe)
    if read_facts(run).get("processes", 1) != int(os.environ.get("WORLD_SIZE", "1")):
        # Another number of processes divides a step otherwise; that it stays the same step is checked by its size.
        theirs, ours = _without(theirs, PER_PROCESS), _without(ours, PER_PROCESS)
    difference = _first_difference(theirs, ours)
    if difference is not None:
        raise UserError(
            f"{run}: the run directory belongs to another recipe: {difference}; choose another --output or remove it"
        )
    return True


def _with_defaults(theirs: Any, recipe: Recipe) -> Any:
    """A plain recipe with the settings that its method had not yet, when it was written, as they are by default."""
    if not isinstance(theirs, dict) or not isinstance(theirs.get("method"), dict):
        return theirs
    fields = type(recipe.settings).model_fields.items()
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()
    }
    return {**theirs, "method": {**defaults, **theirs["method"]}}


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(dump_yaml(recipe.plain()).encode()).hexdigest()


def _without(recipe: Any, keys: Sequence[str]) -> Any:
    """A plain recipe without some keys of its training."""
    if not isinstance(recipe, dict) or not isinstance(recipe.get("training"), dict):
        return recipe
    return {**recipe, "training": {key: value for key, value in recipe["training"].items() if key not in keys}}


def _first_difference(theirs: Any, ours: Any, key: str = "") -> str | None:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            dotted = f"{key}.{name}" if key else str(name)
            if name not in theirs:
                return f"{dotted} is {ours[name]!r} now, not set there"
            if name not in ours:
                return f"{dotted} is not set now, {theirs[name]!r} there"
            difference = _first_difference(theirs[name], ours[name], dotted)
            if difference is not None:
                return difference
        return None
    return None if theirs == ours else f"{key or 'recipe'} is {ours!r} now, {theirs!r} there"


def _is_finished(checkpoint: Path) -> bool:
    state = parse_json((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]


def _saved_tokenizer(run: Path) -> PreTrainedTokenizerBase | None:
    folder = run / "tokenizer"
    return None if not folder.is_dir() else load_tokenizer(str(folder), key=f"{folder}:")


def _corpus(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> Corpus:
    try:
        return prepare_corpus(recipe.data, tokenizer)
    except UserError as error:
        # What is said of a key names the recipe too; what is said of a text file names that.
        named = str(error).startswith("data.")
        raise UserError(f"{recipe.path}: {error}" if named else str(error)) from None


def _check_same_step(run: Path, args: TrainingArguments, sequences: int) -> None:
    known = read_facts(run).get("sequences_per_step")
    if known is not None and known != sequences:
        raise UserError(
            f"{run}: a step must have {known} sequences, as when the run began, got {sequences} on {args.world_size} "
            f"processes; change training.{' or training.'.join(PER_PROCESS)}"
        )


def _check_same_corpus(run: Path, corpus: Corpus) -> None:
    known = read_facts(run).get("corpus_fingerprint")
    if known is not None and known != corpus.fingerprint:
        raise UserError(
            f"{run}: the corpus is not the one that the run began with (data.source {corpus.data.source}): "
            "its text has changed; choose another --output"
        )
    if (run / EVALUATION_FILE).exists() and EvaluationSet.load(run).fingerprint != corpus.evaluation.fingerprint:
        raise UserError(f"{run / EVALUATION_FILE}: the held-out sequences have changed; choose another --output")


def _initial_model(recipe: Recipe, corpus: Corpus) -> PreTrainedModel:
    """The model with the weights that the seed gives; torch's global generator is left as it was."""
    tokenizer = corpus.tokenizer
    config = recipe.config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding_id(tokenizer),
    )
    largest = max(corpus.largest_id, padding_id(tokenizer))
    if config.vocab_size <= largest:
        raise UserError(
            f"{recipe.path}: model.vocab_size must be at least {largest + 1}, the corpus holds token {largest}, "
            f"got {config.vocab_size}"
        )
    places = getattr(config, "max_position_embeddings", None)
    if places is not None and places < recipe.data.sequence_length:
        raise UserError(
            f"{recipe.path}: data.sequence_length must be at most model.max_position_embeddings ({places}), "
            f"got {recipe.data.sequence_length}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return recipe.method.build_model(config, recipe.settings, recipe.seed)


def _write_start(run: Path, recipe: Recipe, corpus: Corpus, model: PreTrainedModel, sizes: dict[str, int]) -> None:
    """Writes what is fixed before the first step; what is there already stays."""
    run.mkdir(parents=True, exist_ok=True)
    # The recipe comes first: with it the folder is claimed, whatever is missing of the rest.
    if not (run / RECIPE_FILE).exists():
        write_text(run / RECIPE_FILE, sealed_text(dump_yaml(recipe.plain())))
    if not (run / EVALUATION_FILE).exists():
        corpus.evaluation.save(run)
    _whole_folder(run / "tokenizer", corpus.tokenizer)
    _whole_folder(run / "checkpoint-0", model)
    if not read_facts(run):
        write_facts(
            run,
            {
                "recipe": _digest(recipe),
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


def _whole_folder(folder: Path, content: PreTrainedModel | PreTrainedTokenizerBase) -> None:
    if folder.exists():
        return
    fresh = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(fresh, ignore_errors=True)
    content.save_pretrained(fresh)
    write_checksums(fresh)
    os.replace(fresh, folder)


def _shard_states(trainer: Trainer) -> None:
    """Under FSDP2 every process saves its own part of the optimizer's state, and draws the whole model itself."""
    plugin = trainer.accelerator.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of the type that was set before
    plugin.set_state_dict_type("SHARDED_STATE_DICT")
    plugin.cpu_ram_efficient_loading = False


def _trainer(
    recipe: Recipe,
    args: TrainingArguments,
    model: PreTrainedModel,
    corpus: Corpus,
    sequences_per_step: int,
    stopping: StopOnSignal,
) -> Trainer:
    method, settings = recipe.method, recipe.settings
    callbacks: list[TrainerCallback] = [
        FinalCheckpoint(),
        stopping,
        NumbersOnly(),
        WholeWeights(),
        Checksums(),
        InterimRemoved(),
        Progress(),
        *method.callbacks(settings, args),
    ]
    trainer = WholeTrainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=corpus.training_set(args.max_steps * sequences_per_step, recipe.seed),
        eval_dataset=HeldOutSequences(corpus.evaluation.first(recipe.data.evaluation_sequences_in_training)),
        processing_class=corpus.tokenizer,
        callbacks=callbacks,
        compute_metrics=token_loss,
        preprocess_logits_for_metrics=drop_logits,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled:
        _shard_states(trainer)
    elif args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise UserError(
            f"FSDP (training.fsdp, or accelerate's configuration) must be left out on {args.device.type}: accelerate "
            "shards on accelerators only, and would train on whole copies"
        )
    if method.build_optimizer is not None:
        # After Trainer has put the parameters on their device; under FSDP2 accelerate exchanges them for shards.
        trainer.optimizer = method.build_optimizer(model, settings, args)
    if method.build_scheduler is not None:
        # create_optimizer gives the optimizer above, or Trainer's own where the method has none.
        scheduler: Any = method.build_scheduler(trainer.create_optimizer(), settings, args, args.max_steps)
        trainer.lr_scheduler = scheduler
    return trainer
