"""The answer for the terminal: methods where there are several seeds of one, else runs; or all of it for JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_lowrank.claims.results import StudyResults
from hf_lowrank.formats import byte_size, console, loss_text, significant
from hf_lowrank.metrics import NOT_DENSE_MARK, NOT_DENSE_MEANING
from hf_lowrank.report.answer import Group, groups
from hf_lowrank.report.members import baseline_of, looks, sweep_of, with_distinct_methods
from hf_lowrank.report.standings import Standing
from hf_lowrank.report.views import sweep_view
from hf_lowrank.runs.records import load_runs

if TYPE_CHECKING:
    from rich.table import Table

# A terminal is narrow: the main columns only. In the order shown, each with its priority when not all fit.
_RUN_COLUMNS = {
    "run": 0,
    "method": 1,
    "seed": 3,
    "validation_loss": 2,
    "perplexity": 4,
    "downstream": 5,
    "tokens": 11,
    "train_seconds": 7,
    "peak_memory": 10,
    "optimizer_bytes": 6,
    "random_sharpness": 8,
    "weight_effective_rank": 9,
    "update_effective_rank": 12,
}
_METHOD_COLUMNS = {"method": 0, "perplexity": 1, "loss": 4, "downstream": 2, "memory": 3, "speed": 5, "distance": 6}
_HALF: dict[str, Callable[[float], str]] = {"loss": loss_text, "downstream": loss_text, "memory": byte_size}
_GAP = 3

Line = dict[str, str]


def terminal_table(runs: Iterable[Any], width: int | None = None, *, study: Path | None = None) -> Table:
    """The main numbers as a rich table, best loss first; runs that cannot be compared are separated by a rule.

    With several seeds of a method a row is a method, its values mean ± half the 95 % interval over seeds, a star where
    it is statistically tied with the best; else a row is a run. Columns that do not fit into `width` characters
    (None: this terminal's) are left out, the least important first. `study`: the folder whose members name the
    methods.

    Raises:
        UserError: a folder is not a run, has no checkpoint, or one of its files is damaged.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    named = with_distinct_methods(load_runs(runs), study)
    compared = groups(named, baseline_of(named, study), sweep_of(named, study))
    several = any(row.seeds > 1 for group in compared for row in group.standings.rows)
    order = _METHOD_COLUMNS if several else _RUN_COLUMNS
    headings = _method_headings(compared) if several else _run_headings(compared)
    lines: list[list[Line]] = [
        [{c.id: cell.text for c, cell in zip(g.columns, row, strict=True)} for row in g.cells] for g in compared
    ]
    lines = [_method_lines(group) for group in compared] if several else lines
    wanted = [name for name in order if name in headings]
    widths = {name: max(map(len, [*headings[name], *(line.get(name, "—") for part in lines for line in part)]))
              for name in wanted}  # fmt: skip
    wanted = _fitting(wanted, order, widths, console().width if width is None else width)
    table = Table(box=box.SIMPLE_HEAD, title=_title(compared), title_justify="left")
    marked = any(NOT_DENSE_MARK in line.get(name, "") for part in lines for line in part for name in wanted)
    table.caption, table.caption_justify = _caption(compared, several, marked), "left"
    for name in wanted:
        justify: Literal["left", "right"] = "left" if name in ("run", "method") else "right"
        table.add_column(Text("\n".join(headings[name])), justify=justify, overflow="fold")
    for part in lines:
        for line in part:
            table.add_row(*(Text(line.get(name, "—")) for name in wanted))
        table.add_section()
    return table


def answer_document(runs: Iterable[Any], *, study: Path | None = None) -> list[dict[str, Any]]:
    """The tables of methods and of runs with the sentences about them, for JSON; one entry per comparable group.

    Arguments and errors as for `terminal_table`.
    """
    named = with_distinct_methods(load_runs(runs), study)
    return [_group_document(group) for group in groups(named, baseline_of(named, study), sweep_of(named, study))]


def _group_document(group: Group) -> dict[str, Any]:
    table = group.standings
    numbers = ("value", "low", "high", "n", "rank", "tied", "certain", "note")
    methods = [
        {
            "method": row.method,
            "title": row.title,
            "seeds": row.seeds,
            **{
                one.id: {name: getattr(cell, name) for name in numbers}
                for one, cell in zip(table.criteria, row.standings, strict=True)
            },
        }
        for row in table.rows
    ]
    runs = [{c.id: cell.value for c, cell in zip(group.columns, row, strict=True)} for row in group.cells]
    return {
        "scale": group.scale,
        "evaluation_set": group.fingerprint,
        "caution": group.caution,
        "headline": group.headline,
        "basis": group.standfirst,
        "trade_off": group.trade,
        "baseline": table.baseline,
        "methods": methods,
        "runs": runs,
    }


def sweep_table(runs: Iterable[Any], study: Path) -> Table | None:
    """What the study's sweep tried for each member, and what won; None without a sweep."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    named = with_distinct_methods(load_runs(runs), study)
    sweep = sweep_of(named, study)
    if not sweep:
        return None
    table = Table(box=box.SIMPLE_HEAD, title="Tuning", title_justify="left")
    for name in ("Method", "Trials", "Values and ranges", "Winner", "Loss", "At an edge"):
        table.add_column(name, justify="right" if name == "Loss" else "left", overflow="fold")
    for line in sweep_view(StudyResults(sweep=sweep), looks(trial.member for trial in sweep)):
        cells = (line[key] for key in ("title", "trials", "ranges", "chosen", "loss", "edge"))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _run_headings(compared: Sequence[Group]) -> dict[str, list[str]]:
    known = {column.id: column for group in compared for column in group.columns if column.id in _RUN_COLUMNS}
    found = {name: [column.title, *([column.unit] if column.unit else [])] for name, column in known.items()}
    if len({run.method for group in compared for run in group.runs}) == sum(len(group.runs) for group in compared):
        found.pop("seed")
    return found


def _method_headings(compared: Sequence[Group]) -> dict[str, list[str]]:
    known = {criterion.id: criterion for group in compared for criterion in group.standings.criteria}
    units = {(one.id, one.unit) for group in compared for one in group.standings.criteria if one.unit}
    return {
        "method": ["Method"],
        **{name: [one.title, *sorted(unit for id_, unit in units if id_ == name)] for name, one in known.items()},
    }


def _method_lines(group: Group) -> list[Line]:
    table = group.standings
    return [
        {
            "method": row.title,
            **{one.id: _text(one.id, cell) for one, cell in zip(table.criteria, row.standings, strict=True)},
        }
        for row in table.rows
    ]


def _text(criterion: str, cell: Standing) -> str:
    """`26.5 ± 0.3 *`; the star's column is kept, so that the numbers line up."""
    if cell.value is None or cell.low is None or cell.high is None:
        return cell.text
    half = (cell.high - cell.low) / 2
    write = _HALF.get(criterion, lambda v: significant(v, 2))
    spread = f" ± {write(half)}" if half > 1e-6 * abs(cell.value) else ""
    return cell.text + spread + ((" *" if cell.tied else "  ") if cell.certain else "")


def _fitting(names: Sequence[str], order: dict[str, int], widths: dict[str, int], room: int) -> list[str]:
    """Those of `names` that fit side by side into `room` characters, the first two always."""
    chosen: set[str] = set()
    room -= _GAP  # the edges
    for name in sorted(names, key=order.__getitem__):
        room -= widths[name] + _GAP
        if room < 0 and len(chosen) >= 2:
            break
        chosen.add(name)
    return [name for name in names if name in chosen]


def _title(compared: Sequence[Group]) -> Any:
    from rich.text import Text

    if len(compared) == 1:
        return Text(compared[0].caution or compared[0].headline, style="bold")
    sets = len({group.fingerprint for group in compared})
    sizes = len({group.size for group in compared})
    parts = [f"{sets} evaluation sets"] if sets > 1 else []
    parts += [f"{sizes} sizes"] if sizes > 1 else []
    return Text(f"Runs of {' and '.join(parts)}; losses compare only within one", style="bold")


def _caption(compared: Sequence[Group], several: bool, marked: bool) -> Any:
    from rich.text import Text

    lines = []
    for group in compared:
        name = f"set {group.fingerprint[:12]}" if group.fingerprint else "no evaluation set"
        head = f"{group.scale}, {name}: " if len(compared) > 1 else ""
        head += f"{group.caution}. " if group.caution and len(compared) > 1 else ""
        head += f"{group.headline}." if group.caution or len(compared) > 1 else ""
        lines.append(" ".join(filter(None, [head, group.trade, group.standfirst])))
    if several:
        stars = any(cell.tied for group in compared for row in group.standings.rows for cell in row.standings)
        ties = " * statistically tied with the best." if stars else ""
        lines.append(f"± is half the 95 % interval over seeds.{ties}")
    if marked:
        lines.append(f"{NOT_DENSE_MARK} {NOT_DENSE_MEANING}.")
    return Text("\n".join(lines))
