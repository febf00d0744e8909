"""What would silently train something else is refused by name."""

import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_lowrank.errors import UserError
from hf_lowrank.optim import GaLoreAdamW, MuonAdamW, param_groups
from tests.distributed.processes import in_processes
from tests.distributed.training import net, optimizer_of, step_loss, wrapped


def message_of(function):
    with pytest.raises(UserError) as error:
        function()
    return str(error.value)


def fsdp1(use_orig_params, rank, world):
    """The errors for a model that FSDP1 wraps, with optimizers made after and before."""
    model = net(torch.float32)
    early = GaLoreAdamW(model, rank=2)
    inner = model
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    step_loss(wrapped, 0)
    return [
        message_of(lambda: GaLoreAdamW(wrapped, rank=2)),
        message_of(lambda: param_groups(inner, rank=2)),
        message_of(early.step) if use_orig_params else "",
        message_of(lambda: MuonAdamW([{"params": [p], "muon": True} for p in wrapped.parameters() if p.numel()])),
    ]


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1(tmp_path, use_orig_params):
    for message in in_processes(2, partial(fsdp1, use_orig_params), tmp_path)[0]:
        assert not message or ("FSDP1" in message and "FSDP2" in message), message


def test_deepspeed():
    model = net(torch.float32)
    optimizer = GaLoreAdamW(model, rank=2)
    # ZeRO-1 and ZeRO-2 replace a group's weights by one flat shard in float32.
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.cat([param.detach().flatten() for param in group["params"]]))]
    assert "flattened by FSDP1 or DeepSpeed ZeRO; use FSDP2" in message_of(optimizer.step)
    for param in model.parameters():  # ZeRO-3 marks the parameters that it partitions
        param.ds_id = 0
    assert "DeepSpeed ZeRO-3; use FSDP2" in message_of(lambda: GaLoreAdamW(model, rank=2))


def sharded_refusals(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    sharded = partial(wrapped, way="fsdp", world=world, mesh=mesh)
    by_columns = nn.Parameter(distribute_tensor(torch.zeros(8, 6), mesh, [Shard(1)]))

    def stepped_before():
        model = net(torch.float32)
        optimizer = optimizer_of("galore", model)
        step_loss(model, 0)
        optimizer.step()
        return optimizer, sharded(model)

    def switched(optimizer, model):
        shards = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [shards[name] for name in group["param_names"]]
        optimizer.step()

    layerwise = net(torch.float32)
    inside = GaLoreAdamW(layerwise, rank=2, layerwise=True) if world == 1 else None
    found = {
        "layerwise": message_of(lambda: switched(inside, sharded(layerwise))) if inside else "layerwise=True",
        "layerwise later": message_of(lambda: GaLoreAdamW(sharded(net(torch.float32)), rank=2, layerwise=True)),
        "8bit": message_of(lambda: GaLoreAdamW(sharded(net(torch.float32)), rank=2, state_dtype="8bit")),
        "4bit": message_of(lambda: GaLoreAdamW(sharded(net(torch.float32)), rank=2, projection_bits=4)),
        "columns": message_of(lambda: GaLoreAdamW([("weight", by_columns)], rank=2)),
        "muon columns": message_of(lambda: MuonAdamW([{"params": [("weight", by_columns)], "muon": True}])),
        "stepped": message_of(lambda: switched(*stepped_before())),
        "nothing": message_of(lambda: param_groups(sharded(net(torch.float32)), rank=2, target_modules=["absent"])),
        "rank": message_of(lambda: GaLoreAdamW(sharded(net(torch.float32)), rank=7)),
    }
    model = sharded(net(torch.float32))
    optimizer = GaLoreAdamW(model, rank=2)
    for group in optimizer.param_groups:
        if group["rank"] is not None:
            group["params"], group["param_names"] = [], []
    return {**found, "none left": message_of(optimizer.step)}


@pytest.mark.parametrize("world", [1, 2])
def test_sharded_parameters(tmp_path, world):
    found = in_processes(world, sharded_refusals, tmp_path)[0]
    for key, part in {
        "layerwise": "layerwise",
        "layerwise later": "layerwise",
        "8bit": "state_dtype must be parameter or float32 for sharded parameters, got '8bit'",
        "4bit": "projection_bits must be None for sharded parameters, got 4 for layers.0.weight; a group",
        "columns": "weight must be sharded along its first dimension alone",
        "muon columns": "weight must be sharded along its first dimension alone",
        "stepped": "made steps before its parameters were sharded",
        "nothing": "'absent' matches no linear module",
        "rank": r"rank must be from 1 to 6 for layers.4.weight of shape (6, 30), got 7",
        "none left": "has no target matrix among its parameters",
    }.items():
        assert part in found[key], (key, found[key])


def test_the_table_is_logged_once(caplog):
    model = net(torch.float32)
    optimizer = GaLoreAdamW(model, rank=2)
    with caplog.at_level(logging.INFO, logger="hf_lowrank"):
        for step in range(3):
            step_loss(model, step)
            optimizer.step()
    (record,) = caplog.records
    lines = record.getMessage().splitlines()
    assert lines[0] == "GaLoreAdamW: 3,060 values with rank 2, 340 values with AdamW"
    assert lines[1].split() == ["layers.*.weight", "2", "of", "30", "×", "22", "rank", "2,", "right,", "randomized"]
    assert sum("AdamW" in line for line in lines[1:]) == len(lines) - 1 - sum("rank 2" in line for line in lines[1:])


def skipped(rank, world):
    """A gradient that is non-finite on one process only: no process steps."""
    model = wrapped(net(torch.float32), "fsdp", world)
    optimizer = optimizer_of("fira", model)
    step_loss(model, 0, rank, world)
    weight = model.layers[1].weight
    assert isinstance(weight, DTensor)
    before = weight.full_tensor().clone()
    if rank == 1:
        weight.grad.to_local()[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"layers\.1\.weight is not finite"):
        optimizer.step()
    return torch.equal(weight.full_tensor(), before)


def test_a_gradient_that_is_non_finite_on_one_process_is_skipped_on_all(tmp_path):
    assert in_processes(2, skipped, tmp_path) == [True, True]
