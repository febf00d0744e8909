"""Token sequences on disk (numpy, memory-mapped, no pickle), in the order of a seed, and as batches."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_lowrank.runs.evaluation_set import EvaluationSet

IGNORED = -100
ROWS_AT_ONCE = 1024


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
    """

    def __init__(self, store: SequenceStore, total: int, seed: int) -> None:
        self._store = store
        self._total = total
        self._order = lru_cache(maxsize=2)(lambda epoch: _order(len(store), seed, epoch))

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, position = divmod(index, len(self._store))
        row = self._order(epoch)[position]
        return {"ids": self._store.ids[row], "length": int(self._store.lengths[row])}


def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


class HeldOutSequences(Dataset):
    """An evaluation set as a dataset for Trainer."""

    def __init__(self, evaluation: EvaluationSet) -> None:
        self._ids = evaluation.input_ids.numpy()
        self._lengths = evaluation.attention_mask.sum(1).tolist()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"ids": self._ids[index], "length": self._lengths[index]}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch for a causal language model: ids, labels with -100 on padding, and a mask if there is padding."""
    ids = torch.from_numpy(np.stack([row["ids"] for row in rows]).astype(np.int64))
    lengths = torch.tensor([row["length"] for row in rows])
    mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
    labels = ids.masked_fill(~mask, IGNORED)
    # Nothing predicts the first token; so labelled, every version of Trainer counts predicted tokens correctly.
    labels[:, 0] = IGNORED
    batch = {"input_ids": ids, "labels": labels}
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
