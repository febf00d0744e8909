"""The answer as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hf_lowrank.report.answer import Group, groups
from hf_lowrank.report.runs import load_runs

if TYPE_CHECKING:
    from rich.table import Table

# A terminal is narrow: what answers the question, not all that was measured.
_COLUMNS = (
    "run",
    "method",
    "seed",
    "validation_loss",
    "perplexity",
    "tokens",
    "train_seconds",
    "peak_memory",
    "optimizer_bytes",
    "random_sharpness",
    "weight_effective_rank",
    "update_effective_rank",
)


def terminal_table(runs: Iterable[Any]) -> Table:
    """The runs' main numbers as a rich table, best loss first; evaluation sets are kept apart by a rule.

    Raises:
        UserError: a folder is no run, has no checkpoint, or one of its files is damaged.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    compared = groups(load_runs(runs))
    known = {column.id: column for group in compared for column in group.columns}
    wanted = [known[name] for name in _COLUMNS if name in known]
    if len({run.method for group in compared for run in group.runs}) == sum(len(group.runs) for group in compared):
        wanted = [column for column in wanted if column.id != "seed"]
    table = Table(box=box.SIMPLE_HEAD, title=_title(compared), title_justify="left", caption=_caption(compared))
    table.caption_justify = "left"
    for column in wanted:
        heading = column.title + (f"\n{column.unit}" if column.unit else "")
        table.add_column(Text(heading), justify="left" if column.kind == "text" else "right", overflow="fold")
    for group in compared:
        places = {column.id: place for place, column in enumerate(group.columns)}
        for row in group.cells:
            table.add_row(*(Text(row[places[c.id]].text if c.id in places else "—") for c in wanted))
        table.add_section()
    return table


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
