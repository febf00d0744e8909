"""Keeps tokens, home paths and secrets of the environment out of logs and of everything that is pushed."""

import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

REMOVED = "[removed]"
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.I)
# An absolute path of at least two parts that is not part of a URL; only its last part is kept.
ABSOLUTE_PATH = re.compile(r"""(?<![\w./:~*%-])/(?:[^\s/"'<>|`,;(){}\[\]]+/)+([^\s/"'<>|`,;(){}\[\]]*)""")
ANY_HOME = re.compile(r"(?<![\w./:~*%-])/(?:home|Users)/[\w.-]+")
SIGNED_QUERY = re.compile(r"(https?://[^\s?\"'<>]+)\?[^\s\"'<>]+")


def secrets() -> tuple[str, ...]:
    """The tokens of the login, and the values of environment variables with names like TOKEN or PASSWORD."""
    from huggingface_hub import get_token

    known = {get_token()}
    known.update(value for name, value in os.environ.items() if SECRET_NAME.search(name))
    return tuple(sorted((value for value in known if value and len(value) >= 8), key=len, reverse=True))


@lru_cache(maxsize=8)
def _homes(home: str) -> tuple[str, ...]:
    paths = {home, os.path.realpath(home)}
    return tuple(sorted((path for path in paths if len(path) > 1), key=len, reverse=True))


def without_private(text: str, *, known: tuple[str, ...] | None = None) -> str:
    """`text` without tokens, secrets of the environment, signed queries and the folders of this machine.

    Of an absolute path only the last part is kept; relative paths and URLs are kept.
    """
    for secret in secrets() if known is None else known:
        text = text.replace(secret, REMOVED)
    text = TOKEN.sub(REMOVED, text)
    if "/" not in text:
        return text
    text = SIGNED_QUERY.sub(r"\1", text)
    for home in (*_homes(str(Path.home())), *_homes(tempfile.gettempdir())):
        text = re.sub(r"(?<![\w.-])" + re.escape(home) + r"(?![\w.-])", "/~", text)
    text = ANY_HOME.sub("/~", text)
    text = ABSOLUTE_PATH.sub(lambda match: match[1] or "~", text)
    return text.replace("/~", "~")


def without_private_parts(data: Any, known: tuple[str, ...] | None = None) -> Any:
    """Applies `without_private` to every string in plain data, including keys.

    Cleaning a file's text instead could break it: in YAML the rest of a path may need quotes that the whole path did
    not; in JSON the escape `\\n` looks like the beginning of a name.

    Args:
        data: as parsed from YAML or JSON.
        known: the secrets, to avoid collecting them for each of many texts.

    Raises:
        ValueError: two keys become equal.
    """
    known = secrets() if known is None else known
    if isinstance(data, str):
        return without_private(data, known=known)
    if isinstance(data, dict):
        clean = {without_private_parts(k, known): without_private_parts(value, known) for k, value in data.items()}
        if len(clean) < len(data):
            raise ValueError("keys that differ only in private parts")
        return clean
    if isinstance(data, list | tuple | set):
        return type(data)(without_private_parts(value, known) for value in data)
    return data


def one_line(error: object, *, limit: int = 300) -> str:
    """An error as one line without private parts."""
    text = " ".join(without_private(str(error)).split())
    return text[:limit] or type(error).__name__
