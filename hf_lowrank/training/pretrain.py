"""From a recipe to a run directory: start, resume, or find finished; and the Trainer that does it."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging as transformers_logging

from hf_lowrank.errors import StoppedError, UserError, one_line
from hf_lowrank.formats import is_first_process
from hf_lowrank.optim.groups import refuse_engines
from hf_lowrank.runs.checkpoints import is_sharded, last_resumable_checkpoint
from hf_lowrank.runs.layout import CONFIG, TOKENIZER, checkpoint_folder, step_of
from hf_lowrank.runs.run_files import read_facts
from hf_lowrank.runs.weights import positions_of, read_config
from hf_lowrank.storage.files import refusal_of
from hf_lowrank.storage.locks import locked
from hf_lowrank.training.callbacks import FactsRecorder, KeepPadding, Progress, StopOnNonFinite
from hf_lowrank.training.checkpointing import Checkpointing, is_interim, remove_interim
from hf_lowrank.training.corpus import Corpus, prepare_corpus
from hf_lowrank.training.kernels import ATTENTION, apply_liger, check_kernels, has_fused_loss
from hf_lowrank.training.recipe import Recipe
from hf_lowrank.training.sequences import HeldOutSequences, collate, load_tokenizer, padding_id
from hf_lowrank.training.start import (
    check_belongs,
    check_same_corpus,
    check_same_step,
    has_start,
    is_last,
    is_started,
    write_start,
)
from hf_lowrank.training.stream import Notes, Place, StreamPlaces
from hf_lowrank.training.trainer import RunTrainer
from hf_lowrank.training.trial import OwnLoss, check_documents_apart, try_model

logger = logging.getLogger(__name__)

# How gloo and NCCL report that a process is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "remote process exit")


def build_trainer(
    recipe: Recipe,
    args: TrainingArguments,
    model: PreTrainedModel,
    corpus: Corpus,
    callbacks: Sequence[TrainerCallback],
    own_loss: OwnLoss,
    training_set: Dataset,
) -> RunTrainer:
    """The Trainer of a run, with the method's optimizer and schedule; `own_loss` is what `try_model` found.

    Raises:
        UserError: FSDP is asked for where accelerate cannot shard, or Liger's kernels do not fit the model.
    """
    method, settings = recipe.method, recipe.settings
    if own_loss == "other" and has_fused_loss(args):
        raise UserError(
            f"{recipe.path}: training.use_liger_kernel must be left out with model.architecture "
            f"{recipe.model['architecture']}, whose own loss is not that of the next token"
        )
    apply_liger(model, args, str(recipe.path))
    trainer = RunTrainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=training_set,
        eval_dataset=HeldOutSequences(corpus.evaluation.first(recipe.data.evaluation_sequences_in_training)),
        processing_class=corpus.tokenizer,
        callbacks=list(callbacks),
        own_loss=own_loss,
    )
    trainer.remove_callback(PrinterCallback)
    # Trackers come last, and see what the other callbacks add to a log.
    for kind in get_reporting_integration_callbacks(args.report_to):
        tracker: Any = trainer.pop_callback(kind)
        trainer.add_callback(tracker)
    if trainer.is_fsdp_enabled:
        _shard_states(trainer)
    elif args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise UserError(
            f"FSDP (training.fsdp, or accelerate's configuration) must be left out on {args.device.type}: accelerate "
            "shards on accelerators only, and would train unsharded replicas"
        )
    # After Trainer has moved the parameters to their device; under FSDP2 accelerate exchanges them for shards.
    optimizer = method.optimizer(model, settings, args)
    if optimizer is not None:
        trainer.optimizer = optimizer
    if method.build_scheduler is not None:
        # create_optimizer returns the optimizer above, or Trainer's own if the method has none.
        scheduler: Any = method.build_scheduler(trainer.create_optimizer(), settings, args, args.max_steps)
        trainer.lr_scheduler = scheduler
    return trainer


def _shard_states(trainer: Trainer) -> None:
    """Under FSDP2 every process saves its own shard of the optimizer state, and initialises the full model itself."""
    plugin = trainer.accelerator.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # left over from the type set before
    plugin.set_state_dict_type("SHARDED_STATE_DICT")
    plugin.cpu_ram_efficient_loading = False


class Recorder(Protocol):
    """A Trainer callback that adds entries to a run's facts; `close` releases what a failed training left open."""

    def close(self) -> None: ...


RecorderFactory = Callable[[Recipe, TrainingArguments, nn.Module, dict[str, Any]], Recorder]


def pretrain(
    recipe: Recipe, output: str | os.PathLike[str] | None = None, *, recorder: RecorderFactory | None = None
) -> Path:
    """Trains by `recipe` into the run directory `output`, and returns it.

    An interrupted run resumes from its last complete checkpoint, with the same bits as an uninterrupted one; a
    finished run is left as it is. The initial weights and the data order depend on the recipe's seed alone, whatever
    the method.

    Args:
        recipe: what to train.
        output: the run directory; default: `runs/<name>-seed<seed>`.
        recorder: `(recipe, args, model, facts) -> callback`, adds entries to `facts.json`; e.g.
            `hf_lowrank.memory.memory_recorder`.

    Raises:
        UserError: the corpus or the model is not available, or `output` belongs to another recipe or is in use by
            another process (nothing is written then); or it became unwritable, another process of the launch was
            lost, or training diverged.
        StoppedError: the run received SIGTERM and saved; the next call resumes it.
    """
    run = Path(output) if output is not None else Path("runs") / f"{recipe.name}-seed{recipe.seed}"
    transformers_logging.disable_progress_bar()
    with ExitStack() as resources:
        try:
            return _pretrain(recipe, run, recorder, resources)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = refusal_of(error) or _lost_process(error)
            if reason is None:
                raise
            raise UserError(f"{run}: {reason}; rerun to resume from the last complete checkpoint") from error


def _lost_process(error: BaseException) -> str | None:
    """One line if `error` says that another process of this launch has ended, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not isinstance(error, RuntimeError):
        return None
    lost = type(error).__name__ in ("DistNetworkError", "DistStoreError") or any(words in str(error) for words in LOST)
    return "another process of this launch has ended or cannot be reached" if lost else None


def _pretrain(recipe: Recipe, run: Path, recorder: RecorderFactory | None, resources: ExitStack) -> Path:
    started = check_belongs(run, recipe)
    if started:
        resources.enter_context(locked(run, "train"))
    checkpoint = last_resumable_checkpoint(run) if started else None
    if checkpoint is not None and is_first_process():
        remove_interim(run, before=step_of(checkpoint))
    finished = checkpoint is not None and is_last(checkpoint)
    start_written = started and has_start(run)
    if checkpoint is not None and finished and start_written:
        logger.info("%s is finished at step %d: nothing to do", run, step_of(checkpoint))
        return run

    args = recipe.arguments(run)
    check_kernels(recipe.model.get(ATTENTION), recipe.data.shape, args, lambda key: str(recipe.path), here=True)
    refuse_engines(args)
    with args.main_process_first(desc="corpus"):  # the first process fills the cache, the others read it
        corpus = _corpus(recipe, run)
    check_same_corpus(run, corpus)
    sequences_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    check_same_step(run, args, sequences_per_step)
    workers = "one process" if args.world_size == 1 else f"{args.world_size} processes"
    logger.info("training: %d sequences per step, %s on %s", sequences_per_step, workers, args.device.type)
    if args.max_steps <= 0 and corpus.train is not None:
        args.max_steps = math.ceil(args.num_train_epochs * len(corpus.train) / sequences_per_step)
    model = _initial_model(recipe, corpus, run)
    own_loss = try_model(model, corpus.evaluation, str(recipe.path))
    if recipe.data.shape == "packed_documents":
        check_documents_apart(model, corpus.evaluation, str(recipe.path))

    if not started:
        resources.enter_context(locked(run, "train"))
        if args.should_save and is_started(run):
            raise UserError(f"{run}: another process has started this run in the meantime; rerun to resume it")
    if args.should_save:
        sizes = {"processes": args.world_size, "sequences_per_step": sequences_per_step}
        write_start(run, recipe, corpus, model, sizes)
    if finished:
        logger.info("%s is finished: wrote the missing start files only", run)
        return run
    facts = read_facts(run)
    costs = FactsRecorder(
        run,
        facts,
        tokens_per_step=sequences_per_step * recipe.data.sequence_length,
        resumed_step=step_of(checkpoint) if checkpoint else 0,
        keep_resumed=checkpoint is not None and not is_interim(checkpoint),
    )
    epoch = None if corpus.train is None else Fraction(len(corpus.train), sequences_per_step)
    stream = None
    if corpus.train is None:
        notes = Path(resources.enter_context(TemporaryDirectory(prefix="hf-lowrank-")))
        stream = StreamPlaces(Notes(notes), args, sequences_per_step, Place.load(checkpoint) if checkpoint else None)
    checkpointing = Checkpointing(checkpoint, costs.write, epoch, stream)
    resources.callback(checkpointing.release)
    # The costs come last: the seconds of a step include what its other callbacks do.
    callbacks: list[Any] = [checkpointing, KeepPadding(model), StopOnNonFinite(), Progress()]
    callbacks += recipe.method.callbacks(recipe.settings, args)
    if recorder is not None:
        callbacks.append(recorder(recipe, args, model, facts))
        resources.callback(callbacks[-1].close)
    callbacks.append(costs)
    total = args.max_steps * sequences_per_step
    training_set = corpus.training_set(total, recipe.seed, **({} if stream is None else stream.options()))
    trainer = build_trainer(recipe, args, model, corpus, callbacks, own_loss, training_set)
    checkpointing.trainer = trainer
    if checkpoint is not None:
        if is_sharded(checkpoint) != trainer.is_fsdp_enabled:
            written, needed = ("under", "with") if is_sharded(checkpoint) else ("without", "without")
            raise UserError(f"{checkpoint} was written {written} FSDP2; resume the run {needed} FSDP2, as it started")
        logger.info("%s resumes from step %d", run, step_of(checkpoint))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if checkpointing.stopped is not None:
        raise StoppedError(
            f"{run}: stopped by SIGTERM after step {checkpointing.stopped}, which is saved; rerun to resume"
        )
    return run


def _corpus(recipe: Recipe, run: Path) -> Corpus:
    """The recipe's corpus, by the tokenizer that the run was started with if it has one."""
    folder = run / TOKENIZER
    tokenizer = load_tokenizer(str(folder), key=f"{folder}:") if folder.is_dir() else None
    try:
        return prepare_corpus(recipe.data, tokenizer)
    except UserError as error:
        # An error about a key names the recipe, one about a text file names that.
        about_key = str(error).startswith("data.")
        raise UserError(f"{recipe.path}: {error}" if about_key else str(error)) from None


def _initial_model(recipe: Recipe, corpus: Corpus, run: Path) -> PreTrainedModel:
    """The model with the initial weights of the recipe's seed; torch's global generator is left unchanged."""
    tokenizer = corpus.tokenizer
    try:
        config = recipe.config(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=_models_padding(corpus, run),
        )
    except Exception as error:  # transformers raises any type of error for inconsistent values
        raise UserError(f"{recipe.path}: model: {one_line(error)}") from None
    largest = max(corpus.largest_id, padding_id(tokenizer))
    vocabulary = config.get_text_config().vocab_size
    if vocabulary <= largest:
        raise UserError(
            f"{recipe.path}: model.vocab_size must be at least {largest + 1}, the corpus contains token {largest}, "
            f"got {vocabulary}"
        )
    positions = positions_of(config)
    if positions is not None and positions < recipe.data.sequence_length:
        raise UserError(
            f"{recipe.path}: data.sequence_length must be at most model.max_position_embeddings ({positions}), "
            f"got {recipe.data.sequence_length}"
        )
    given = recipe.model.get("pad_token_id", (recipe.model.get("text_config") or {}).get("pad_token_id"))
    if given is not None and corpus.contains(given):
        raise UserError(
            f"{recipe.path}: model.pad_token_id must be a token that the text does not contain, as its embedding "
            f"would stay zero, got {given} ({tokenizer.convert_ids_to_tokens(given)!r}); leave it out"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return recipe.method.build_model(config, recipe.settings, recipe.seed)


def _models_padding(corpus: Corpus, run: Path) -> int | None:
    """The padding token that the model knows, whose embedding many architectures keep at zero; None for none.

    Batches need none of the model: their padding is masked. A token of the text, such as an end-of-text token that
    also pads, must train. A run that has begun keeps the one that it began with.
    """
    first = checkpoint_folder(run, 0) / CONFIG
    if first.is_file():
        config = read_config(first.parent)
        return getattr(config, "base_config", config).get_text_config().pad_token_id
    padding = corpus.tokenizer.pad_token_id
    return None if padding is None or corpus.contains(padding) else padding
