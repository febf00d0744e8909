"""Sources of text, each with training and held-out documents: the standard library, local files, Hub datasets."""

import hashlib
import logging
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_lowrank.errors import UserError, first_line
from hf_lowrank.training.files import digest_of, expanded, read_files, suffix_of, text_of
from hf_lowrank.training.recipe import DataSettings
from hf_lowrank.training.sequences import quiet_hub

logger = logging.getLogger(__name__)

# So many text files may all be on one side of a split by hash.
FEW_FILES = 1000

UNREACHABLE = {
    "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "TimeoutError", "TransportError",
}  # fmt: skip


@dataclass(frozen=True)
class Documents:
    """The documents of a corpus, in the same order each time they are read.

    Attributes:
        train, held_out: return new iterators over the documents of each split.
        fingerprint: of the content of both, hex.
        title: for messages.
    """

    train: Callable[[], Iterator[str]]
    held_out: Callable[[], Iterator[str]]
    fingerprint: str
    title: str


def is_held_out(key: str, share: float) -> bool:
    """Whether the document `key` is held out: a fixed property of `key`, true of about `share` of all keys."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def python_library(held_out_share: float, folder: str | os.PathLike[str] | None = None) -> Documents:
    """The `.py` files of the installed standard library (or below `folder`), split by a hash of the relative path.

    Installed packages are excluded, and files that are not UTF-8 text are skipped.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts)
    )
    digest = hashlib.sha256()
    readable: list[str] = []
    for name in progress(names, "reading the standard library"):
        text = _source_text(root, name)
        if text:
            readable.append(name)
            digest.update(name.encode() + b"\0" + hashlib.sha256(text.encode()).digest())
    if not readable:
        raise UserError(f"{root}: contains no readable .py files; choose another data.source")

    def documents(held_out: bool) -> Iterator[str]:
        for name in readable:
            if is_held_out(name, held_out_share) == held_out:
                yield _source_text(root, name) or ""

    return Documents(
        train=lambda: documents(False),
        held_out=lambda: documents(True),
        fingerprint=f"{digest.hexdigest()}-{held_out_share}",
        title=str(root),
    )


def _source_text(root: Path, name: str) -> str | None:
    try:
        return (root / name).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        logger.debug("skipped %s: %s", name, error)
        return None


def local_files(
    train_files: list[str], held_out_files: list[str] | None, held_out_share: float, text_column: str
) -> Documents:
    """Files of every kind that `hf_lowrank.training.files` reads; names may be globs, folders and addresses.

    Without `held_out_files`, a share of the documents is held out, chosen by a hash of each document's text; of text
    files too few for that, the end of each.

    Raises:
        UserError: a file is missing, unreadable, empty, of an unknown kind, or has no such text column.
    """
    train = expanded(train_files, "data.train_files")
    held_out = expanded(held_out_files, "data.held_out_files") if held_out_files else None
    both = sorted({*train, *(held_out or ())})
    shared = sorted({os.path.realpath(file) for file in train} & {os.path.realpath(file) for file in held_out or ()})
    if shared:
        raise UserError(f"{shared[0]}: data.held_out_files must not be among data.train_files")
    digest = hashlib.sha256(f"{text_column} {held_out_share} {held_out is None}".encode())
    for file in progress(both, "reading the corpus"):
        digest.update(f"{file in train}".encode() + digest_of(file))

    def by_share(held: bool) -> Iterator[str]:
        cut = len(train) <= FEW_FILES and all(suffix_of(file) == ".txt" for file in train)
        if cut and len({is_held_out(text, held_out_share) for text in read_files(train, text_column)}) == 1:
            for text in read_files(train, text_column):
                yield _part(text, held_out_share, held)
        else:
            for text in read_files(train, text_column):
                if is_held_out(text, held_out_share) == held:
                    yield text

    return Documents(
        train=lambda: by_share(False) if held_out is None else read_files(train, text_column),
        held_out=lambda: by_share(True) if held_out is None else read_files(held_out, text_column),
        fingerprint=digest.hexdigest(),
        title=", ".join(train_files),
    )


def _part(text: str, held_out_share: float, held: bool) -> str:
    """The last share of a text, held out, or what precedes it; cut after a line if there is one."""
    middle = round(len(text) * (1 - held_out_share))
    cut = text.rfind("\n", 0, middle) + 1 or middle
    return text[cut:] if held else text[:cut]


def progress(items: Iterable[Any], title: str) -> Iterable[Any]:
    """`items` with a bar that appears in a terminal after two seconds, and disappears at the end."""
    return tqdm(items, desc=title, delay=2, disable=None, leave=False)


def hub_documents(data: DataSettings) -> Documents:
    """The documents of a downloaded dataset.

    Raises:
        UserError: the dataset, subset, split or column does not exist, or the Hub cannot be reached.
    """
    train = _load(data, data.split)
    held_out = train if data.held_out_split is None else _load(data, data.held_out_split)
    if data.held_out_split is not None:
        _check_disjoint(data, train.info.splits)
    split_by = data.held_out_share if data.held_out_split is None else held_out._fingerprint
    fingerprint = f"{train._fingerprint} {split_by} {data.text_column}"

    def documents(rows: Any, held: bool) -> Iterator[str]:
        for text in _texts(rows, data):
            if text.strip() and (data.held_out_split is not None or is_held_out(text, data.held_out_share) == held):
                yield text

    return Documents(
        train=lambda: documents(train, False),
        held_out=lambda: documents(held_out, True),
        fingerprint=hashlib.sha256(fingerprint.encode()).hexdigest(),
        title=f"data.dataset {data.dataset!r}",
    )


def _check_disjoint(data: DataSettings, splits: Any) -> None:
    """Raises a `UserError` if slices such as `train[:90%]` and `train[80%:]` overlap."""
    from datasets import ReadInstruction

    lengths = {name: split.num_examples for name, split in (splits or {}).items()}
    try:
        one, other = (
            ReadInstruction.from_spec(split).to_absolute(lengths) for split in (data.split, str(data.held_out_split))
        )
    except (ValueError, KeyError, AttributeError):  # not a dataset with lengths, or not a slice
        return
    for ours in one:
        for theirs in other:
            if ours.splitname == theirs.splitname and max(ours.from_, theirs.from_) < min(ours.to, theirs.to):
                raise UserError(
                    f"data.held_out_split {data.held_out_split!r} must share no rows with data.split {data.split!r}, "
                    f"both have row {max(ours.from_, theirs.from_)} of {ours.splitname}"
                )


@dataclass(frozen=True)
class StreamedDocument:
    """A document of a stream: its number, and the states of the iteration before and after it."""

    number: int
    text: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


@dataclass(frozen=True)
class HubStream:
    """The documents of a streamed split, non-empty or not; iterating gives their texts."""

    data: DataSettings
    rows: Any
    shuffled: bool

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in self.read())

    def read(self, first: int = 0, state: dict[str, Any] | None = None) -> Iterator[StreamedDocument]:
        """The documents from number `first` on, whose state before it may be given."""
        number = 0
        if state is not None and not self.shuffled:
            self.rows.load_state_dict(state)
            number = first
        texts = _texts(self.rows, self.data)
        for _ in range(number, first):
            next(texts, None)
        before = state
        for number, text in enumerate(texts, start=first):
            after = None if self.shuffled else self.rows.state_dict()
            yield StreamedDocument(number, text, before, after)
            before = after


def hub_stream(data: DataSettings, split: str, *, seed: int | None = None, skip: int = 0) -> HubStream:
    """The documents of a streamed split after the first `skip`, shuffled by `seed` in the recipe's buffer.

    Raises:
        UserError: as in `hub_documents`, or the connection fails.
    """
    rows = _load(data, split)
    if skip:
        rows = rows.skip(skip)
    shuffled = seed is not None and data.shuffle_buffer > 0
    if shuffled:
        rows = rows.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
    return HubStream(data, rows, shuffled)


def _load(data: DataSettings, split: str) -> Any:
    import datasets

    datasets.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with quiet_hub():
            return datasets.load_dataset(
                data.dataset, data.subset, split=split, revision=data.revision, streaming=data.streaming
            )
    except Exception as error:
        raise _explained(error, data, split) from None


def _texts(rows: Any, data: DataSettings) -> Iterator[str]:
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise _explained(error, data, data.split) from None
        if data.text_column not in row:
            raise UserError(
                f"data.text_column {data.text_column!r} is not in data.dataset {data.dataset!r}; its columns: "
                f"{', '.join(row)}"
            )
        yield text_of(row[data.text_column], f"data.dataset {data.dataset!r}", data.text_column)


def _explained(error: Exception, data: DataSettings, split: str) -> UserError:
    """An error of `datasets` or of a library below it, in terms of the recipe's keys."""
    from datasets.exceptions import DatasetNotFoundError

    reason = first_line(error)
    # `datasets` wraps connection errors, sometimes in the error for a dataset that does not exist.
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    dataset = f"data.dataset {data.dataset!r}"
    if names & UNREACHABLE:
        return UserError(f"{dataset} must be reachable, got {type(error).__name__}: {reason}")
    if isinstance(error, DatasetNotFoundError | FileNotFoundError):
        return UserError(f"{dataset} must be a dataset on the Hub that you can access, or a local folder: {reason}")
    if "BuilderConfig" in reason or "Config name is missing" in reason:
        return UserError(f"data.subset {data.subset!r} is not among those of {dataset}: {error}")
    if "split" in reason.lower():
        return UserError(f"data.split {split!r} is not among those of {dataset}: {reason}")
    return UserError(f"{dataset} could not be read, {type(error).__name__}: {reason}")
