"""Items as JSON lines in the cache, made once per corpus, tokenizer and context length."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_lowrank.downstream.items.choices import Draws, Encoder, Item
from hf_lowrank.downstream.items.code import make_copy, make_syntax
from hf_lowrank.downstream.items.held_out import Source, held_out_sources
from hf_lowrank.downstream.items.prose import make_cloze, make_passages
from hf_lowrank.downstream.sources import context_length, load_tokenizer
from hf_lowrank.errors import UserError, nearest
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.parsing import parse_json

# Incremented whenever the same text would give other items.
VERSION = 4
SEED = 0
FEWEST = 500
SHORTEST_SOURCE = 500

Maker = Callable[[Sequence[Source], Encoder, Draws, int], list[Item]]

# Each task with its generator and number of items.
MAKERS: dict[str, tuple[Maker, int]] = {
    "pylib_cloze": (make_cloze, 600),
    "pylib_syntax": (make_syntax, 720),
    "pylib_copy": (make_copy, 800),
    "pylib_bits_per_byte": (make_passages, 512),
}


def items_for(trajectory: Trajectory, task: str) -> Path:
    """The file with a run's items for `task`, which is made if it does not exist.

    Raises:
        UserError: the run's held-out text or tokenizer is not available, or the text gives fewer than 500 items.
    """
    from hf_lowrank.storage.cache import cached_folder
    from hf_lowrank.training.sequences import tokenizer_fingerprint

    if task not in MAKERS:
        raise UserError(f"unknown task {task!r}; {nearest(task, MAKERS)}")
    name = trajectory.run.name
    tokenizer = load_tokenizer(trajectory, trajectory.steps[-1])
    length = context_length(trajectory)
    recipe = trajectory.run.recipe
    sources = _sources(json.dumps((recipe or {}).get("data"), sort_keys=True), name)
    text = "".join(f"{source.name}\0{source.text}\0" for source in sources)
    digest = hashlib.sha256(text.encode()).hexdigest()
    key = f"{task} {VERSION} {SEED} {digest} {tokenizer_fingerprint(tokenizer)} {length}"

    def make(folder: Path) -> None:
        items = make_items(task, sources, tokenizer, length)
        if len(items) < FEWEST:
            raise UserError(
                f"{name}: the held-out text gives {len(items)} items for {task}, at least {FEWEST} are needed; "
                f"hold out more text or use a longer data.sequence_length (now {length} tokens)"
            )
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")

    return cached_folder("items", key, make) / f"{task}.jsonl"


@functools.lru_cache(maxsize=4)
def _sources(data: str, run: str) -> tuple[Source, ...]:
    return tuple(held_out_sources({"data": parse_json(data)}, run))


def make_items(
    task: str, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, length: int, seed: int = SEED
) -> list[dict[str, Any]]:
    """A task's items from held-out text, for models with a context of `length` tokens; deterministic."""
    maker, count = MAKERS[task]
    # Tiny files are boilerplate that other files repeat word for word, files of the training text among them.
    usable = [source for source in sources if len(source.text) >= SHORTEST_SOURCE]
    items = maker(usable, Encoder(tokenizer, length), Draws(seed, task, VERSION), count)
    return [{"id": f"{task}-{number:04d}", **item} for number, item in enumerate(items)]


def load_items(file: Path) -> list[dict[str, Any]]:
    """The items of a file made by `items_for`."""
    return [parse_json(line) for line in file.read_text(encoding="utf-8").splitlines()]
