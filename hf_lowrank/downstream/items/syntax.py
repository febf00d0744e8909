"""`pylib_syntax`: a real source line against the same line with one token corrupted, given the lines before."""

from __future__ import annotations

import ast
import tokenize
from collections.abc import Iterator, Sequence

from hf_lowrank.downstream.items.chunks import Chunk, Word, chunks_of
from hf_lowrank.downstream.items.draws import Draws
from hf_lowrank.downstream.items.encoding import Encoder
from hf_lowrank.downstream.items.held_out import Source
from hf_lowrank.downstream.items.names import reused_names
from hf_lowrank.downstream.items.pairing import InversePairs, Item, two_choices

KINDS = ("bracket", "colon", "keyword", "operator", "indentation", "name")
TRIES_A_CHUNK = 3

BRACKETS = {a: [b for b in side if b != a] for side in ("([{", ")]}") for a in side}
CLOSING = {"(": ")", "[": "]", "{": "}"}
# Each keyword also replaces its replacement, so that both directions occur.
KEYWORDS = {
    "if": "for", "def": "return", "else": "elif", "in": "as", "not": "is", "class": "from", "try": "with",
    "except": "finally", "raise": "while", "import": "and", "or": "lambda",
}  # fmt: skip
KEYWORDS |= {other: word for word, other in KEYWORDS.items()}
OPERATORS = ("==", "!=", "<", ">", "<=", ">=", "+", "-", "*", "%")
INDENT = 4

Corruption = tuple[int, str]  # line in the chunk, its corrupted text


def make_syntax(sources: Sequence[Source], encoder: Encoder, draws: Draws, count: int) -> list[Item]:
    """About `count` items in inverse pairs, the same number of each kind."""
    each = -(-count // (2 * len(KINDS)))
    collected = {kind: InversePairs(each) for kind in FINDERS}
    chunks = draws.shuffled(list(chunks_of(sources)))
    for chunk in chunks:
        if all(pairs.full for pairs in collected.values()):
            break
        for kind, finder in FINDERS.items():
            if not collected[kind].full:
                _collect(chunk, kind, list(finder(chunk, draws)), encoder, draws, collected[kind])
    collected["name"] = reused_names(chunks, encoder, draws, each)
    least = min(len(pairs.pairs) for pairs in collected.values())
    return two_choices([pair for kind in KINDS for pair in collected[kind].pairs[:least]])


def _collect(
    chunk: Chunk, kind: str, found: list[Corruption], encoder: Encoder, draws: Draws, pairs: InversePairs
) -> None:
    for line, bad in draws.shuffled(found)[:TRIES_A_CHUNK]:
        if not _is_wrong(chunk, line, bad, kind):
            continue
        context = chunk.context_before(line, bad, encoder)
        real, other = "\n" + chunk.lines[line], "\n" + bad
        swap = encoder.swap(context, real, other) if context else None
        if context and swap:
            before = encoder.token_before(context, real, other)
            pairs.add(swap, before, chunk.item(line, kind, context, real, other))


def _is_wrong(chunk: Chunk, line: int, bad: str, kind: str) -> bool:
    """Whether the corrupted line breaks the code: it does not parse, or is an expression without effect."""
    tree = chunk.parsed_with(line, bad)
    if tree is None:
        return True
    if kind != "operator":
        return False
    return any(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare | ast.BinOp) and node.lineno == line + 1
        for node in ast.walk(tree)
    )


def _replaced(chunk: Chunk, word: Word, text: str) -> Corruption:
    line = chunk.lines[word.line]
    return word.line, line[: word.start] + text + line[word.end :]


def _brackets(chunk: Chunk, draws: Draws) -> Iterator[Corruption]:
    """A bracket whose partner is on the same line is replaced by one of another shape."""
    stack: list[Word] = []
    for word in chunk.words:
        if word.type != tokenize.OP:
            continue
        if word.text in CLOSING:
            stack.append(word)
        elif word.text in CLOSING.values() and stack:
            opening = stack.pop()
            if opening.line == word.line and CLOSING[opening.text] == word.text and word.line:
                for bracket in (opening, word):
                    yield _replaced(chunk, bracket, draws.choice(BRACKETS[bracket.text]))


def _colons(chunk: Chunk, draws: Draws) -> Iterator[Corruption]:
    """A colon is replaced by a comma, or a comma by a colon."""
    for word in chunk.words:
        if word.line and word.type == tokenize.OP and word.text in (":", ","):
            yield _replaced(chunk, word, "," if word.text == ":" else ":")


def _keywords(chunk: Chunk, draws: Draws) -> Iterator[Corruption]:
    for word in chunk.words:
        if word.line and word.type == tokenize.NAME and word.text in KEYWORDS:
            yield _replaced(chunk, word, KEYWORDS[word.text])


def _operators(chunk: Chunk, draws: Draws) -> Iterator[Corruption]:
    """The = of an assignment is replaced by another operator, or another operator by =."""
    for word in chunk.words:
        line = chunk.lines[word.line]
        if word.line and word.type == tokenize.OP and line[word.start - 1 : word.start] == " ":
            if word.text == "=":
                yield _replaced(chunk, word, draws.choice(OPERATORS))
            elif word.text in OPERATORS:
                yield _replaced(chunk, word, "=")


def _indentation(chunk: Chunk, draws: Draws) -> Iterator[Corruption]:
    """The first line of a statement is indented one level more or less."""
    for word in chunk.words:
        line = chunk.lines[word.line]
        if word.first and word.line and word.start >= INDENT and not line[: word.start].strip():
            yield word.line, " " * INDENT + line
            if word.start > INDENT:
                yield word.line, line[INDENT:]


FINDERS = {
    "bracket": _brackets,
    "colon": _colons,
    "keyword": _keywords,
    "operator": _operators,
    "indentation": _indentation,
}
