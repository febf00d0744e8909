"""`pylib_bits_per_byte`: passages from all of the held-out text, each as long as fits the context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hf_lowrank.downstream.items.draws import Draws
from hf_lowrank.downstream.items.encoding import Encoder
from hf_lowrank.downstream.items.held_out import Source
from hf_lowrank.downstream.items.pairing import Item

LINES = 40
PASSAGES_A_DOCUMENT = 32


def make_passages(sources: Sequence[Source], encoder: Encoder, draws: Draws, count: int) -> list[Item]:
    """`count` passages of whole lines that do not overlap, at most 32 per document."""
    starts: list[tuple[Source, list[str], int]] = []
    for source in sources:
        lines = source.text.split("\n")
        starts.extend((source, lines, line) for line in range(0, len(lines), LINES))
    items: list[Item] = []
    used: Counter[str] = Counter()
    for source, lines, start in draws.shuffled(starts):
        if len(items) == count:
            break
        if used[source.name] == PASSAGES_A_DOCUMENT:
            continue
        text = _fitting(lines[start : start + LINES], encoder)
        if text is not None:
            used[source.name] += 1
            items.append({"kind": "passage", "source": source.name, "line": start + 1, "text": text})
    return items


def _fitting(lines: list[str], encoder: Encoder) -> str | None:
    """The longest prefix of `lines` that fits; None if the first line does not fit or the prefix is blank."""
    low, high = 0, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        if len(encoder.tokens("\n".join(lines[:middle]))) <= encoder.room:
            low = middle
        else:
            high = middle - 1
    text = "\n".join(lines[:low])
    return text if text.strip() else None
