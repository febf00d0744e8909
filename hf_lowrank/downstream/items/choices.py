"""Seeded draws, contexts and continuations as lm-eval tokenises them, and items for which no rule that ignores the
context, and looks at tokens or lengths only, beats chance."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Item = dict[str, Any]
Ids = tuple[int, ...]
Swap = tuple[Ids, Ids]

# For special tokens that a tokenizer may add to an item.
RESERVE = 2
MOST_ALIKE = 2


class Draws:
    """Random choices from a `torch.Generator` whose seed is a hash of `key`."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256(repr(key).encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def choice(self, items: Sequence[T]) -> T:
        return items[int(torch.randint(len(items), (1,), generator=self.generator))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return [items[i] for i in torch.randperm(len(items), generator=self.generator).tolist()]


class Encoder:
    """A tokenizer, and the largest number of tokens of an item in a context of `context_length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        self.tokenizer, self.room = tokenizer, context_length - RESERVE

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

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


class InversePairs:
    """Collects items with two choices and keeps pairs of items with inverse swaps.

    In such a pair the tokens that are right in one item are wrong in the other, and vice versa, so that a rule that
    scores a choice by its own tokens, characters or length is right in exactly one of the two.

    A model that sees only one token back is a fixed rule for each token before the swap. To keep such rules from
    beating chance by luck, no token precedes the same swap in more than `alike` items.
    """

    def __init__(self, pairs: int, alike: int = MOST_ALIKE) -> None:
        self.wanted, self.most_alike = pairs, alike
        self.alike: Counter[tuple[int, Swap]] = Counter()
        self.waiting: dict[Swap, list[Item]] = defaultdict(list)
        self.pairs: list[tuple[Item, Item]] = []

    @property
    def full(self) -> bool:
        return len(self.pairs) >= self.wanted

    def add(self, swap: Swap, token_before: int, item: Item) -> None:
        """Adds an item whose right choice differs from the wrong one by `swap`, after `token_before`."""
        if self.full or self.alike[token_before, swap] >= self.most_alike:
            return
        self.alike[token_before, swap] += 1
        inverse = self.waiting[swap[1], swap[0]]
        for position, other in enumerate(inverse):
            # Two items from the same line would be one question.
            if (other["source"], other["line"]) != (item["source"], item["line"]):
                self.pairs.append((inverse.pop(position), item))
                return
        self.waiting[swap].append(item)


def two_choices(pairs: list[tuple[Item, Item]]) -> list[Item]:
    """The items of `pairs`, which have `real` and `other`, with the right choice first in every second one."""
    items: list[Item] = []
    for number, pair in enumerate(pairs):
        for half, item in enumerate(pair):
            gold = (number + half) % 2
            choices = [item["other"], item["real"]] if gold else [item["real"], item["other"]]
            rest = {key: value for key, value in item.items() if key not in ("real", "other")}
            items.append({**rest, "choices": choices, "gold": gold, "group": number})
    return items
