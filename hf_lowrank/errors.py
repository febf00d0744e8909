"""Errors that a user can fix: one line that names what is wrong, where, and what is allowed."""

import difflib
from collections.abc import Iterable

# Messages quote user input, which may be of any length.
MAX_LENGTH = 1500


class UserError(ValueError):
    """Wrong input. The message is one line; the command line prints it without a traceback and exits with status 2.

    Line breaks become spaces; an overlong message loses its middle.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        half = MAX_LENGTH // 2
        super().__init__(line if len(line) <= MAX_LENGTH else f"{line[:half]} … {line[-half:]}")


class LowRankWarning(UserWarning):
    """A warning to the user, in one line."""


class DivergedError(UserError):
    """Training whose loss or weights became NaN or Inf."""


class StoppedError(Exception):
    """Training was interrupted and saved and can be resumed; the command line prints the message and exits with 75."""


# A temporary failure in sysexits.h: the same command resumes.
STOPPED_STATUS = 75


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an error says, in one line of at most `limit` characters; its type where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message: "did you mean 'a' or 'b'?", or all of `allowed` if none is close to `name`."""
    choices = sorted(allowed)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(choice) for choice in close) + "?"
    return "allowed: " + ", ".join(choices)
