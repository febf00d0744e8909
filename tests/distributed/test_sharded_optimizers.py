"""DDP and FSDP2 against one process at the same global batch, and checkpoints that change the number of processes."""

from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from hf_lowrank.optim.sharding import local_part
from hf_lowrank.optim.subspaces import SUBSPACES
from tests.distributed.processes import in_processes
from tests.distributed.training import (
    METHODS,
    SHARDED,
    net,
    optimizer_of,
    state_bytes,
    step_loss,
    train,
    whole_weights,
    wrapped,
)

EVERY = ["full-rank", *METHODS]
EVERY_SHARDED = ["full-rank", *SHARDED]
# Both ways of storing a basis, both sides, channel scales, a limiter, whole blocks, matrices gathered on one process,
# state per row, sharded orthonormal columns, slices of matrices, bases that move at each step, sharded errors.
SOME = ["galore-randomized", "galore-dct", "galore-lazy", "galore-full", "fira", "apollo-mini", "frugal",
        "frugal-blocks", "muon", "normuon", "dion", "dion2", "ldadam", "cosmos"]  # fmt: skip
LOSS, WEIGHT = 1e-4, 2e-4


def trained(names, way, steps, rank=0, world=1):
    """Every method for `steps`, and what tests compare."""
    found = {}
    for name in names:
        model = wrapped(net(torch.float32), way, world)
        optimizer = make(name, model)
        if way == "fsdp" and name != "full-rank":
            get_optimizer_state_dict(model, optimizer)  # creates state, and must not change the run
        losses = train(model, optimizer, steps, rank, world)
        found[name] = {"losses": losses, "weights": whole_weights(model), "bytes": state_bytes(optimizer)}
    return found


def make(name, model, **options):
    return optimizer_of(name, getattr(model, "module", model), **options)


def check_same(alone, ranks, name):
    for found in ranks:
        assert found[name]["losses"] == pytest.approx(alone[name]["losses"], abs=LOSS), name
        for key, weight in alone[name]["weights"].items():
            assert torch.allclose(found[name]["weights"][key], weight, atol=WEIGHT, rtol=0), (name, key)
            assert torch.equal(found[name]["weights"][key], ranks[0][name]["weights"][key]), (name, key)


@pytest.mark.parametrize(
    ("names", "worlds", "ways", "steps"),
    [
        pytest.param(SOME, (4,), ("fsdp",), 6, id="short"),
        pytest.param(EVERY, (1, 2, 4), ("fsdp", "ddp"), 30, id="long", marks=pytest.mark.drill),
    ],
)
@pytest.mark.timeout(1800)
def test_several_processes_equal_one(tmp_path, names, worlds, ways, steps):
    alone = trained(names, "alone", steps)
    for way in ways:
        for world in worlds:
            chosen = [name for name in names if way != "fsdp" or name in EVERY_SHARDED]
            job = partial(trained, chosen, way, steps)
            ranks = in_processes(world, lambda rank, world, job=job: job(rank, world), tmp_path / f"{way}{world}")
            for name in chosen:
                check_same(alone, ranks, name)
                shares = [found[name]["bytes"] / alone[name]["bytes"] for found in ranks]
                assert max(shares) <= (0.3 if way == "fsdp" and world == 4 else 1), (name, shares)


def silent(rank, world):
    """Whether the basis of a sharded matrix changes if some rows of its gradient are zero, and if all are."""
    model = wrapped(net(torch.float32), "fsdp", world)
    optimizer = make("galore-randomized", model)
    weight = model.layers[1].weight
    changed = []
    for step in range(11):  # a new basis at 0, 5 and 10
        optimizer.zero_grad()
        step_loss(model, step, rank, world)
        if step == 10 or (step == 5 and rank == 1):
            weight.grad.to_local().zero_()
        before = optimizer.state[weight]["basis"].full_tensor().clone() if step else None
        optimizer.step()
        if step in (5, 10):
            changed.append(not torch.equal(optimizer.state[weight]["basis"].full_tensor(), before))
    return changed


def test_a_basis_stays_where_a_gradient_is_zero_in_all_processes(tmp_path):
    assert in_processes(2, silent, tmp_path) == [[True, False]] * 2


def saved_and_resumed(names, folder, stop, steps, how, rank, world):
    """With two processes trains, saves after `stop` steps and continues; otherwise resumes from that checkpoint."""
    full = how == "full"
    options = StateDictOptions(full_state_dict=full, cpu_offload=full, broadcast_from_rank0=full)
    found = {}
    for name in names:
        model = wrapped(net(torch.float32), "fsdp", world)
        if world == 2:
            optimizer = make(name, model)
            train(model, optimizer, stop, rank, world)
        else:
            with torch.no_grad():
                for param in model.parameters():
                    param.fill_(7.0)
            optimizer = make(name, model)
        paths = folder / name / "model", folder / name / "optimizer"
        if world == 2:
            states = (
                get_model_state_dict(model, options=options),
                get_optimizer_state_dict(model, optimizer, options=options),
            )
            for path, state in zip(paths, states, strict=True):
                if full and rank == 0:
                    path.parent.mkdir(exist_ok=True, parents=True)
                    torch.save(state, f"{path}.pt")
                elif not full:
                    dcp.save(state, checkpoint_id=path)
        elif full:
            states = [torch.load(f"{path}.pt", weights_only=True) if rank == 0 else {} for path in paths]
            set_model_state_dict(model, states[0], options=options)
            set_optimizer_state_dict(model, optimizer, states[1], options=options)
        else:
            state = get_model_state_dict(model)
            dcp.load(state, checkpoint_id=paths[0])
            set_model_state_dict(model, state)
            state = get_optimizer_state_dict(model, optimizer)
            dcp.load(state, checkpoint_id=paths[1])
            set_optimizer_state_dict(model, optimizer, state)
        losses = train(model, optimizer, steps - stop, rank, world, start=stop)
        found[name] = {"losses": losses, "weights": whole_weights(model)}
    return found


@pytest.mark.parametrize(
    ("names", "hows"),
    [
        pytest.param(["fira", "frugal-blocks"], ("sharded",), id="short"),
        pytest.param(EVERY_SHARDED, ("sharded", "full"), id="long", marks=pytest.mark.drill),
    ],
)
@pytest.mark.timeout(1800)
def test_saved_in_two_processes_resumed_in_one_and_in_four(tmp_path, names, hows):
    for how in hows:
        job = partial(saved_and_resumed, names, tmp_path / how, 6, 10, how)
        whole = in_processes(2, job, tmp_path / how)
        for world in (1, 4):
            ranks = in_processes(world, job, tmp_path / how)
            for name in names:
                check_same(whole[0], ranks, name)


def hybrid(names, steps, rank, world):
    """Two replicas of two shards each; the decompositions of the second replica have other signs."""
    found = {}
    if rank >= 2:
        for key, choose in SUBSPACES.items():
            if key != "columns":
                SUBSPACES[key] = lambda request, choose=choose: -choose(request)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for name in names:
        model = wrapped(net(torch.float32), "fsdp", world, mesh)
        optimizer = make(name, model)
        losses = train(model, optimizer, steps, rank, world)
        parts = [local_part(param.detach()).clone() for param in model.parameters()]
        found[name] = {"losses": losses, "weights": whole_weights(model), "parts": parts}
    return found


def test_replicas_of_shards(tmp_path):
    names = ["galore-randomized", "frugal"]
    alone = trained(names, "alone", 6)
    ranks = in_processes(4, partial(hybrid, names, 6), tmp_path)
    for name in names:
        check_same(alone, ranks, name)
        for first, second in ((0, 2), (1, 3)):
            pairs = zip(ranks[first][name]["parts"], ranks[second][name]["parts"], strict=True)
            assert all(torch.equal(*pair) for pair in pairs), name
