"""Titles of methods and their order in tables, also of names that are not registered."""

from __future__ import annotations

from collections.abc import Iterable

from hf_lowrank.methods import METHODS, Method


def registered(name: str) -> Method | None:
    """The entry of a method; None for a name from elsewhere."""
    try:
        if name in METHODS:
            return METHODS[name]
    except ImportError:  # a broken plug-in must not keep a report from being written
        return None
    return None


def method_order(name: str) -> tuple[int, str]:
    """A sort key that follows the order of METHODS, other names last."""
    return (list(METHODS).index(name), name) if registered(name) else (len(METHODS), name)


def in_order(methods: Iterable[str]) -> list[str]:
    """The distinct names in the order of tables and legends."""
    return sorted(set(methods), key=method_order)


def titles(methods: Iterable[str]) -> dict[str, str]:
    """The title of each of `methods`, in the order of tables and legends."""
    return {name: entry.title if (entry := registered(name)) else name for name in in_order(methods)}
