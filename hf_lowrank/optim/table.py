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
    widths = [max(len(key[column]) for key in alike) for column in (0, 1)]
    lines = [f"{title}: " + ", ".join(f"{count:,} values with {kind}" for kind, count in values.items())]
    for (name, shape, how), count in alike.items():
        times = f"{count} × " if count > 1 else ""
        lines.append(f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {times}{how}")
    return "\n".join(lines)
