"""The context of a line: the lines before it, as many as fit."""

from __future__ import annotations

from hf_lowrank.downstream.items.chunks import Chunk
from hf_lowrank.downstream.items.encoding import Encoder
from hf_lowrank.downstream.items.pairing import Item

LINES_BEFORE = 6


def item_of(chunk: Chunk, line: int, kind: str, context: str, real: str, other: str) -> Item:
    """An item whose choices are not yet ordered."""
    return {
        "kind": kind,
        "source": chunk.source,
        "line": chunk.first_line + line,
        "context": context,
        "real": real,
        "other": other,
    }


def context_before(chunk: Chunk, line: int, longest: str, encoder: Encoder, most: int = LINES_BEFORE) -> str | None:
    """As many of the chunk's lines before `line` as fit together with `longest`, at most `most`; None if none fits."""
    length = len(encoder.tokens("\n" + longest)) + 2
    best = None
    for start in range(line - 1, max(-1, line - 1 - most), -1):
        context = "\n".join(chunk.lines[start:line])
        if len(encoder.tokens(context)) + length > encoder.room:
            break
        # lm-eval moves white space at the end of a context into the continuation.
        if context == context.rstrip() and context:
            best = context
    return best
