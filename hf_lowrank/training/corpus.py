"""From the recipe's `data:` block to training and held-out sequences."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hf_lowrank.errors import UserError
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.storage.cache import cached_folder
from hf_lowrank.training.recipe import DataSettings, is_packed
from hf_lowrank.training.sequences import (
    SequenceStore,
    ShuffledSequences,
    batched_rows,
    document_rows,
    encoded,
    load_tokenizer,
    packed_rows,
    padding_id,
    tokenizer_fingerprint,
    train_tokenizer,
    unigram_loss,
)
from hf_lowrank.training.sources import Documents, hub_documents, hub_stream, local_files, progress, python_library
from hf_lowrank.training.stream import StreamedSequences

logger = logging.getLogger(__name__)

# Training sequences of a stream that the unigram model is fitted to: enough for three digits of its loss.
STREAM_SAMPLE = 4096


@dataclass(frozen=True)
class Corpus:
    """What a run is trained and evaluated on.

    Attributes:
        evaluation: the fixed held-out sequences; they depend on the data block alone, not on the seed.
        fingerprint: of the text, the tokenizer and the shape, hex.
        unigram_loss: of the add-one smoothed unigram model of the training tokens on `evaluation`, nats per token.
        counts: (V,) how often each token occurs in the training sequences; of a stream, at its beginning.
        train: the training sequences; None for a stream.
        stream_skip: documents at the head of a stream that are held out.
    """

    data: DataSettings
    tokenizer: PreTrainedTokenizerBase
    evaluation: EvaluationSet
    fingerprint: str
    train: SequenceStore | None
    stream_skip: int = 0
    _: KW_ONLY
    unigram_loss: float
    counts: np.ndarray = field(repr=False, compare=False)

    @property
    def largest_id(self) -> int:
        """The largest token id that is known to occur; the model's vocabulary must be larger."""
        return int(max(np.flatnonzero(self.counts)[-1], self.evaluation.input_ids.max()))

    def contains(self, token: int) -> bool:
        """Whether the text is known to contain a token."""
        mask = self.evaluation.attention_mask.bool()
        known = token < len(self.counts) and self.counts[token] > 0
        return bool(known or (self.evaluation.input_ids[mask] == token).any())

    def training_set(self, total: int, seed: int, **stream: Any) -> Dataset:
        """`total` training sequences, in the order of `seed`; `stream` are further options of `StreamedSequences`."""
        end = self.tokenizer.eos_token_id if self.data.shape == "packed_documents" else None
        if self.train is not None:
            return ShuffledSequences(self.train, total, seed, end)
        return StreamedSequences(self.data, self.tokenizer, seed=seed, skip=self.stream_skip, end=end, **stream)


def prepare_corpus(data: DataSettings, tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
    """Reads, splits and tokenizes the corpus, or takes the result from the cache.

    `tokenizer` is that of a run that resumes; default: the recipe's, else one is trained.

    Raises:
        UserError: the text cannot be read, is empty, or is too short; the message names file or key.
    """
    if tokenizer is None and data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer is not None and tokenizer.eos_token_id is None and data.shape == "packed_documents":
        raise UserError(
            "data.shape packed_documents must have a tokenizer with an end-of-text token, which ends each document; "
            f"{data.tokenizer} has none"
        )
    if data.streaming:
        if tokenizer is None:
            raise UserError("data.tokenizer must be given with data.streaming")
        return _streamed(data, tokenizer)
    documents = _documents(data)
    if tokenizer is None:
        tokenizer = _trained_tokenizer(documents, data)
    chosen, versions = tokenizer, f"{tokenizers.__version__} {transformers.__version__}"
    shape = f"{data.shape} {data.sequence_length}"
    key = f"{documents.fingerprint} {tokenizer_fingerprint(tokenizer)} {shape} {versions}"

    def make(folder: Path) -> None:
        vocabulary = len(chosen)
        for name, texts in (("held_out", documents.held_out()), ("train", documents.train())):
            titled = progress(texts, f"tokenizing ({name.replace('_', ' ')})")
            rows = _rows(titled, data, chosen, packed=is_packed(data, held_out=name == "held_out"))
            SequenceStore.write(folder, name, rows, data.sequence_length, vocabulary)

    folder = cached_folder("sequences", key, make)
    train, held_out = SequenceStore.open(folder, "train"), SequenceStore.open(folder, "held_out")
    if not len(train):
        raise UserError(
            f"{documents.title}: the training split is empty: it is shorter than one sequence of data.sequence_length "
            f"{data.sequence_length}"
        )
    if len(held_out) < data.evaluation_sequences:
        raise UserError(
            f"data.evaluation_sequences must be at most {len(held_out)}, the held-out sequences of {documents.title}, "
            f"got {data.evaluation_sequences}; hold out more or shorten data.sequence_length"
        )
    logger.info("corpus: %d training sequences of %d tokens", len(train), data.sequence_length)
    evaluation = held_out.spread(data.evaluation_sequences)
    statistics = _statistics(train, len(tokenizer), evaluation)
    return Corpus(data, tokenizer, evaluation, hashlib.sha256(key.encode()).hexdigest(), train, **statistics)


def _statistics(sample: SequenceStore, vocabulary: int, evaluation: EvaluationSet) -> dict[str, Any]:
    """What a corpus derives from the token frequencies of `sample`."""
    counts = sample.counts(vocabulary)
    return {"unigram_loss": unigram_loss(counts, evaluation), "counts": counts}


def corpus_tokenizer(data: DataSettings) -> PreTrainedTokenizerBase:
    """The tokenizer for training on `data`; trained if the recipe names none and the cache has none.

    Raises:
        UserError: it is not available; the message names file or key.
    """
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    return _trained_tokenizer(_documents(data), data)


def _documents(data: DataSettings) -> Documents:
    if data.source == "python-library":
        return python_library(data.held_out_share)
    if data.source == "files":
        return local_files(data.train_files or [], data.held_out_files, data.held_out_share, data.text_column)
    return hub_documents(data)


def _trained_tokenizer(documents: Documents, data: DataSettings) -> PreTrainedTokenizerBase:
    def make(folder: Path) -> None:
        texts = progress(documents.train(), "training the tokenizer")
        train_tokenizer(texts, data.vocabulary_size).save_pretrained(folder)

    key = f"{documents.fingerprint} {data.vocabulary_size} {tokenizers.__version__} {transformers.__version__}"
    return load_tokenizer(str(cached_folder("tokenizer", key, make)))


def _rows(
    texts: Iterable[str], data: DataSettings, tokenizer: PreTrainedTokenizerBase, *, packed: bool
) -> Iterator[tuple[np.ndarray, int]]:
    if packed:
        return packed_rows(encoded(texts, tokenizer, cut=None), data.sequence_length)
    documents = encoded(texts, tokenizer, cut=data.sequence_length)
    return document_rows(documents, data.sequence_length, padding_id(tokenizer))


def _streamed(data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    read = 0

    def counted(texts: Iterable[str]) -> Iterator[str]:
        nonlocal read
        for text in texts:
            read += 1
            yield text

    held_out_split = data.held_out_split or data.split
    held_out = batched_rows(
        _rows(counted(hub_stream(data, held_out_split)), data, tokenizer, packed=is_packed(data, held_out=True)),
        data.evaluation_sequences,
    )
    if len(held_out) < data.evaluation_sequences:
        raise UserError(
            f"data.evaluation_sequences must be at most {len(held_out)}, the sequences of split {held_out_split!r} of "
            f"data.dataset {data.dataset!r}, got {data.evaluation_sequences}"
        )
    # The documents at the head of the stream, which are held out, are not trained on.
    skip = read if data.held_out_split is None else 0
    evaluation = held_out.spread(data.evaluation_sequences)
    sample = batched_rows(
        _rows(hub_stream(data, data.split, skip=skip), data, tokenizer, packed=is_packed(data)), STREAM_SAMPLE
    )
    if not len(sample):
        raise UserError(f"data.dataset {data.dataset!r} split {data.split!r} contains no training text")
    key = f"{data.model_dump_json()} {tokenizer_fingerprint(tokenizer)} {evaluation.fingerprint}"
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    return Corpus(
        data, tokenizer, evaluation, fingerprint, None, skip, **_statistics(sample, len(tokenizer), evaluation)
    )
