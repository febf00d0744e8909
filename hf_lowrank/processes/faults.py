"""Errors that fail one metric or task of one checkpoint, and errors that end the work of several processes."""

from hf_lowrank.errors import UserError, one_line

# An error of these types fails the metric or task at hand; the command continues with the next one.
RECOVERABLE_ERRORS = (
    ValueError, RuntimeError, OSError, MemoryError, LookupError, AttributeError, TypeError, ArithmeticError,
    AssertionError, ImportError,
)  # fmt: skip


class CollectiveError(UserError):
    """An error of some processes that was raised in all of them.

    Attributes:
        unexpected: whether it may have left models in the middle of a forward pass.
        own: this process's own error; None where it had none.
    """

    def __init__(self, message: str, *, unexpected: bool, own: Exception | None = None) -> None:
        super().__init__(message)
        self.unexpected = unexpected
        self.own = own


class LostProcessError(Exception):
    """Processes that work jointly cannot continue; the message says why."""


def error_line(error: BaseException) -> str:
    """The error as one line, with its type unless that is a ValueError."""
    message = one_line(error, 500)
    return (message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}")[:500]
