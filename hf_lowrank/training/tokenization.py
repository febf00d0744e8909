"""A run's tokenizer (a byte-level BPE trained on the corpus, or an existing one), and documents as sequences."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_lowrank.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
DOCUMENTS_PER_BATCH = 64


def train_tokenizer(documents: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary_size` entries (fewer if the text has too few pairs)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
    )


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Hides huggingface-hub's log lines about retries; a final failure is raised anyway."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def load_tokenizer(name: str, key: str = "data.tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or a folder; a `UserError` naming `key` if it is not available."""
    try:
        with quiet_hub():
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{key} must be a tokenizer on the Hub or in a folder, got {name!r}: {lines[0]}") from None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex; equal for tokenizers that encode text to the same ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return hashlib.sha256(f"{type(tokenizer).__name__} {special} {content}".encode()).hexdigest()


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that pads sequences: the padding token's, else the end token's, else 0; always masked."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def encoded(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, cut: int | None) -> Iterator[list[int]]:
    """The ids of each non-empty document.

    With `cut`, at most that many, including the special tokens that the tokenizer adds (or the end token, if it adds
    none and there is space); without, all of them and the end token.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    adds_special = tokenizer.num_special_tokens_to_add() > 0
    options: dict = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    if cut is None:
        options |= {"add_special_tokens": False}
    else:
        options |= {"add_special_tokens": True, "truncation": True, "max_length": cut}
    texts = (text for text in documents if text)
    for batch in _batches(texts):
        for ids in tokenizer(batch, **options)["input_ids"]:
            if cut is None or not adds_special:
                ids = (ids + end)[:cut]  # noqa: PLW2901
            if ids:
                yield ids


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, DOCUMENTS_PER_BATCH)):
        yield batch


def packed_rows(documents: Iterable[list[int]], length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Documents concatenated and cut into rows of `length`; the remainder is dropped."""
    rest = np.empty(0, dtype=np.int64)
    for ids in documents:
        rest = np.concatenate([rest, np.asarray(ids, dtype=np.int64)])
        whole = len(rest) // length
        for row in rest[: whole * length].reshape(whole, length):
            yield row, length
        rest = rest[whole * length :]


def document_rows(documents: Iterable[list[int]], length: int, padding: int) -> Iterator[tuple[np.ndarray, int]]:
    """A row of `length` for each document of at least two tokens, padded with `padding`, and its number of tokens."""
    for ids in documents:
        if len(ids) >= 2:
            row = np.full(length, padding, dtype=np.int64)
            row[: len(ids)] = ids
            yield row, len(ids)
