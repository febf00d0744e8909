"""A run's tokenizer, and documents as token sequences: on disk (numpy, no pickle), in a seed's order, as batches."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_lowrank.errors import UserError, first_line
from hf_lowrank.runs.evaluation_set import EvaluationSet

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
DOCUMENTS_PER_BATCH = 64
IGNORED = -100
ROWS_AT_ONCE = 1024
LONGEST_RUN = 20_000


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
    tokenizer.train_from_iterator((piece for text in documents for piece in _without_long_runs(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
    )


def _without_long_runs(text: str) -> list[str]:
    """A text in pieces without unbroken runs of more than `LONGEST_RUN`, in whose square BPE's training time grows."""
    if not re.search(rf"\S{{{LONGEST_RUN + 1}}}|\s{{{LONGEST_RUN + 1}}}", text):
        return [text]
    return [piece for piece in re.split(rf"(\S{{{LONGEST_RUN}}}|\s{{{LONGEST_RUN}}})", text) if piece]


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
        reason = first_line(error)
        raise UserError(f"{key} must be a tokenizer on the Hub or in a folder, got {name!r}: {reason}") from None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex; equal for tokenizers that encode text to the same ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return hashlib.sha256(f"{type(tokenizer).__name__} {special} {content}".encode()).hexdigest()


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that pads sequences: the padding token's, else the end token's, else 0; always masked."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def encoded_batch(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, cut: int | None) -> list[list[int]]:
    """The ids of each text.

    With `cut`, at most that many, including the special tokens that the tokenizer adds (or the end token, if it adds
    none and there is space); without, all of them and the end token.
    """
    if not texts:
        return []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    options: dict = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    if cut is None:
        options |= {"add_special_tokens": False}
    else:
        options |= {"add_special_tokens": True, "truncation": True, "max_length": cut}
    ends = cut is None or not tokenizer.num_special_tokens_to_add()
    return [(ids + end)[:cut] if ends else ids for ids in tokenizer(texts, **options)["input_ids"]]


def encoded(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, cut: int | None) -> Iterator[list[int]]:
    """The ids of each non-empty document, as `encoded_batch` gives them."""
    texts = (text for text in documents if text)
    while batch := list(itertools.islice(texts, DOCUMENTS_PER_BATCH)):
        yield from (ids for ids in encoded_batch(batch, tokenizer, cut=cut) if ids)


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


def document_positions(ids: np.ndarray, end: int) -> np.ndarray:
    """(T,) the position of each token in its document, of which each token `end` in `ids` is the last."""
    index = np.arange(len(ids))
    begins = np.append(True, ids[:-1] == end)
    return index - np.maximum.accumulate(np.where(begins, index, 0))


def sequence(ids: np.ndarray, length: int, end: int | None) -> dict[str, Any]:
    """A sequence as datasets give it to `collate`.

    Args:
        ids: (T,), of which `length` are tokens and the rest is padding.
        end: the last token of each document in it, if documents are to be kept apart.
    """
    apart = {} if end is None else {"positions": document_positions(ids, end)}
    return {"ids": ids, "length": length, **apart}


@dataclass(frozen=True)
class SequenceStore:
    """Sequences of equal length.

    Attributes:
        ids: (N, T) token ids, unsigned, padded at the end of each row.
        lengths: (N,) tokens per row.
    """

    ids: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def write(
        cls, folder: Path, name: str, rows: Iterable[tuple[np.ndarray, int]], length: int, vocabulary: int
    ) -> None:
        """Writes rows of `length` ids below `vocabulary` as they arrive, without knowing their number in advance."""
        dtype = np.dtype("<u2") if vocabulary <= 2**16 else np.dtype("<u4")
        lengths: list[int] = []
        with open(folder / f"{name}.npy", "wb") as file:
            # numpy reserves space in the header for the first axis to grow.
            _write_header(file, (0, length), dtype)
            body = file.tell()
            pending: list[np.ndarray] = []
            for row, tokens in rows:
                pending.append(row.astype(dtype))
                lengths.append(tokens)
                if len(pending) == ROWS_AT_ONCE:
                    file.write(np.stack(pending).tobytes())
                    pending.clear()
            if pending:
                file.write(np.stack(pending).tobytes())
            file.seek(0)
            _write_header(file, (len(lengths), length), dtype)
            if file.tell() != body:
                raise RuntimeError("the length of numpy's header has changed")
        np.save(folder / f"{name}_lengths.npy", np.asarray(lengths, dtype="<u4"), allow_pickle=False)

    @classmethod
    def open(cls, folder: Path, name: str) -> Self:
        """Opens what `write` wrote, memory-mapped."""
        lengths = np.load(folder / f"{name}_lengths.npy", allow_pickle=False)
        # An empty file cannot be mapped.
        mode: Literal["r"] | None = "r" if len(lengths) else None
        return cls(np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False), lengths)

    def spread(self, count: int) -> EvaluationSet:
        """`count` evenly spaced sequences, as an evaluation set."""
        chosen = (np.arange(count) * len(self)) // count
        ids = torch.from_numpy(self.ids[chosen].astype(np.int64))
        positions = torch.arange(ids.shape[1])
        mask = (positions[None, :] < torch.from_numpy(self.lengths[chosen].astype(np.int64))[:, None]).long()
        return EvaluationSet(ids, mask)

    def counts(self, vocabulary: int) -> np.ndarray:
        """(vocabulary,) how often each id occurs, without padding."""
        total = np.zeros(vocabulary, dtype=np.int64)
        positions = np.arange(self.ids.shape[1])
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = self.ids[start : start + ROWS_AT_ONCE]
            inside = positions[None, :] < self.lengths[start : start + ROWS_AT_ONCE, None]
            total += np.bincount(rows[inside], minlength=vocabulary)
        return total


def _write_header(file: Any, shape: tuple[int, int], dtype: np.dtype) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


class ShuffledSequences(Dataset):
    """All sequences of a training, epoch after epoch, each in an order that depends on the seed alone.

    It needs no random state of a sampler: the i-th sequence is the same whatever the method, and after any number of
    interruptions.

    Args:
        end: of `sequence`.
    """

    def __init__(self, store: SequenceStore, total: int, seed: int, end: int | None = None) -> None:
        self._store, self._total, self._end = store, total, end
        generator = np.random.Generator
        self._order = lru_cache(maxsize=2)(
            lambda epoch: generator(np.random.PCG64([seed, epoch])).permutation(len(store))
        )

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, position = divmod(index, len(self._store))
        row = self._order(epoch)[position]
        return sequence(self._store.ids[row], int(self._store.lengths[row]), self._end)


class HeldOutSequences(Dataset):
    """An evaluation set as a dataset for Trainer."""

    def __init__(self, evaluation: EvaluationSet) -> None:
        self._ids, self._lengths = evaluation.input_ids.numpy(), evaluation.attention_mask.sum(1).tolist()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"ids": self._ids[index], "length": self._lengths[index]}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch for a causal language model: ids, labels with -100 on padding, and a mask if there is padding.

    Sequences of documents that are kept apart have positions that restart at each. Without a mask, transformers finds
    the documents in them, as in those of its `DataCollatorWithFlattening`.
    """
    ids = torch.from_numpy(np.stack([row["ids"] for row in rows]).astype(np.int64))
    lengths = torch.tensor([row["length"] for row in rows])
    mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
    labels = ids.masked_fill(~mask, IGNORED)
    # Nothing predicts the first token; so labelled, every version of Trainer counts predicted tokens correctly.
    labels[:, 0] = IGNORED
    batch = {"input_ids": ids, "labels": labels}
    if "positions" in rows[0]:
        batch["position_ids"] = torch.from_numpy(np.stack([row["positions"] for row in rows]))
        labels[batch["position_ids"] == 0] = IGNORED
    # Without a mask, attention takes its causal fast path.
    if not bool(mask.all()):
        batch["attention_mask"] = mask.long()
    return batch


def unigram_loss(counts: np.ndarray, evaluation: EvaluationSet) -> float:
    """Nats per predicted token of the add-one smoothed unigram model with these `counts`, on `evaluation`."""
    log_probabilities = np.log((counts + 1.0) / (counts.sum() + len(counts)))
    predicted = evaluation.input_ids[:, 1:][evaluation.attention_mask[:, 1:].bool()].numpy()
    return float(-log_probabilities[predicted].mean())


def batched_rows(rows: Iterator[tuple[np.ndarray, int]], count: int) -> SequenceStore:
    """The first `count` rows, in memory."""
    taken = [row for _, row in zip(range(count), rows, strict=False)]
    ids = np.stack([row for row, _ in taken]) if taken else np.empty((0, 0), dtype=np.int64)
    return SequenceStore(ids, np.asarray([tokens for _, tokens in taken], dtype=np.int64))
