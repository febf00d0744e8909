"""Work on checkpoints whose results are rows of tables, split over the processes of a launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from hf_lowrank.errors import UserError
from hf_lowrank.processes.faults import LostProcessError
from hf_lowrank.processes.launch import Launch
from hf_lowrank.processes.placement import Placement, Replicated
from hf_lowrank.processes.progress import Progress

Row = TypeVar("Row")
Unit = TypeVar("Unit")


@dataclass(frozen=True)
class SharedTables(Generic[Row]):
    """Tables to which the processes of a launch append rows.

    Each process appends to part files next to the tables; the first process merges them, before work starts those
    that a killed launch left, and at the end. Sharded models have one writer, which appends to the tables themselves.

    Attributes:
        files: the tables, which may name one several times.
        read: a file's rows; a missing file has none.
        append: appends rows to a file.
    """

    launch: Launch
    files: Sequence[Path]
    read: Callable[[Path], list[Row]]
    append: Callable[[Path, Sequence[Row]], None]

    def part(self, file: Path) -> Path:
        """Where this process appends rows of a table."""
        if self.launch.count == 1 or self.launch.sharded:
            return file
        return file.with_name(f".{file.stem}-{self.launch.index}.part.jsonl")

    def merge(self) -> None:
        """Waits for all processes, then moves the rows of all part files into their tables."""
        self.launch.wait_for_all()
        if self.launch.is_first:
            for file in dict.fromkeys(self.files):
                for part in sorted(file.parent.glob(f".{file.stem}-*.part.jsonl")):
                    self.append(file, self.read(part))
                    part.unlink()
        self.launch.wait_for_all()

    def rows(self) -> list[Row]:
        """The rows of all tables, in the order of `files`."""
        return [row for file in self.files for row in self.read(file)]


def run_units(
    units: Sequence[Unit],
    work: Callable[[Sequence[Unit], Placement, bool], None],
    tables: SharedTables[Row],
    placement: Placement,
    progress: Progress,
    *,
    cost: Callable[[Unit], int],
    activity: str,
) -> None:
    """Splits units over the processes of a launch and merges their rows.

    Args:
        units: the same in all processes.
        work: does some units. It gets where models are placed, and whether this process writes the rows.
        placement: of models that are sharded, or that a process evaluates by itself.
        progress: gets the cost of all units of this process as its number of steps.
        cost: of one unit.
        activity: what is done, for an error.

    Raises:
        UserError: a process was lost; finished rows are saved.
    """
    launch = tables.launch
    own, joint = launch.split(units, lambda unit: 1 + cost(unit))
    progress.expect(sum(map(cost, own)) + sum(map(cost, joint)))
    try:
        if launch.sharded:
            work(joint, placement, launch.is_first)
        else:
            work(own, placement, True)
            if joint:
                # All wait here for the slowest process, which may take hours; joint work proceeds in step.
                tables.merge()
                with Replicated(launch.device) as replicated:
                    work(joint, replicated, launch.is_first)
    except LostProcessError as error:
        raise UserError(
            f"{activity} with several processes stopped: {error}; finished rows are saved, rerun to resume"
        ) from None
    tables.merge()
