"""A progress bar whose steps come in blocks of known size."""

from __future__ import annotations

from typing import Any


class Progress:
    """A tqdm bar over steps named `unit`; shows nothing unless `show`."""

    def __init__(self, unit: str, show: bool) -> None:
        self.unit, self.show = unit, show
        self.total = self.done = self.due = 0
        self.bar: Any = None

    def __enter__(self) -> Progress:
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
