"""The held-out text of a run, as its recipe splits it off, and its functions and other statements as chunks that are
tokenised and parsed by themselves."""

import ast
import io
import keyword
import os
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_lowrank.downstream.items.choices import Encoder
from hf_lowrank.errors import UserError

PACKAGES = {"site-packages", "dist-packages"}
SHORTEST, LONGEST = 4, 60
LINES_BEFORE = 6


@dataclass(frozen=True)
class Source:
    """One held-out document: a file of the standard library by its relative path, or a numbered local document."""

    name: str
    text: str


def held_out_sources(recipe: dict[str, Any] | None, run: str) -> list[Source]:
    """The held-out documents of a run, in a fixed order.

    Args:
        recipe: the run's resolved recipe, of which only the `data` block is read.
        run: the run's name, for messages.

    Raises:
        UserError: there is no recipe, the corpus is on the Hub (its text is not on this machine), or the text cannot
            be read.
    """
    # Training's own rule for splitting the corpus keeps training text out of the items.
    from hf_lowrank.training.recipe import DataSettings
    from hf_lowrank.training.sources import local_files

    if not recipe or not isinstance(recipe.get("data"), dict):
        raise UserError(f"{run}: has no recipe.yaml with a data block, so its held-out text is unknown")
    data = DataSettings.model_validate(recipe["data"])
    if data.source == "python-library":
        return list(_library(data.held_out_share))
    if data.source == "files":
        documents = local_files(data.train_files or [], data.held_out_files, data.held_out_share, data.text_column)
        return [Source(f"document {number}", text) for number, text in enumerate(documents.held_out())]
    raise UserError(
        f"{run}: tasks made from held-out text need data.source python-library or files, the run has {data.source}"
    )


def _library(share: float) -> Iterator[Source]:
    """The held-out files of the standard library, by the rule of `training.sources.python_library`."""
    from hf_lowrank.training.sources import is_held_out

    root = Path(sysconfig.get_path("stdlib"))
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in PACKAGES]
        names.extend((Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py"))
    for name in sorted(names):
        if is_held_out(name, share):
            try:
                text = (root / name).read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # training skips these files too
            if text:
                yield Source(name, text)


@dataclass(frozen=True)
class Word:
    """A token of a chunk: its type and text, its line in the chunk, its columns, and whether it begins a statement."""

    type: int
    text: str
    line: int
    start: int
    end: int
    first: bool

    @property
    def is_name(self) -> bool:
        return self.type == tokenize.NAME and not keyword.iskeyword(self.text)


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of a file that parse by themselves.

    Attributes:
        source: the file's name.
        first_line: number of the first line in the file, from 1.
        lines: as in the file.
    """

    source: str
    first_line: int
    lines: tuple[str, ...]

    @cached_property
    def words(self) -> list[Word]:
        """The chunk's tokens that do not span lines; columns are those of the file."""
        shift = len(self.lines[0]) - len(self.lines[0].lstrip(" "))
        found: list[Word] = []
        begins = True
        for token in tokenize.generate_tokens(io.StringIO(self.dedented).readline):
            if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                begins = begins or token.type == tokenize.NEWLINE
            elif token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER):
                if token.start[0] == token.end[0]:
                    line = token.start[0] - 1
                    columns = token.start[1] + shift, token.end[1] + shift
                    found.append(Word(token.type, token.string, line, *columns, begins))
                begins = False
        return found

    @cached_property
    def dedented(self) -> str:
        return textwrap.dedent("\n".join(self.lines)) + "\n"

    def parsed_with(self, line: int, text: str) -> ast.Module | None:
        """The syntax tree with one line replaced; None if it does not parse."""
        return parsed(textwrap.dedent("\n".join([*self.lines[:line], text, *self.lines[line + 1 :]])) + "\n")

    def context_before(self, line: int, longest: str, encoder: Encoder, most: int = LINES_BEFORE) -> str | None:
        """As many lines before `line` as fit together with `longest`, at most `most`; None if none fits."""
        length = len(encoder.tokens("\n" + longest)) + 2
        best = None
        for start in range(line - 1, max(-1, line - 1 - most), -1):
            context = "\n".join(self.lines[start:line])
            if len(encoder.tokens(context)) + length > encoder.room:
                break
            # lm-eval moves white space at the end of a context into the continuation.
            if context == context.rstrip() and context:
                best = context
        return best

    def replaced(self, word: Word, text: str) -> str:
        """The line of a word with `text` in its place."""
        line = self.lines[word.line]
        return line[: word.start] + text + line[word.end :]


def parsed(text: str) -> ast.Module | None:
    """The syntax tree; None if the text does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def chunks_of(sources: Sequence[Source]) -> Iterator[Chunk]:
    """Functions, methods and other statements of `SHORTEST` to `LONGEST` lines without tabs that parse alone."""
    for source in sources:
        tree = parsed(source.text)
        if tree is None:
            continue
        # Lines as Python counts them; str.splitlines would also split at form feeds.
        lines = source.text.replace("\r\n", "\n").split("\n")
        for node in _statements(tree.body):
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            segment = tuple(lines[start - 1 : node.end_lineno])
            if not SHORTEST <= len(segment) <= LONGEST or any("\t" in line or "\f" in line for line in segment):
                continue
            chunk = Chunk(source.name, start, segment)
            shift = len(segment[0]) - len(segment[0].lstrip(" "))
            whole = all(not line.strip() or line[:shift].isspace() or not shift for line in segment)
            if whole and parsed(chunk.dedented) is not None:
                yield chunk


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _statements(node.body)
        else:
            yield node
