"""Work on checkpoints whose results are rows of tables, split over the processes of a launch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from hf_lowrank.errors import UserError
from hf_lowrank.processes.launch import Launch, LostProcessError
from hf_lowrank.processes.placement import Placement, Replicated

Row = TypeVar("Row")
Unit = TypeVar("Unit")


class Progress:
    """A tqdm bar over steps named `unit`; shows nothing unless `show`."""

    def __init__(self, unit: str, show: bool) -> None:
        self.unit, self.show = unit, show
        self.total = self.done = self.due = 0
        self.bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            if error == (None, None, None):
                self._to(self.total)
            self.bar.close()

    def expect(self, steps: int) -> None:
        """Opens the bar for `steps` steps in all."""
        self.total = steps
        if self.show and steps:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=steps, unit=self.unit, delay=1.0, dynamic_ncols=True)

    def start(self, description: str, steps: int) -> None:
        """Begins a block of `steps` steps; steps that the previous block skipped count as done."""
        self._to(self.due)
        self.due += steps
        if self.bar is not None:
            self.bar.set_description_str(description, refresh=False)

    def tick(self) -> None:
        """One step of the block is done."""
        self._to(min(self.done + 1, self.due))

    def _to(self, done: int) -> None:
        if self.bar is not None and done > self.done:
            self.bar.update(done - self.done)
        self.done = max(done, self.done)


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
        cost: of one unit, in steps of `progress`.
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
