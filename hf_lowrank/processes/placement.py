"""Where models lie while they are measured: whole on one device, over several of one process, or divided among many.

Metrics ask a placement for models, for the weights of checkpoints that are not evaluated, and to do work that is
free of models; they are the same for all placements.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from hf_lowrank.errors import UserError
from hf_lowrank.geometry import Team
from hf_lowrank.geometry.spectra import for_threads
from hf_lowrank.processes.faults import LostProcessError, SharedFaultError, reason_of
from hf_lowrank.processes.launch import LONGEST_WAIT
from hf_lowrank.runs.sharded_models import sharded_model
from hf_lowrank.runs.trajectory import Trajectory

T = TypeVar("T")
R = TypeVar("R")

# How long a process with a fault waits for the others to come to where they tell each other of faults.
ALONE_SECONDS = 60.0


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, tied ones once, without their graph."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class OneDevice:
    """Every model whole on one device.

    Attributes:
        team: the processes that hold models together; None: there is one.
        replicas: the processes that each hold the model, and divide sweeps among them; None: there is one.
    """

    team: Team | None = None
    replicas: Team | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def model(self, trajectory: Trajectory, step: int) -> Any:
        """A checkpoint's model, float32, eval, ready to be evaluated."""
        model: nn.Module = trajectory.model(step)
        return model.to(self.device)

    def dense_model(self, trajectory: Trajectory, step: int, model: Any) -> Any:
        """The plain architecture with dense weights of a checkpoint whose `model` is there; the same if it is that."""
        return model.to_dense().eval() if hasattr(model, "to_dense") else model

    def weights(self, trajectory: Trajectory, step: int) -> dict[str, Tensor]:
        """The parameters of a checkpoint's model by name."""
        return parameters_of(trajectory.model(step))

    def for_all(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`[work(item) for item in items]` for work that evaluates no model."""
        return for_threads(work, items)

    def agreed(self, work: Callable[[], R], *, apart: bool = False) -> R:
        """What `work` gives; a fault of one process is raised on all that hold models together.

        Args:
            apart: they do not wait for each other within `work`.
        """
        return work()

    def check_whole(self, what: str) -> None:
        """Raises UserError where models are not whole in this process, which `what` needs."""

    def let_go(self) -> None:
        """Frees what models that are no longer referred to have held."""


class SeveralDevices(OneDevice):
    """Every model over all accelerators of this process, as transformers' `device_map="auto"` spreads it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def model(self, trajectory: Trajectory, step: int) -> Any:
        return trajectory.model(step, device_map="auto")


class Together(OneDevice):
    """Processes that go through the same checkpoints together, and tell each other of faults.

    Attributes:
        crew: these processes.
    """

    crew: Team

    def for_all(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        own = self.agreed(lambda: for_threads(work, self.crew.own(items)), apart=True)
        return self.crew.in_order(self._together(lambda: self.crew.exchange(own)), len(items))

    def agreed(self, work: Callable[[], R], *, apart: bool = False) -> R:
        """What `work` gives; a fault of one process is raised on all of them.

        Args:
            apart: they do not wait for each other within `work`, so that who fails waits for the others however long
                theirs takes.

        Raises:
            SharedFaultError: `work` failed on some process.
            LostProcessError: a process is gone, or failed within what all do together, where the others wait for it.
        """
        result: Any = None
        reason, halfway, beside = None, False, None
        try:
            result = work()
        except (SharedFaultError, LostProcessError):
            raise
        except Exception as error:
            reason, halfway = reason_of(error), not isinstance(error, UserError)
            beside = getattr(error, "baseline", None)
        failed = torch.tensor(float(reason is not None))
        wait = [timedelta(seconds=ALONE_SECONDS)] if reason is not None and not apart else []
        sent: Any = dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self.crew.host, async_op=True)
        self._together(
            lambda: sent.wait(*wait), f"process {self.crew.rank} alone failed: {reason}" if reason else None
        )
        if failed:
            reasons, halfways = zip(*self._together(lambda: self.crew.exchange((reason, halfway))), strict=True)
            raise SharedFaultError(_common(reasons), halfway=any(halfways), baseline=beside)
        return result

    def _together(self, exchange: Callable[[], R], said: str | None = None) -> R:
        try:
            return exchange()
        except RuntimeError as error:
            how = _short(error)
            waited_in_vain = said is not None and "timed out" in how.lower()
            raise LostProcessError(said if waited_in_vain else f"another process is gone ({how})") from None


class Replicas(Together):
    """Every model whole in every process of a launch; they divide what a metric evaluates and decomposes.

    For a `with` statement, which ends the connections; after a fault they stay, since ending one waits for the others.

    Args:
        device: this process's.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # Apart from each other: who meets a fault tells the others where they do not exchange results.
        try:
            groups = [dist.new_group(backend="gloo", timeout=LONGEST_WAIT) for _ in range(2)]
        except RuntimeError as error:
            raise LostProcessError(f"another process is gone ({_short(error)})") from None
        self.replicas, self.crew = (Team(None, group) for group in groups)
        self._groups = groups

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._together(dist.barrier)  # on the launch's own group: what the others still exchange here is not cut
            for group in self._groups:
                dist.destroy_process_group(group)


class Shards(Together):
    """Every model divided among the processes of `accelerate launch` by FSDP2, each with its rows of every parameter.

    A process holds its part of the weights, twice while they are moved, and within a forward pass what is outside
    the blocks (embeddings, output head) and one or two blocks whole; while it loads, its part and one tensor.

    Args:
        device: this process's.
    """

    team: Team

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # Apart from the group that gathers weights: who meets a fault tells the others here.
        self.team = self.crew = Team(self.mesh.get_group(), dist.new_group(backend="gloo"))

    def model(self, trajectory: Trajectory, step: int) -> Any:
        return self._loaded(trajectory, step, dense=False)

    def dense_model(self, trajectory: Trajectory, step: int, model: Any) -> Any:
        return self._loaded(trajectory, step, dense=True) if trajectory.adapted else model

    def _loaded(self, trajectory: Trajectory, step: int, *, dense: bool) -> Any:
        self.let_go()
        return self.agreed(lambda: sharded_model(trajectory, step, self.mesh, self.device, dense=dense))

    def weights(self, trajectory: Trajectory, step: int) -> dict[str, Tensor]:
        return parameters_of(self.model(trajectory, step))

    def check_whole(self, what: str) -> None:
        raise UserError(f"{what} needs the whole model in one process; measure it without --sharded")

    def let_go(self) -> None:
        gc.collect()  # the hooks of FSDP2 refer to the modules that refer to them


def _short(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:200]


def _common(reasons: Sequence[str | None]) -> str:
    """The first reason, with the process's number where not all have one."""
    rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
    return reason if None not in reasons else f"process {rank}: {reason}"[:500]
