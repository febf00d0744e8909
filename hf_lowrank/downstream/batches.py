"""Which requests lm-eval's `hf` takes through the model together; its answers depend on that in their last digits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

Batches = list[list[int]]  # places of requests


def consecutive_batches(count: int, size: int) -> Batches:
    """`count` places in their order, `size` a batch."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def likelihood_batches(requests: Sequence[Any], size: int, *, one_for_equal_contexts: bool) -> Batches:
    """Of `(text, context, continuation)` with lists of tokens: the longest first, `size` sequences a batch.

    Args:
        one_for_equal_contexts: whether requests that differ in their last token alone share a sequence.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, (_, context, continuation) in enumerate(requests):
        key: Hashable = (*context, *continuation[:-1]) if one_for_equal_contexts else place
        groups.setdefault(key, []).append(place)

    def length_and_tokens(places: list[int]) -> tuple[int, tuple[int, ...]]:
        _, context, continuation = max((requests[place] for place in places), key=lambda request: len(request[2]))
        return -len(context) - len(continuation), (*context, *continuation)

    ordered = sorted(groups.values(), key=length_and_tokens)
    return [
        sorted(place for group in batch for place in ordered[group])
        for batch in consecutive_batches(len(ordered), size)
    ]


def generation_batches(
    requests: Sequence[tuple[str, dict[str, Any]]], size: int, encode: Callable[[str], list[int]]
) -> Batches:
    """Of `(text, options)`: those of equal options together, the longest first, `size` a batch."""
    groups: dict[str, list[int]] = {}
    for place, (_, options) in enumerate(requests):
        groups.setdefault(repr(sorted(options.items())), []).append(place)
    batches: Batches = []
    for places in groups.values():
        ordered = sorted(places, key=lambda place: (-len(encode(requests[place][0])), requests[place][0]))
        batches += [[ordered[i] for i in batch] for batch in consecutive_batches(len(ordered), size)]
    return batches
