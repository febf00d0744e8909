"""Where models are placed: on one device, over the devices of one process, or replicated or sharded over processes.

Metrics get models and the weights of other checkpoints from a placement, and let it map work that needs no model over
threads or processes; they do not know which placement it is.
"""

import gc
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.geometry import ProcessGroup
from hf_lowrank.geometry.spectra import map_threads
from hf_lowrank.processes.launch import LONGEST_WAIT, CollectiveError, LostProcessError, error_line
from hf_lowrank.runs.sharded_models import sharded_model
from hf_lowrank.runs.trajectory import Trajectory

T = TypeVar("T")
R = TypeVar("R")

# How long a process with an error waits for the others to reach the point where errors are exchanged.
PEER_TIMEOUT_SECONDS = 60.0


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Detached parameters by name, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class Placement:
    """Every model whole on one device of one process.

    Attributes:
        shards: the processes that hold shards of every model; None: models are whole.
        replicas: the processes that hold a replica of every model each and split sweeps; None: there is one.
    """

    shards: ProcessGroup | None = None
    replicas: ProcessGroup | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def model(self, trajectory: Trajectory, step: int, *, dense: bool = False) -> Any:
        """A checkpoint's model in float32 and eval mode; `dense`: in its base architecture, with dense weights."""
        model: nn.Module = trajectory.dense_model(step) if dense else trajectory.model(step)
        return model.to(self.device)

    def weights(self, trajectory: Trajectory, step: int, *, dense: bool = False) -> dict[str, Tensor]:
        """The parameters of a checkpoint's model by name."""
        return parameters_of(trajectory.dense_model(step) if dense else trajectory.model(step))

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`[work(item) for item in items]` for work that evaluates no model."""
        return map_threads(work, items)

    def synchronized(self, work: Callable[[], R], *, independent: bool = False) -> R:
        """The result of `work`; an error in one process is raised in all that work jointly.

        Args:
            independent: the processes do not wait for each other within `work`, so that a process with an error waits
                as long as the others need; else it gives up after a minute, since they may be waiting for it.

        Raises:
            CollectiveError: `work` failed in some process.
            LostProcessError: a process is gone, or failed where the others wait for it.
        """
        return work()

    def require_whole_models(self, purpose: str) -> None:
        """Raises UserError where models are sharded, for a purpose that needs whole ones."""

    def free_memory(self) -> None:
        """Frees what models that are no longer referred to still hold."""


class DeviceMap(Placement):
    """Every model over all accelerators of this process, as transformers' `device_map="auto"` places it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def model(self, trajectory: Trajectory, step: int, *, dense: bool = False) -> Any:
        return (trajectory.dense_model if dense else trajectory.model)(step, device_map="auto")


class Joint(Placement):
    """Processes, `peers`, that work on the same checkpoints jointly and exchange their errors."""

    peers: ProcessGroup

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        own = self.synchronized(lambda: map_threads(work, self.peers.strided(items)), independent=True)
        return self.peers.interleave(self._connected(lambda: self.peers.all_gather(own)), len(items))

    def synchronized(self, work: Callable[[], R], *, independent: bool = False) -> R:
        result: Any = None
        own: Exception | None = None
        try:
            result = work()
        except (CollectiveError, LostProcessError):
            raise
        except Exception as error:
            own = error
        reason = None if own is None else error_line(own)
        failed = torch.tensor(float(own is not None))
        timeout = [timedelta(seconds=PEER_TIMEOUT_SECONDS)] if own is not None and not independent else []
        pending: Any = dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self.peers.cpu_group, async_op=True)
        self._connected(
            lambda: pending.wait(*timeout), f"only process {self.peers.rank} failed: {reason}" if reason else None
        )
        if failed:
            unexpected = own is not None and not isinstance(own, UserError)
            reasons, flags = zip(*self._connected(lambda: self.peers.all_gather((reason, unexpected))), strict=True)
            first = next(rank for rank, reason in enumerate(reasons) if reason is not None)
            # Without the process's number if all processes failed.
            message = f"process {first}: {reasons[first]}"[:500] if None in reasons else reasons[first]
            raise CollectiveError(message, unexpected=any(flags), own=own)
        return result

    def _connected(self, exchange: Callable[[], R], on_timeout: str | None = None) -> R:
        """The result of an exchange, whose failure means that a process is gone, or after a timeout `on_timeout`."""
        try:
            return exchange()
        except RuntimeError as error:
            if on_timeout is not None and "timed out" in one_line(error).lower():
                raise LostProcessError(on_timeout) from None
            raise LostProcessError(f"another process is gone ({one_line(error, 200)})") from None


class Replicated(Joint):
    """Every model whole in every process of a launch; they split what a metric evaluates and decomposes.

    A context manager that closes the connections. After an error they stay open, since closing waits for the others.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # Two groups, so that a process reports an error outside the group in which the others exchange results.
        new_group = partial(dist.new_group, backend="gloo", timeout=LONGEST_WAIT)
        self._groups = self._connected(lambda: [new_group(), new_group()])
        self.replicas, self.peers = (ProcessGroup(None, group) for group in self._groups)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._connected(dist.barrier)  # in the launch's own group: exchanges in the groups here may still run
            for group in self._groups:
                dist.destroy_process_group(group)


class RowSharded(Joint):
    """Every model sharded by FSDP2 over the processes of a launch, each with its rows of every parameter.

    A process holds its shard of the weights, twice while they are perturbed, and within a forward pass all of what is
    outside the blocks (embeddings, output head) and one or two whole blocks; while loading, its shard and one tensor.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # A CPU group of its own, so that a process reports an error outside the group that gathers weights.
        self.shards = self.peers = ProcessGroup(self.mesh.get_group(), dist.new_group(backend="gloo"))

    def model(self, trajectory: Trajectory, step: int, *, dense: bool = False) -> Any:
        self.free_memory()
        model = self.synchronized(lambda: sharded_model(trajectory, step, self.mesh, self.device, dense=dense))
        trajectory.require_causal(model, step)
        return model

    def weights(self, trajectory: Trajectory, step: int, *, dense: bool = False) -> dict[str, Tensor]:
        return parameters_of(self.model(trajectory, step, dense=dense))

    def require_whole_models(self, purpose: str) -> None:
        raise UserError(f"{purpose} needs the whole model in one process; measure it without --sharded")

    def free_memory(self) -> None:
        gc.collect()  # FSDP2's hooks form reference cycles with the modules
