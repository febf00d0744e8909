"""`pylib_cloze`: the last word of a sentence of documentation among the last words of three other sentences."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from hf_lowrank.downstream.items.chunks import parsed
from hf_lowrank.downstream.items.draws import Draws
from hf_lowrank.downstream.items.encoding import Encoder
from hf_lowrank.downstream.items.held_out import Source
from hf_lowrank.downstream.items.pairing import Item

CHOICES = 4
SENTENCES_A_WORD = 12
SENTENCE = re.compile(r"[A-Z][^.!?:;]*\s[a-z]{3,}(?=[.!?:;](?:\s|$))")
FEWEST_WORDS, MOST_WORDS = 4, 60
MOST_TOKENS = 3
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


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
