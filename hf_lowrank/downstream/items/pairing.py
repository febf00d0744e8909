"""Choosing items for which no rule that ignores the context, and looks at tokens or lengths only, beats chance."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from hf_lowrank.downstream.items.encoding import Swap

Item = dict[str, Any]

MOST_ALIKE = 2


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
