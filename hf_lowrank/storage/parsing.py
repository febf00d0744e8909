"""JSON and YAML as plain data: any invalid input raises the format's own error."""

import json
import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from hf_lowrank.errors import one_line

TOO_DEEP = "nested too deep"
TOO_LONG = "an integer of too many digits"
LONE_SURROGATE = "half of a surrogate pair, which is not a character"
# A surrogate as an escape in JSON, alone or in a pair.
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, except that excessive depth, overlong integers and lone surrogates, which cannot be written again,
    are a `json.JSONDecodeError` too.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError: invalid JSON of any kind.
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
        raise json.JSONDecodeError(LONE_SURROGATE, "", 0) from None
    except ValueError:  # Python's limit on the digits of an integer
        raise json.JSONDecodeError(TOO_LONG, "", 0) from None


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as in YAML 1.2, and a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, *, plain: bool = False) -> Any:
    """`text` as plain data.

    Raises:
        yaml.YAMLError: invalid YAML, or a value that cannot be constructed, e.g. 2001-99-99.
    """
    try:
        return yaml.safe_load(text) if plain else yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError(TOO_DEEP) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise yaml.YAMLError(f"a value cannot be read: {one_line(error, 200)}") from None


def parse_plain_yaml(text: str) -> Any:
    """`parse_yaml` as other programs read it: 1e-3 is a string, and the last of duplicate keys counts."""
    return parse_yaml(text, plain=True)


def dump_yaml(data: dict[str, Any]) -> str:
    """Plain data as YAML text that `parse_yaml` reads back unchanged."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def null_non_finite(value: Any) -> Any:
    """A JSON document with null in place of NaN and Inf."""
    if isinstance(value, dict):
        return {key: null_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
