"""Writes the types of the page's data, `hf_lowrank/report/schema.py`, as JSDoc for its scripts."""

import inspect
import types
import typing
from pathlib import Path
from typing import Any, NotRequired

from hf_lowrank.report import schema

TYPES = Path(schema.__file__).parent / "assets" / "types.js"
_PLAIN = {int: "number", float: "number", str: "string", bool: "boolean", type(None): "null", Any: "*"}


def _javascript(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return "|".join(dict.fromkeys(_javascript(arg) for arg in args))
    if origin is list:
        return f"Array<{_javascript(args[0])}>"
    if origin is dict:
        return f"Object<string, {_javascript(args[1])}>"
    return _PLAIN[hint] if hint in _PLAIN else str(hint.__name__)


def _property(name: str, hint: Any) -> str:
    optional = typing.get_origin(hint) is NotRequired
    kind = _javascript(typing.get_args(hint)[0] if optional else hint)
    return f" * @property {{{kind}}} {f'[{name}]' if optional else name}"


def jsdoc() -> str:
    """The types as JSDoc."""
    blocks = ["/* Written by `make format` from `schema.py`: what DATA holds. Comments only; not in the page. */\n"]
    for one in [entry for entry in vars(schema).values() if typing.is_typeddict(entry)]:
        text = " ".join((inspect.getdoc(one) or "").split())
        fields = [_property(name, hint) for name, hint in typing.get_type_hints(one, include_extras=True).items()]
        lines = ["/**", f" * {text}", f" * @typedef {{object}} {one.__name__}", *fields, " */", ""]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


if __name__ == "__main__":
    TYPES.write_text(jsdoc(), encoding="utf-8")
