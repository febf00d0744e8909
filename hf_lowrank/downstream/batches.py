"""The batches in which lm-eval's `hf` evaluates requests; its answers depend on them in their last digits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

Batches = list[list[int]]  # indices of requests


def consecutive_batches(count: int, size: int) -> Batches:
    """Indices 0 … `count` − 1 in order, `size` per batch."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def likelihood_batches(requests: Sequence[Any], size: int, *, share_contexts: bool) -> Batches:
    """Batches of requests `(text, context, continuation)` with lists of tokens: longest first, `size` sequences each.

    Args:
        share_contexts: whether requests that differ only in their last token share a sequence.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        key: Hashable = (*context, *continuation[:-1]) if share_contexts else index
        groups.setdefault(key, []).append(index)

    def length_and_tokens(group: list[int]) -> tuple[int, tuple[int, ...]]:
        _, context, continuation = max((requests[index] for index in group), key=lambda request: len(request[2]))
        return -len(context) - len(continuation), (*context, *continuation)

    ordered = sorted(groups.values(), key=length_and_tokens)
    return [
        sorted(index for group in batch for index in ordered[group])
        for batch in consecutive_batches(len(ordered), size)
    ]


def generation_batches(
    requests: Sequence[tuple[str, dict[str, Any]]], size: int, encode: Callable[[str], list[int]]
) -> Batches:
    """Batches of requests `(text, options)`, each with equal options: longest first, `size` requests each."""
    groups: dict[str, list[int]] = {}
    for index, (_, options) in enumerate(requests):
        groups.setdefault(repr(sorted(options.items())), []).append(index)
    batches: Batches = []
    for group in groups.values():
        ordered = sorted(group, key=lambda index: (-len(encode(requests[index][0])), requests[index][0]))
        batches += [[ordered[i] for i in batch] for batch in consecutive_batches(len(ordered), size)]
    return batches
