"""The adapters' layers, in a custom loop and through accelerate, in one process and in several."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig

from hf_lowrank.adapters.relora import factors, merge_and_reinit, prune_moments
from hf_lowrank.methods import METHODS
from hf_lowrank.optim import FiraAdamW
from tests.distributed.processes import in_processes
from tests.distributed.sharded_training import free_port, launched
from tests.distributed.training import state_bytes, whole_weights

ADAPTERS = ("cola", "sltrain", "low_rank", "structured", "sst", "relora")
OWN = {"structured": {"blocks": 2, "guide_share": 0.0}}
BATCH = 8


def adapted(name):
    config = LlamaConfig(
        vocab_size=46,
        hidden_size=28,
        intermediate_size=42,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    method = METHODS[name]
    model = method.build_model(
        config, method.settings(**({"r": 4} if name in ADAPTERS else {}), **OWN.get(name, {})), 0
    )
    # Adam divides by the gradient's size: if that is only rounding error, float32 differs in the first digit.
    return model.double()


def step_loss(model, step, rank, world):
    generator = torch.Generator().manual_seed(step % 5)
    ids = torch.randint(0, 46, (BATCH, 12), generator=generator).chunk(world)[rank]
    return model(input_ids=ids, labels=ids).loss


def mean_over_processes(loss, world):
    loss = loss.detach().clone()
    if world > 1:
        dist.all_reduce(loss)
    return loss.item() / world


def trained(names, way, steps, rank=0, world=1):
    found = {}
    for name in names:
        model = adapted(name)
        if way == "fsdp":
            mesh = init_device_mesh("cpu", (world,))
            for block in model.lm.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        wrapped = DistributedDataParallel(model) if way == "ddp" else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, eps=1e-6)
        losses = []
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss = step_loss(wrapped, step, rank, world)
            loss.backward()
            optimizer.step()
            losses.append(mean_over_processes(loss, world))
            if name == "relora" and step % 4 == 0:
                merge_and_reinit(model, seed=0, step=step)
                prune_moments(optimizer, factors(model), seed=0, step=step)
        found[name] = {"losses": losses, "weights": whole_weights(model), "bytes": state_bytes(optimizer)}
    return found


@pytest.mark.parametrize(
    ("names", "worlds", "ways", "steps"),
    [
        pytest.param(ADAPTERS, (2,), ("fsdp",), 6, id="short"),
        pytest.param(ADAPTERS, (1, 2, 4), ("fsdp", "ddp"), 30, id="long", marks=pytest.mark.drill),
    ],
)
@pytest.mark.timeout(1800)
def test_several_processes_equal_one(tmp_path, names, worlds, ways, steps):
    alone = trained(names, "alone", steps)
    for way in ways:
        for world in worlds:
            ranks = in_processes(world, partial(trained, names, way, steps), tmp_path / f"{way}{world}")
            for name in names:
                for found in ranks:
                    assert found[name]["losses"] == pytest.approx(alone[name]["losses"], abs=1e-4), (name, way)
                    for key, weight in alone[name]["weights"].items():
                        assert torch.allclose(found[name]["weights"][key], weight, atol=1e-6), (name, way, key)
                        assert torch.equal(found[name]["weights"][key], ranks[0][name]["weights"][key])
                shares = [found[name]["bytes"] / alone[name]["bytes"] for found in ranks]
                assert max(shares) <= (0.3 if way == "fsdp" and world == 4 else 1), (name, shares)


def by_hand(folder, rank, world):
    """Six steps under accelerate with the state saved after three, then the last three again from that state."""
    launched(rank, world)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = adapted("full_rank")
    optimizer = FiraAdamW(model, lr=1e-2, rank=4, update_proj_gap=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
    # A schedule that accelerate prepares would step once per process.
    model, optimizer = accelerator.prepare(model, optimizer)

    def run(steps):
        losses = []
        for step in steps:
            loss = step_loss(model, step, rank, world)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(mean_over_processes(loss, world))
        return losses

    first = run(range(3))
    accelerator.save_state(str(folder))
    second = run(range(3, 6))
    accelerator.load_state(str(folder))
    return {"losses": first + second, "again": run(range(3, 6))}


def test_by_hand_with_accelerate(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    found = in_processes(
        2, partial(by_hand, tmp_path / "state"), tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()
    )
    model = adapted("full_rank")
    optimizer = FiraAdamW(model, lr=1e-2, rank=4, update_proj_gap=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        loss = step_loss(model, step, 0, 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    for of_rank in found:
        assert of_rank["losses"] == pytest.approx(losses, abs=1e-4)
        assert of_rank["again"] == of_rank["losses"][3:]
    assert "RANK" not in os.environ
