"""Tasks from code: `pylib_syntax`, a real source line against the same line with one token corrupted, given the lines
before, and `pylib_copy`, a repeated name against another one.

For names, in `pylib_copy` and as a kind of `pylib_syntax`: a name x that occurs in the context is used again; the
other choice is a name y of about the same frequency that does not occur. Names form fixed couples (x, y), so that y is
the right choice just as often. In `pylib_copy` x has followed the text before it earlier, so looking it up gives the
right choice (induction, arXiv 2209.11895).
"""

import ast
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hf_lowrank.downstream.items.choices import Draws, Encoder, InversePairs, Item, two_choices
from hf_lowrank.downstream.items.held_out import Chunk, Source, Word, chunks_of

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

PLAIN_NAME = re.compile(r"[A-Za-z]{3,}")
LAST_WORD = re.compile(r"\w+\W*$")
USES_A_NAME = 100
LINES_OF_COPY = 40
# Attributes all follow a dot, so a lower limit would leave too few items.
COPIES_ALIKE = 40
MOST_CHUNKS = 4000


def make_syntax(sources: Sequence[Source], encoder: Encoder, draws: Draws, count: int) -> list[Item]:
    """About `count` items in inverse pairs, the same number of each kind."""
    each = -(-count // (2 * len(KINDS)))
    collected = {kind: InversePairs(each) for kind in FINDERS}
    chunks = draws.shuffled(list(chunks_of(sources)))
    for chunk in chunks:
        if all(pairs.full for pairs in collected.values()):
            break
        for kind, finder in FINDERS.items():
            if collected[kind].full:
                continue
            for line, bad in draws.shuffled(list(finder(chunk, draws)))[:TRIES_A_CHUNK]:
                context = chunk.context_before(line, bad, encoder) if _is_wrong(chunk, line, bad, kind) else None
                if context:
                    _add(collected[kind], encoder, chunk, line, kind, context, "\n" + chunk.lines[line], "\n" + bad)
    collected["name"] = reused_names(chunks, encoder, draws, each)
    least = min(len(pairs.pairs) for pairs in collected.values())
    return two_choices([pair for kind in KINDS for pair in collected[kind].pairs[:least]])


def _add(
    pairs: InversePairs, encoder: Encoder, chunk: Chunk, line: int, kind: str, context: str, real: str, other: str
) -> None:
    """Adds an item whose choices are not yet ordered, if they differ by a swap."""
    swap = encoder.swap(context, real, other)
    if swap:
        number = chunk.first_line + line
        item = {
            "kind": kind, "source": chunk.source, "line": number, "context": context, "real": real, "other": other
        }  # fmt: skip
        pairs.add(swap, encoder.token_before(context, real, other), item)


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
                    yield bracket.line, chunk.replaced(bracket, draws.choice(BRACKETS[bracket.text]))


def _colons(chunk: Chunk, draws: Draws) -> Iterator[Corruption]:
    """A colon is replaced by a comma, or a comma by a colon."""
    for word in chunk.words:
        if word.line and word.type == tokenize.OP and word.text in (":", ","):
            yield word.line, chunk.replaced(word, "," if word.text == ":" else ":")


def _keywords(chunk: Chunk, draws: Draws) -> Iterator[Corruption]:
    for word in chunk.words:
        if word.line and word.type == tokenize.NAME and word.text in KEYWORDS:
            yield word.line, chunk.replaced(word, KEYWORDS[word.text])


def _operators(chunk: Chunk, draws: Draws) -> Iterator[Corruption]:
    """The = of an assignment is replaced by another operator, or another operator by =."""
    for word in chunk.words:
        line = chunk.lines[word.line]
        if word.line and word.type == tokenize.OP and line[word.start - 1 : word.start] == " ":
            if word.text == "=":
                yield word.line, chunk.replaced(word, draws.choice(OPERATORS))
            elif word.text in OPERATORS:
                yield word.line, chunk.replaced(word, "=")


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


@dataclass(frozen=True)
class Use:
    """A name that occurs in an earlier line of its chunk."""

    chunk: Chunk
    word: Word

    @property
    def before(self) -> str:
        """The character before the name."""
        return self.line[self.word.start - 1 : self.word.start]

    @property
    def line(self) -> str:
        return self.chunk.lines[self.word.line]


def make_copy(sources: Sequence[Source], encoder: Encoder, draws: Draws, count: int) -> list[Item]:
    """About `count` items: the name that continues a line, against one that does not occur before."""
    pairs = InversePairs(-(-count // 2), COPIES_ALIKE)
    for use, other in _uses(draws.shuffled(list(chunks_of(sources))), encoder, draws):
        if pairs.full:
            break
        chunk, word = use.chunk, use.word
        space = " " if use.before == " " else ""
        head = use.line[: word.start - len(space)]
        if not head.strip() or head != head.rstrip():
            continue
        lines_before = chunk.context_before(word.line, use.line[: word.end], encoder, LINES_OF_COPY)
        if lines_before is None:
            continue
        context = lines_before + "\n" + head
        if _follows_again(context, space + word.text) and _is_copied(context, word.text, other):
            _add(pairs, encoder, chunk, word.line, "copy", context, space + word.text, space + other)
    return two_choices(pairs.pairs)


def reused_names(chunks: Sequence[Chunk], encoder: Encoder, draws: Draws, wanted: int) -> InversePairs:
    """Pairs of lines with a name that occurs before, and with one that does not."""
    pairs = InversePairs(wanted)
    for use, other in _uses(chunks, encoder, draws):
        if pairs.full:
            break
        chunk, word = use.chunk, use.word
        context = chunk.context_before(word.line, use.line, encoder)
        if context is not None and _is_copied(context, word.text, other) and not _has(use.line, other):
            bad = chunk.replaced(word, other)
            _add(pairs, encoder, chunk, word.line, "name", context, "\n" + use.line, "\n" + bad)
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
