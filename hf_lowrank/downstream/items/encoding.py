"""Contexts and continuations as lm-eval tokenises them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# For special tokens that a tokenizer may add to an item.
RESERVE = 2

Ids = tuple[int, ...]
Swap = tuple[Ids, Ids]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and the largest number of tokens of an item."""

    tokens: Callable[[str], list[int]]
    room: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, context_length: int) -> Encoder:
        """The encoder for a context of `context_length` tokens."""

        def tokens(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        return cls(tokens, context_length - RESERVE)

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]] | None:
        """(context ids, continuation ids); None if the boundary is inside a token or the item is too long."""
        head, whole = self.tokens(context), self.tokens(context + continuation)
        if len(whole) > self.room or len(whole) <= len(head) or whole[: len(head)] != head:
            return None
        return head, whole[len(head) :]

    def swap(self, context: str, real: str, other: str) -> Swap | None:
        """The tokens by which two continuations differ: (those of `real`, those of `other`).

        None if they differ in number of tokens, at more than two positions, or not at all. For any rule that looks at
        single tokens or lengths, two items with inverse swaps cancel.
        """
        ours, theirs = self.split(context, real), self.split(context, other)
        if ours is None or theirs is None or len(ours[1]) != len(theirs[1]):
            return None
        differing = [(a, b) for a, b in zip(ours[1], theirs[1], strict=True) if a != b]
        if not 1 <= len(differing) <= 2:
            return None
        return tuple(sorted(a for a, _ in differing)), tuple(sorted(b for _, b in differing))

    def token_before(self, context: str, real: str, other: str) -> int:
        """The token before the first one by which two continuations with a `swap` differ."""
        ours, theirs = self.tokens(context + real), self.tokens(context + other)
        return next(ours[i - 1] for i in range(1, len(ours)) if ours[i] != theirs[i])
