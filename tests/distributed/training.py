"""A small training whose result does not depend on the number of processes."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_lowrank.optim import FrugalAdamW, param_groups
from hf_lowrank.optim.muon import muon_groups
from hf_lowrank.optim.sharding import local_part
from hf_lowrank.storage.codes import coded_layer
from tests.optim.test_conformance import IN_FOUR_BITS, METHOD_CASES, ORTHOGONAL, in_full_precision, own_options

METHODS = {**METHOD_CASES, "frugal-blocks": partial(FrugalAdamW, subspace="blocks")}
SHARDED = [name for name in METHODS if name not in IN_FOUR_BITS]
BATCH = 16


class Net(nn.Module):
    """Tall, wide and square matrices, and a stack of experts.

    No number of rows is divisible by four; the six rows of the last layer leave one process of four with nothing.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(22, 30), nn.Linear(30, 22), nn.Linear(22, 30), nn.Linear(30, 30)])
        self.layers.append(nn.Linear(30, 6))
        self.experts = nn.Parameter(torch.randn(7, 6, 5) / 3)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        experts = torch.tanh(torch.einsum("bi,eio->beo", x, self.experts)).mean(1)
        return self.norm(x) + nn.functional.pad(experts, (0, 1))


def net(dtype):
    torch.manual_seed(0)
    return Net().to(dtype)


def groups_of(name, model):
    if name in ORTHOGONAL:
        return muon_groups(model, weight_decay=0.05)
    rank = 1 if name == "apollo-mini" else 4
    groups = param_groups(model, rank=rank, weight_decay=0.05)
    for group in groups:
        group["params"] = [(key, param) for key, param in group["params"] if key != "experts"]
    groups = [group for group in groups if group["params"]]
    return [*groups, {"params": [("experts", model.experts)], "rank": rank, "weight_decay": 0.05}]


def optimizer_of(name, model, **options):
    if name == "full-rank":
        return torch.optim.AdamW(model.parameters(), lr=1e-2)
    own = {"update_proj_gap": 5} if name == "frugal-blocks" else own_options(name, 4, 5)
    own = own if name in ORTHOGONAL else {key: value for key, value in own.items() if key != "rank"}
    return METHODS[name](groups_of(name, model), **{"lr": 1e-2, **own, **in_full_precision(name), **options})


def wrapped(model, way, world, mesh=None):
    """The model wrapped for `way` (alone, ddp, fsdp)."""
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp":
        mesh = mesh or init_device_mesh("cpu", (world,))
        fully_shard(model.layers[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def step_loss(model, step, rank=0, world=1):
    """Forward and backward over this process's share of a step's batch; the mean loss over all of it."""
    generator = torch.Generator().manual_seed(step % 6)
    x = torch.randn(BATCH, 22, generator=generator).to(next(model.parameters()).dtype).chunk(world)[rank]
    loss = (model(x) - x[:, :6].sin()).square().mean()
    loss.backward()
    loss = loss.detach()
    if world > 1:
        dist.all_reduce(loss)
    return loss.item() / world


def train(model, optimizer, steps, rank=0, world=1, start=0):
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        losses.append(step_loss(model, step, rank, world))
        optimizer.step()
    return losses


def whole_weights(model):
    found = {}
    for name, param in model.named_parameters():
        layer = coded_layer(param)
        whole = getattr(param, "full_tensor", lambda p=param: p)() if layer is None else layer.read_weight()
        found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def state_bytes(optimizer):
    """Bytes of optimizer state on this process."""
    return sum(
        local_part(value.detach()).numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
