"""Training under accelerate's FSDP2, which shards on accelerators only: here CPUs pose as accelerators."""

import os
import socket

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launched(rank, world, on_accelerators=True):
    """Sets what `accelerate launch` sets in a process; call it there, before anything of accelerate."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    if not on_accelerators:
        return
    begin = PartialState.__init__

    def pretend(self, *args, **kwargs):
        first = not PartialState._shared_state
        begin(self, *args, **kwargs)
        if first:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend
