"""Training sequences of a stream, in an order that no worker, prefetching or process changes, from any place in it.

Before it hands over the last sequence of a step, the process that reads notes where the next one starts. The
checkpoint after that step takes the place from the notes, however far ahead workers have read. A resumed run seeks it:
it reads on from the document there, by the state of `datasets`' own iteration. (A shuffle buffer has no such state:
then the documents before it are read again, but not tokenized.)
"""

import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase, TrainingArguments

from hf_lowrank.compat import hide_worker
from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs import layout
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json
from hf_lowrank.training.recipe import DataSettings, is_packed
from hf_lowrank.training.sequences import DOCUMENTS_PER_BATCH, encoded_batch, padding_id, sequence
from hf_lowrank.training.sources import hub_stream

PLACE = layout.STREAM_PLACE


@dataclass(frozen=True)
class Place:
    """Where a sequence of a stream starts.

    Attributes:
        sequences: the sequences before it.
        number: the passes over the stream before it.
        documents: the documents of this pass before the one that it starts in.
        tokens: the tokens of that document before it.
        state: of `datasets`' iteration before that document; None at the start of a pass, and where it has none.
    """

    sequences: int = 0
    number: int = 0
    documents: int = 0
    tokens: int = 0
    state: dict[str, Any] | None = None

    def save(self, checkpoint: Path) -> None:
        write_text(checkpoint / PLACE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, checkpoint: Path) -> Self | None:
        """The place that a checkpoint holds; None for one that holds none.

        Raises:
            UserError: the file is damaged.
        """
        file = checkpoint / PLACE
        if not file.is_file():
            return None
        try:
            return cls(**parse_json(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file}: damaged ({one_line(error)}); remove {checkpoint}") from None


class Notes:
    """Places between steps, a file each, which the processes that read a stream write and the one that saves reads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def writer(self) -> Callable[[Place], None]:
        """Notes a place, from this process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._folder / f"{os.getpid()}.part"

        def note(place: Place) -> None:
            unfinished.write_text(json.dumps(asdict(place)), encoding="utf-8")
            os.replace(unfinished, self._file(place.sequences))

        return note

    def place_of(self, sequences: int) -> Place | None:
        """The place after so many sequences; None where none is noted."""
        try:
            return Place(**json.loads(self._file(sequences).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def forget(self, sequences: int) -> None:
        """Removes the place after so many sequences, if it is noted."""
        self._file(sequences).unlink(missing_ok=True)

    def _file(self, sequences: int) -> Path:
        return self._folder / f"{sequences}.json"


class StreamPlaces:
    """The places of a run's stream: where it starts, and where it is after each step.

    Args:
        resumed: the place that the checkpoint holds from which the run resumes.
    """

    def __init__(
        self, notes: Notes, args: TrainingArguments, sequences_per_step: int, resumed: Place | None = None
    ) -> None:
        self._notes, self._sequences_per_step, self._resumed = notes, sequences_per_step, resumed
        config: Any = args.accelerator_config
        # By default the first process reads for all.
        readers = args.world_size if config.dispatch_batches is False else 1
        self._batch = args.train_batch_size * readers

    def options(self) -> dict[str, Any]:
        """Of `StreamedSequences`."""
        batches = {"batch": self._batch, "noted": self._sequences_per_step}
        return {**batches, "start": self._resumed, "notes": self._notes}

    def forget(self, step: int) -> None:
        """Drops the place after a step, once no checkpoint will be written there."""
        self._notes.forget(step * self._sequences_per_step)

    def save(self, step: int, checkpoint: Path) -> None:
        """Writes the place after a step into its checkpoint."""
        place = self._notes.place_of(step * self._sequences_per_step)
        if place is not None:
            place.save(checkpoint)


class StreamedSequences(IterableDataset):
    """Training sequences from a stream, pass after pass, without end, always starting at the first.

    Trainer skips what a resumed run has seen, for which empty sequences stand up to `start`. To it this is one epoch.

    Args:
        batch: sequences that a worker reads before the next one is asked, as many as the loader asks for.
        start: the place of the first sequence that counts.
        end: of `sequence`.
        notes: where to note the places after every `noted` sequences.
    """

    def __init__(
        self,
        data: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        skip: int,
        batch: int = 1,
        noted: int = 1,
        start: Place | None = None,
        notes: Notes | None = None,
        end: int | None = None,
    ) -> None:
        self._data, self._tokenizer, self._seed, self._skip, self._end = data, tokenizer, seed, skip, end
        self._batch, self._noted, self._start, self._notes = batch, noted, start or Place(), notes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        note = self._notes.writer() if self._notes is not None else None
        empty = sequence(np.full(self._data.sequence_length, padding_id(self._tokenizer)), 0, self._end)
        for number in range(self._start.sequences):
            if number // self._batch % count == index:
                yield empty
        with hide_worker():  # datasets would give each worker other files
            for row, tokens, after in self.rows():
                number = after.sequences - 1
                if number // self._batch % count == index:
                    if note is not None and after.sequences % self._noted == 0:
                        note(after)
                    yield sequence(row, tokens, self._end)

    def rows(self) -> Iterator[tuple[np.ndarray, int, Place]]:
        """Each sequence from the start, its tokens, and where the next one starts."""
        sequences, start = self._start.sequences, self._start
        for number in itertools.count(self._start.number):
            found = False
            for row, tokens, (documents, used, state) in self._pass(number, start):
                found = True
                sequences += 1
                yield row, tokens, Place(sequences, number, documents, used, state)
            if not found and start == Place(number=number):
                raise UserError(
                    f"data.dataset {self._data.dataset!r} split {self._data.split!r} contains no text any more"
                )
            start = Place(number=number + 1)

    def _pass(self, number: int, start: Place) -> Iterator[tuple[Any, int, tuple[int, int, Any]]]:
        data = self._data
        length, packed = data.sequence_length, is_packed(data)
        stream = hub_stream(data, data.split, seed=self._seed + number, skip=self._skip)
        documents = stream.read(start.documents, start.state)
        # Of each document in the buffer: its number, the tokens used, all its tokens, the state before it.
        pieces: deque[Any] = deque()
        rest = np.empty(0, dtype=np.int64)
        drop = start.tokens
        while batch := list(itertools.islice(documents, DOCUMENTS_PER_BATCH)):
            texts = [document.text for document in batch if document.text]
            coded = iter(encoded_batch(texts, self._tokenizer, cut=None if packed else length))
            for document in batch:
                ids = next(coded) if document.text else []
                if not packed:
                    if len(ids) >= 2:
                        row = np.full(length, padding_id(self._tokenizer), dtype=np.int64)
                        row[: len(ids)] = ids
                        yield row, len(ids), (document.number + 1, 0, document.after)
                    continue
                if len(ids) > drop:
                    pieces.append([document.number, drop, len(ids), document.before])
                    rest = np.concatenate([rest, np.asarray(ids[drop:], dtype=np.int64)])
                drop = 0
                while len(rest) >= length:
                    row, rest = rest[:length], rest[length:]
                    left = length
                    while left and pieces[0][2] - pieces[0][1] <= left:
                        left -= pieces[0][2] - pieces[0][1]
                        pieces.popleft()
                    if left:
                        pieces[0][1] += left
                    if pieces:
                        yield row, length, (pieces[0][0], pieces[0][1], pieces[0][3])
                    else:
                        yield row, length, (document.number + 1, 0, document.after)
