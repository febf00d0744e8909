"""Documents of a dataset on the Hub (or of a local folder that `datasets` can read), downloaded or streamed."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_lowrank.errors import UserError
from hf_lowrank.training.sources import Documents, is_held_out, text_of
from hf_lowrank.training.tokenization import quiet_hub

if TYPE_CHECKING:
    from hf_lowrank.training.recipe import DataSettings

UNREACHABLE = {
    "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "TimeoutError", "TransportError",
}  # fmt: skip


def hub_documents(data: DataSettings) -> Documents:
    """The documents of a downloaded dataset.

    Raises:
        UserError: the dataset, subset, split or column does not exist, or the Hub cannot be reached.
    """
    train = _load(data, data.split)
    held_out = train if data.held_out_split is None else _load(data, data.held_out_split)
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


def hub_stream(data: DataSettings, split: str, *, seed: int | None = None, skip: int = 0) -> Iterator[str]:
    """The non-empty documents of a streamed split after the first `skip`, shuffled by `seed` in the recipe's buffer.

    Raises:
        UserError: as in `hub_documents`, or the connection fails.
    """
    rows = _load(data, split)
    if skip:
        rows = rows.skip(skip)
    if seed is not None and data.shuffle_buffer:
        rows = rows.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
    return _texts(rows, data)


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

    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
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
        return UserError(f"data.subset {data.subset!r} is not among those of {dataset}: {' '.join(lines)}")
    if "split" in reason.lower():
        return UserError(f"data.split {split!r} is not among those of {dataset}: {reason}")
    return UserError(f"{dataset} could not be read, {type(error).__name__}: {reason}")
