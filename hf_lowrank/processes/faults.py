"""What may go wrong with one metric or task of one checkpoint without ending the command, and how it is put down."""

from __future__ import annotations

from hf_lowrank.errors import UserError
from hf_lowrank.runs.measurements import UNDEFINED

FAULTS = (
    ValueError, RuntimeError, OSError, MemoryError, LookupError, AttributeError, TypeError, ArithmeticError,
    AssertionError, ImportError,
)  # fmt: skip


class UndefinedError(UserError):
    """The quantity has no meaning for this run; the message says why, and trying again will not help.

    Attributes:
        baseline: the run that it has no meaning beside; None where it has none beside any.
    """

    def __init__(self, reason: str, *, baseline: str | None = None) -> None:
        super().__init__(reason)
        self.baseline = baseline


class SharedFaultError(UserError):
    """A fault that all processes know of; the message is the reason that rows give.

    Attributes:
        halfway: it may have left models in the middle of a forward pass.
        baseline: as of UndefinedError.
    """

    def __init__(self, reason: str, *, halfway: bool, baseline: str | None = None) -> None:
        super().__init__(reason)
        self.halfway = halfway
        self.baseline = baseline


class LostProcessError(Exception):
    """Processes that hold a model together cannot go on together; the message says why."""


def reason_of(error: BaseException) -> str:
    """The reason of null rows."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UndefinedError):
        reason = UNDEFINED + reason
    return (reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}")[:500]
