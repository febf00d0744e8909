"""Started in separate processes by the tests of killed and of parallel runs.

optim_worker.py train FOLDER STEPS     every method in lockstep, a checkpoint after each step; resumes from it
optim_worker.py parallel FOLDER RANK WORLD
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from test_conformance import METHOD_CASES, ORTHOGONAL, PROJECTED, in_full_precision, loss_of, make, net, weights
from torch import nn

from hf_lowrank.optim.subspaces import SUBSPACES
from hf_lowrank.storage.files import whole_file

HARD = {"state_dtype": "float32", "stochastic_rounding": True, "layerwise": True}


class Wide(nn.Module):
    """Matrices that are large enough for eight-bit states."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 1536), nn.Linear(1536, 6)])

    def forward(self, x):
        return self.layers[1](torch.tanh(self.layers[0](x)))


def wide():
    torch.manual_seed(0)
    return Wide()


def runs():
    """Every method plainly, in its hardest setting, and with eight-bit states: (model, optimizer) by name."""
    found = {}
    for name in METHOD_CASES:
        for label, build, options in (
            ("plain", net, {}),
            ("hard", partial(net, torch.bfloat16), HARD),
            ("8bit", wide, {"state_dtype": "8bit"}),
        ):
            model = build()
            rank = {} if label != "8bit" or name in {*ORTHOGONAL, "apollo-mini"} else {"rank": 4}
            found[f"{name} {label}"] = (model, make(name, model, **rank, **options))
    return found


def train(folder, steps):
    torch.manual_seed(0)
    all_runs = runs()
    file = folder / "checkpoint.pt"
    done = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        done = saved["step"]
        for name, (model, optimizer) in all_runs.items():
            model.load_state_dict(saved[name]["model"])
            optimizer.load_state_dict(saved[name]["optimizer"])
    for step in range(done, steps):
        for model, optimizer in all_runs.values():
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        with whole_file(file) as temporary:
            states = {
                name: {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                for name, (model, optimizer) in all_runs.items()
            }
            torch.save({"step": step + 1, **states}, temporary)
        print(step + 1, flush=True)


def parallel(folder, rank, world):
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    if rank:
        # Stands for another machine, whose decompositions have other signs.
        for key, choose in SUBSPACES.items():
            flip = -1 if key != "columns" else 1
            SUBSPACES[key] = lambda request, choose=choose, flip=flip: flip * choose(request)
    ends = {}
    for name in METHOD_CASES:
        model = net(torch.float64)
        optimizer = make(name, model, **in_full_precision(name))
        wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        for step in range(9):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 12, generator=generator, dtype=torch.float64)
            share = x.chunk(world)[rank]
            (wrapped(share) - share[:, :6].sin()).square().mean().backward()
            optimizer.step()
        ends[name] = weights(model)
    torch.save(ends, folder / f"rank{rank}of{world}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder, *numbers = sys.argv[1:]
    assert set(PROJECTED) < set(METHOD_CASES)
    {"train": train, "parallel": parallel}[mode](Path(folder), *map(int, numbers))
