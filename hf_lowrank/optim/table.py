"""Which parameters an optimizer handles in which way, for the log."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor


def parameter_table(title: str, rows: Iterable[tuple[str, Tensor, str]]) -> str:
    """One line for all parameters that differ in the numbers of their names only.

    Args:
        title: of the first line.
        rows: each parameter's name, the parameter, and how it is handled.
    """
    alike: dict[tuple[str, str, str], int] = {}
    values: dict[str, int] = {}
    for name, param, how in rows:
        shape = " × ".join(map(str, param.shape))
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), shape, how)
        alike[key] = alike.get(key, 0) + 1
        kind = how.partition(",")[0]
        values[kind] = values.get(kind, 0) + param.numel()
    shapes = {key: f"{count} of {key[1]}" if count > 1 else key[1] for key, count in alike.items()}
    widths = max(len(name) for name, _, _ in alike), max(map(len, shapes.values()))
    lines = [f"{title}: " + ", ".join(f"{count:,} values with {kind}" for kind, count in values.items())]
    lines += [f"  {key[0]:<{widths[0]}}  {shape:<{widths[1]}}  {key[2]}" for key, shape in shapes.items()]
    return "\n".join(lines)
