"""Two processes that train together; one of them may be killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.sharded_training import free_port, launched
from tests.drill.faults import Strike
from tests.drill.processes import Child, Ended, Job

WORLD = 2


def train_in_ranks(recipe: Path, place: Path, cache: Path, strike: Strike | None = None) -> list[Ended]:
    """Trains under DDP in two processes; with a strike the second is killed while the first waits for it."""
    port = free_port()
    children = [
        Child(_job(rank, port, recipe, place, cache, strike if rank == 1 else None), place) for rank in range(WORLD)
    ]
    ended = [child.wait() for child in reversed(children)]
    return [end for end in reversed(ended) if end is not None]


def _job(rank: int, port: str, recipe: Path, place: Path, cache: Path, strike: Strike | None) -> Job:
    def job() -> int:
        import os
        import sys

        from hf_lowrank.errors import UserError
        from hf_lowrank.training import load_recipe, pretrain
        from tests.drill.world import settle

        settle(cache)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true")
        launched(rank, WORLD, on_accelerators=False)
        if strike is not None:
            _dies(strike)
        try:
            pretrain(load_recipe(recipe), place / "run")
        except UserError as error:
            sys.stderr.write(f"hf-lowrank: {error}\n")
            return 2
        return 0

    return job


def _dies(strike: Strike) -> None:
    """Kills this process during a step, when the other is summing gradients or will wait for this one's."""
    import os
    import signal
    import time

    from transformers import Trainer

    compute, calls, at = Trainer.compute_loss, 0, 1 + int(strike.at * 8)

    def dying(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            time.sleep(strike.delay)
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(self, *arguments, **options)

    Trainer.compute_loss = dying
