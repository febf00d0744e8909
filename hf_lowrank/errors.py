"""Errors that a user can mend: one line that names what is wrong, where, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What a user gave may be quoted in a message, and may be of any length.
LONGEST = 1500


class UserError(ValueError):
    """Wrong input. The message is one line, complete without a traceback; the command line prints it and exits 2.

    Line breaks in it become spaces, and of an overlong one the middle is left out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        half = LONGEST // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} … {line[-half:]}")


class LowRankWarning(UserWarning):
    """What a user should know of and nothing stops for, in one line."""


class DivergedError(UserError):
    """A training whose loss or weights are no numbers any more."""


class StoppedError(Exception):
    """A training was asked to stop, saved, and can go on; the command line prints the message and exits 75."""


# What sysexits.h calls a temporary failure: the same call will go on.
STOPPED_STATUS = 75


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an error says, in one line of at most `limit` characters; its type where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error line: "did you mean 'a' or 'b'?", or all of `allowed` when none is close to `name`."""
    choices = sorted(allowed)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(choice) for choice in close) + "?"
    return "allowed: " + ", ".join(choices)
