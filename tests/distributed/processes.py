"""Several processes for one test, forked from this one with everything imported, that connect through a file."""

import os
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def in_processes(world, function, folder, **environment):
    """Runs `function(rank, world)` in `world` processes with a gloo group; returns what each returned."""
    folder.mkdir(parents=True, exist_ok=True)
    children = [_fork(rank, world, function, folder, environment) for rank in range(world)]
    failed = False
    while children:
        process, status = os.waitpid(-1, os.WNOHANG) if failed else os.waitpid(children[0], 0)
        if process in children:
            children.remove(process)
            failed = failed or status != 0
        elif failed:
            time.sleep(0.2)
    assert not failed, f"a process of {world} failed; its traceback is above"
    return [torch.load(folder / f"of{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def _fork(rank, world, function, folder, environment):
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.environ.update(environment)
        torch.set_num_threads(1)
        meet = f"file://{folder}/meet-{world}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timedelta(seconds=120))
        torch.save(function(rank, world), folder / f"of{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
