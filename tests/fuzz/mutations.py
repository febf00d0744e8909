"""Inputs that go wrong: valid documents with a piece replaced, removed, doubled or torn, as hypothesis strategies."""

import copy
import json
import math

import yaml
from hypothesis import strategies as st

NUMBERS = [0, -1, 1, 2, 7, 2**31, 2**63, 10**30, -(10**9), 0.0, -0.5, 1e-300, 1e300, math.inf, -math.inf, math.nan]
TEXTS = [
    "",
    " ",
    "\x00",
    "../../outside",
    "/etc/passwd",
    "~",
    "null",
    "1e9",
    "a" * 5000,
    "\ud800",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "!!python/object/apply:os.system ['true']",
    "%s%n",
    "\u202e",
    "user/repo@step-1",
]

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(NUMBERS),
        st.integers(),
        st.floats(),
        st.sampled_from(TEXTS),
        st.text(max_size=12),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(tree, path=()):
    """Every path into a tree of mappings and lists, the root first."""
    found = [path]
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += places(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            found += places(value, (*path, index))
    return found


@st.composite
def mutated(draw, documents):
    """One of `documents` (plain data) with one to three pieces changed."""
    tree = copy.deepcopy(draw(st.sampled_from(documents)))
    known = [path[-1] for document in documents for path in places(document) if path and isinstance(path[-1], str)]
    leaves = [at(document, path) for document in documents for path in places(document)]
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(tree)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                tree = draw(values)
            continue
        parent = at(tree, path[:-1])
        action = draw(st.sampled_from(["replace", "replace", "swap", "remove", "add", "double"]))
        if action == "replace":
            parent[path[-1]] = draw(values)
        elif action == "swap":
            parent[path[-1]] = copy.deepcopy(draw(st.sampled_from(leaves)))
        elif action == "remove":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(draw(values) if action == "add" else copy.deepcopy(parent[path[-1]]))
        else:
            parent[draw(st.sampled_from(known) | st.sampled_from(TEXTS))] = draw(values)
    return tree


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


# What parsers trip over by themselves: depth, and values that their own constructors cannot make.
STUMBLING = [
    *(b"[" * 3000, b'{"a":' * 3000, b"1" * 5000, b"1e999", b"-Infinity"),
    *(b"2001-99-99", b"0x_", b"!!int ", b"!!timestamp x", b"!!binary \xc3\xa9", b"&a [*a]", b"%YAML 9.9\n"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\x85"),
]


@st.composite
def torn(draw, contents):
    """One of `contents` (bytes) with bytes flipped, zeroed, cut off, inserted or doubled."""
    data = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        action = draw(st.sampled_from(["flip", "zero", "cut", "insert", "stumble", "double", "head"]))
        length = draw(st.sampled_from([1, 2, 8, 64, 4096]))
        if action == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "zero":
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif action == "cut":
            del data[place:]
        elif action == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif action == "stumble":
            data[place:place] = draw(st.sampled_from(STUMBLING))
        elif action == "double":
            data[place:place] = data[place : place + length]
        else:
            data[: min(8, len(data))] = draw(st.binary(min_size=8, max_size=8))[: min(8, len(data))]
    return bytes(data)


def as_yaml(tree):
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


def as_json(tree):
    return json.dumps(tree).encode()
