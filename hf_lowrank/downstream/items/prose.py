"""Tasks from prose and whole passages: `pylib_cloze`, the last word of a sentence of documentation among those of
three other sentences, and `pylib_bits_per_byte`, passages from all of the held-out text."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from hf_lowrank.downstream.items.choices import Draws, Encoder, Item
from hf_lowrank.downstream.items.held_out import Source, parsed

CHOICES = 4
SENTENCES_A_WORD = 12
SENTENCE = re.compile(r"[A-Z][^.!?:;]*\s[a-z]{3,}(?=[.!?:;](?:\s|$))")
FEWEST_WORDS, MOST_WORDS = 4, 60
MOST_TOKENS = 3
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LINES = 40
PASSAGES_A_DOCUMENT = 32


def make_cloze(sources: Sequence[Source], encoder: Encoder, draws: Draws, count: int) -> list[Item]:
    """About `count` items in groups of four that share four choices, each of which is right once."""
    by_word: dict[tuple[int, str], list[tuple[str, int, str]]] = defaultdict(list)
    taken: set[str] = set()
    for source, line, context, word in _sentences(sources):
        length = len(encoder.tokens(" " + word))
        if context not in taken and length <= MOST_TOKENS and encoder.split(context, " " + word) is not None:
            taken.add(context)
            by_word[length, word].append((source, line, context))
    # Neighbours in this order have the same number of tokens and are about equally frequent as last words.
    ordered = sorted(by_word, key=lambda key: (key[0], -len(by_word[key]), key[1]))
    waiting = {key: draws.shuffled(by_word[key])[:SENTENCES_A_WORD] for key in ordered}
    items: list[Item] = []
    while len(items) < count:
        groups = [
            left[i : i + CHOICES]
            for length in range(1, MOST_TOKENS + 1)
            for left in [[key for key in waiting if key[0] == length and waiting[key]]]
            for i in range(0, len(left) - CHOICES + 1, CHOICES)
        ]
        if not groups:
            break
        for group in draws.shuffled(groups)[: -(-(count - len(items)) // CHOICES)]:
            found = [waiting[key].pop() for key in group]
            items.extend(_group([word for _, word in group], found, len(items) // CHOICES))
    return items


def _group(words: Sequence[str], found: list[tuple[str, int, str]], number: int) -> Iterator[Item]:
    """The four items of a group; the right choice has a different position in each."""
    for turn, (source, line, context) in enumerate(found):
        target = (turn + number) % CHOICES
        order = [word for word in words if word != words[turn]]
        order.insert(target, words[turn])
        yield {
            "kind": "cloze",
            "source": source,
            "line": line,
            "context": context,
            "choices": [" " + word for word in order],
            "gold": target,
            "group": number,
        }


def _sentences(sources: Sequence[Source]) -> Iterator[tuple[str, int, str, str]]:
    """(file, line, context, last word) of sentences in docstrings and comments, with white space normalised."""
    for source in sources:
        for line, opening, text in (*_docstrings(source), *_comments(source)):
            for paragraph in re.split(r"\n\s*\n", text):
                for match in SENTENCE.finditer(" ".join(paragraph.split())):
                    head, _, word = match[0].rpartition(" ")
                    if FEWEST_WORDS <= len(head.split()) <= MOST_WORDS:
                        yield source.name, line, opening + head, word


def _docstrings(source: Source) -> Iterator[tuple[int, str, str]]:
    for node in ast.walk(parsed(source.text) or ast.Module([], [])):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text:
            yield getattr(node, "lineno", 1), '"""', text


def _comments(source: Source) -> Iterator[tuple[int, str, str]]:
    """Blocks of comment lines."""
    block: list[str] = []
    for number, line in enumerate([*source.text.split("\n"), ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#"))
        elif block:
            yield number - len(block), "# ", "\n".join(block)
            block = []


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
