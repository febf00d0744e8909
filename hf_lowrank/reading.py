"""Text from files as plain data: whatever is wrong with it is the format's own error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

TOO_DEEP = "nested too deep"
TOO_LONG = "an integer of too many digits"
NO_CHARACTER = "half of a surrogate pair, which is no character"
# As JSON writes a half of a pair; whole pairs match too.
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, to which depth, integers that Python cannot hold and text that cannot be written again are a
    `json.JSONDecodeError` like all else.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError: what is no JSON, in whatever way.
    """
    try:
        value = json.loads(text)
        if SURROGATE.search(text if isinstance(text, bytes) else text.encode()):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise json.JSONDecodeError(TOO_DEEP, "", 0) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except UnicodeEncodeError:
        raise json.JSONDecodeError(NO_CHARACTER, "", 0) from None
    except ValueError:  # Python's limit on the digits of an integer
        raise json.JSONDecodeError(TOO_LONG, "", 0) from None


def parse_plain_yaml(text: str) -> Any:
    """`yaml.safe_load`, to which values that cannot be made are a `yaml.YAMLError` like all else."""
    with faults_are_yaml():
        return yaml.safe_load(text)


@contextmanager
def faults_are_yaml() -> Iterator[None]:
    """What PyYAML's constructors raise of their own, as for `2001-99-99`, becomes a `yaml.YAMLError`."""
    try:
        yield
    except RecursionError:
        raise yaml.YAMLError(TOO_DEEP) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise yaml.YAMLError(f"a value cannot be read: {said}") from None
