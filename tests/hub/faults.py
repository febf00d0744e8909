"""What the loopback Hub is told to do wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

KINDS = (
    "refuse",  # the connection is closed before anything is read
    "delay",  # the answer comes late
    "cut-request",  # the connection is closed in the middle of the request's body
    "cut",  # done, and the connection is closed in the middle of the answer
    "lost",  # done, and answered by a 500
    "429",
    "500",
    "503",
    "forget",  # an upload is acknowledged and thrown away
    "reject",  # the token is refused
    "kill-before",  # the client's process is killed before the request is handled
    "kill-after",  # … and after
)


@dataclass
class FaultPlan:
    """Which request, counted from 0 since the plan was set, goes wrong in which way.

    Attributes:
        at: the fault of each request by its number.
        always: a fault of every other request, or None.
        delay: seconds of a "delay".
    """

    at: dict[int, str] = field(default_factory=dict)
    always: str | None = None
    delay: float = 0.02

    def of(self, number: int) -> str | None:
        return self.at.get(number, self.always)

    @classmethod
    def seeded(cls, seed: int, requests: int, kinds: tuple[str, ...] = KINDS) -> FaultPlan:
        """One to four faults at random requests of the first `requests`; every kind comes in turn over the seeds."""
        random_ = random.Random(seed)
        count = random_.randint(1, 4)
        places = random_.sample(range(requests), min(count, requests))
        chosen = [kinds[seed % len(kinds)], *(random_.choice(kinds) for _ in places[1:])]
        return cls(at=dict(zip(places, chosen, strict=True)))
