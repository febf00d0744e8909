"""Repeated names: `pylib_copy`, and the kind "name" of `pylib_syntax`.

A name x that occurs in the context is used again; the other choice is a name y of about the same frequency that does
not occur. Names form fixed couples (x, y), so that y is the right choice just as often. In `pylib_copy` x has followed
the text before it earlier, so looking it up gives the right choice (induction, arXiv 2209.11895).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hf_lowrank.downstream.items.chunks import Chunk, Word, chunks_of
from hf_lowrank.downstream.items.draws import Draws
from hf_lowrank.downstream.items.encoding import Encoder
from hf_lowrank.downstream.items.held_out import Source
from hf_lowrank.downstream.items.pairing import InversePairs, Item, two_choices

PLAIN_NAME = re.compile(r"[A-Za-z]{3,}")
LAST_WORD = re.compile(r"\w+\W*$")
USES_A_NAME = 100
LINES_OF_COPY = 40
# Attributes all follow a dot, so a lower limit would leave too few items.
COPIES_ALIKE = 40
MOST_CHUNKS = 4000


@dataclass(frozen=True)
class Use:
    """A name that occurs in an earlier line of its chunk."""

    chunk: Chunk
    word: Word

    @property
    def before(self) -> str:
        """The character before the name."""
        return self.chunk.lines[self.word.line][self.word.start - 1 : self.word.start]

    def written(self, name: str) -> str:
        """The line with another name in place of this one."""
        line = self.chunk.lines[self.word.line]
        return line[: self.word.start] + name + line[self.word.end :]


def make_copy(sources: Sequence[Source], encoder: Encoder, draws: Draws, count: int) -> list[Item]:
    """About `count` items: the name that continues a line, against one that does not occur before."""
    pairs = InversePairs(-(-count // 2), COPIES_ALIKE)
    for use, other in _uses(draws.shuffled(list(chunks_of(sources))), encoder, draws):
        if pairs.full:
            break
        line = use.chunk.lines[use.word.line]
        space = " " if use.before == " " else ""
        head = line[: use.word.start - len(space)]
        if not head.strip() or head != head.rstrip():
            continue
        lines_before = use.chunk.context_before(use.word.line, line[: use.word.end], encoder, LINES_OF_COPY)
        if lines_before is None or not _follows_again(lines_before + "\n" + head, space + use.word.text):
            continue
        if not _is_copied(lines_before + "\n" + head, use.word.text, other):
            continue
        context, real, wrong = lines_before + "\n" + head, space + use.word.text, space + other
        swap = encoder.swap(context, real, wrong)
        if swap:
            before = encoder.token_before(context, real, wrong)
            pairs.add(swap, before, use.chunk.item(use.word.line, "copy", context, real, wrong))
    return two_choices(pairs.pairs)


def reused_names(chunks: Sequence[Chunk], encoder: Encoder, draws: Draws, wanted: int) -> InversePairs:
    """Pairs of lines with a name that occurs before, and with one that does not."""
    pairs = InversePairs(wanted)
    for use, other in _uses(chunks, encoder, draws):
        if pairs.full:
            break
        bad, line = use.written(other), use.chunk.lines[use.word.line]
        context = use.chunk.context_before(use.word.line, line, encoder)
        if context is None or not _is_copied(context, use.word.text, other) or _has(line, other):
            continue
        swap = encoder.swap(context, "\n" + line, "\n" + bad)
        if swap:
            before = encoder.token_before(context, "\n" + line, "\n" + bad)
            pairs.add(swap, before, use.chunk.item(use.word.line, "name", context, "\n" + line, "\n" + bad))
    return pairs


def _follows_again(context: str, continuation: str) -> bool:
    """Whether the end of `context` from its last word on has been followed by `continuation` before."""
    last = LAST_WORD.search(context)
    return last is not None and re.search(re.escape(last[0] + continuation) + r"(?![A-Za-z])", context) is not None


def _is_copied(context: str, name: str, other: str) -> bool:
    return _has(context, name) and not _has(context, other)


def _has(text: str, name: str) -> bool:
    return re.search(rf"(?<![A-Za-z]){name}(?![A-Za-z])", text) is not None


def _uses(chunks: Sequence[Chunk], encoder: Encoder, draws: Draws) -> Iterator[tuple[Use, str]]:
    """Uses of names with the other name of the couple, in random order, each couple a limited number of times.

    A couple's names are single tokens, follow the same character, and are neighbours in the order of frequency.
    """
    uses: dict[tuple[str, str], list[Use]] = defaultdict(list)
    single: dict[str, bool] = {}
    for chunk in chunks[:MOST_CHUNKS]:
        seen: set[str] = set()
        for word in chunk.words:
            if not word.is_name or not PLAIN_NAME.fullmatch(word.text):
                continue
            use = Use(chunk, word)
            text = (" " if use.before == " " else "") + word.text
            if text not in single:
                single[text] = len(encoder.tokens(text)) == 1
            if word.text in seen and single[text] and word.line:
                uses[use.before, word.text].append(use)
            seen.add(word.text)
    chosen: list[tuple[Use, str]] = []
    for before in sorted({form for form, _ in uses}):
        names = sorted((name for form, name in uses if form == before), key=lambda name: -len(uses[before, name]))
        for x, y in zip(names[::2], names[1::2], strict=False):
            for name, other in ((x, y), (y, x)):
                chosen.extend((use, other) for use in draws.shuffled(uses[before, name])[:USES_A_NAME])
    yield from draws.shuffled(chosen)
