"""How far measuring has come, in evaluations of the loss, with the time that is left."""

from __future__ import annotations

from typing import Any


class Progress:
    """A tqdm bar over evaluations; shows nothing unless asked to."""

    def __init__(self, total: int, show: bool) -> None:
        self.total, self.show = total, show
        self.done = 0
        self.due = 0
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.show and self.total:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.total, unit="eval", delay=1.0, dynamic_ncols=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            if error == (None, None, None):
                self._to(self.total)
            self.bar.close()

    def start(self, what: str, evaluations: int) -> None:
        """A group of so many evaluations begins; whatever the one before left out counts as done."""
        self._to(self.due)
        self.due += evaluations
        if self.bar is not None:
            self.bar.set_description_str(what, refresh=False)

    def tick(self) -> None:
        """One evaluation is done."""
        self._to(min(self.done + 1, self.due))

    def _to(self, done: int) -> None:
        if self.bar is not None and done > self.done:
            self.bar.update(done - self.done)
        self.done = max(done, self.done)
