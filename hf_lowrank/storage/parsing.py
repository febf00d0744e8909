"""Text from files as plain data: whatever is wrong with it is the format's own error."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
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


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as in YAML 1.2, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """`text` as plain data; raises yaml.YAMLError."""
    with faults_are_yaml():
        return yaml.load(text, Loader=_Loader)


def dump_yaml(data: dict[str, Any]) -> str:
    """Plain data as YAML text that `parse_yaml` reads back equal."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
