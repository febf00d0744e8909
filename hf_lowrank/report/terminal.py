"""The answer as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from hf_lowrank.report.answer import Group, groups
from hf_lowrank.report.runs import load_runs

if TYPE_CHECKING:
    from rich.table import Table

# A terminal is narrow: what answers the question, not all that was measured. In the order shown, each with its
# place in line when not all fit.
_COLUMNS = {
    "run": 0,
    "method": 1,
    "seed": 3,
    "validation_loss": 2,
    "perplexity": 4,
    "tokens": 10,
    "train_seconds": 6,
    "peak_memory": 9,
    "optimizer_bytes": 5,
    "random_sharpness": 7,
    "weight_effective_rank": 8,
    "update_effective_rank": 11,
}
_GAP = 3


def terminal_table(runs: Iterable[Any], width: int | None = None) -> Table:
    """The runs' main numbers as a rich table, best loss first; evaluation sets are kept apart by a rule.

    Columns that do not fit into `width` characters (None: this terminal's) are left out, the least telling first.

    Raises:
        UserError: a folder is no run, has no checkpoint, or one of its files is damaged.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    compared = groups(load_runs(runs))
    known = {column.id: column for group in compared for column in group.columns}
    wanted = [name for name in _COLUMNS if name in known]
    if len({run.method for group in compared for run in group.runs}) == sum(len(group.runs) for group in compared):
        wanted = [name for name in wanted if name != "seed"]
    headings = {name: [known[name].title, *([known[name].unit] if known[name].unit else [])] for name in wanted}
    widths = {name: max(map(len, [*headings[name], *_texts(compared, name)])) for name in wanted}
    wanted = _fitting(wanted, widths, Console().width if width is None else width)
    table = Table(box=box.SIMPLE_HEAD, title=_title(compared), title_justify="left", caption=_caption(compared))
    table.caption_justify = "left"
    for name in wanted:
        justify: Literal["left", "right"] = "left" if known[name].kind == "text" else "right"
        table.add_column(Text("\n".join(headings[name])), justify=justify, overflow="fold")
    for group in compared:
        for row in zip(*(_texts([group], name) for name in wanted), strict=True):
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def _texts(compared: list[Group], name: str) -> list[str]:
    texts = []
    for group in compared:
        place = next((place for place, column in enumerate(group.columns) if column.id == name), None)
        texts += ["—" if place is None else row[place].text for row in group.cells]
    return texts


def _fitting(names: list[str], widths: dict[str, int], room: int) -> list[str]:
    """Those of `names` that fit side by side into `room` characters, the first two always."""
    chosen: set[str] = set()
    room -= _GAP  # the edges
    for name in sorted(names, key=_COLUMNS.__getitem__):
        room -= widths[name] + _GAP
        if room < 0 and len(chosen) >= 2:
            break
        chosen.add(name)
    return [name for name in names if name in chosen]


def _title(compared: list[Group]) -> Any:
    from rich.text import Text

    if len(compared) > 1:
        return Text(f"Runs on {len(compared)} evaluation sets; losses compare only within one", style="bold")
    return Text(compared[0].headline, style="bold")


def _caption(compared: list[Group]) -> Any:
    from rich.text import Text

    if len(compared) == 1:
        return Text(compared[0].standfirst)
    lines = [
        f"{'set ' + group.fingerprint[:12] if group.fingerprint else 'no evaluation set'}: {group.headline}. "
        f"{group.standfirst}"
        for group in compared
    ]
    return Text("\n".join(lines))
