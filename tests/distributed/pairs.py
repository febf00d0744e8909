"""One command in two processes, as under `accelerate launch`; one of them may be killed while they work."""

import multiprocessing
import os
import signal
import socket
import time

import torch
from accelerate import PartialState

# Forked children start at once, with everything imported.
FORK = multiprocessing.get_context("fork")
PATIENCE = 120


def _process(command, rank, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    # A fork makes torch's thread pool anew at its first use: here, before threads that load a model race for it.
    torch.set_num_threads(1)
    PartialState._reset_state()
    PartialState(cpu=True)
    command()


def _started(command):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [FORK.Process(target=_process, args=(command, rank, port)) for rank in range(2)]
    for child in children:
        child.start()
    return children


def in_two(command):
    """Runs `command` in two processes; both must succeed."""
    children = _started(command)
    for child in children:
        child.join(PATIENCE)
        assert child.exitcode == 0


def lose_one(command, lost, begun):
    """Runs `command` in two processes, kills number `lost` once `begun()`, and returns the other's exit code."""
    children = _started(command)
    deadline = time.monotonic() + PATIENCE
    while not begun() and all(child.is_alive() for child in children) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert begun()
    assert children[lost].is_alive()
    os.kill(children[lost].pid, signal.SIGKILL)
    for child in children:
        child.join(PATIENCE)
    return children[1 - lost].exitcode
