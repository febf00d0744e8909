"""What needs a GPU: results equal to a CPU's, bitwise reproducibility, and NCCL collectives.

Run by `make gpu-test`, together with the rest of the suite, which uses a GPU if there is one.
"""

import copy
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig

from hf_lowrank import geometry as g
from hf_lowrank.methods import METHODS
from hf_lowrank.training import load_recipe, pretrain
from tests.distributed.every_method import CASES, SHAPE, method_of, write_recipe, write_texts
from tests.distributed.sharded_training import free_port
from tests.distributed.training import METHODS as OPTIMIZERS
from tests.distributed.training import SHARDED, net, optimizer_of, whole_weights

pytestmark = pytest.mark.gpu

LAYERS = ("cola", "sltrain", "low_rank", "structured", "sst", "relora")


def backward(model, device, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 22, generator=generator, dtype=torch.float64).to(device, next(model.parameters()).dtype)
    model.zero_grad()
    model(x).square().sum().backward()


def stepped(name, device, dtype=torch.float64, steps=3, sharded=False):
    """Weights after some steps; the basis is chosen at the first."""
    model = net(dtype).to(device)
    if sharded:
        fully_shard(model, mesh=init_device_mesh(device.type, (1,)))
    optimizer = optimizer_of(name, model)
    for step in range(steps):
        backward(model, device, step)
        optimizer.step()
    return {key: value.cpu() for key, value in whole_weights(model).items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_steps_as_on_the_cpu(name, device):
    bound = 1e-9
    here, there = stepped(name, torch.device("cpu")), stepped(name, device)
    for key, value in here.items():
        assert torch.allclose(there[key], value, rtol=bound, atol=bound), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_gives_the_same_bits_each_time(name, dtype, device):
    one, other = (stepped(name, device, dtype, steps=9) for _ in range(2))
    for key, value in one.items():
        assert value.isfinite().all(), key
        assert torch.equal(other[key], value), key


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_is_that_of_the_cpu(case, device):
    method, own = method_of(case)
    model = method.build_model(LlamaConfig(vocab_size=46, **SHAPE), method.settings(**own), 0).double()
    copied = copy.deepcopy(model).to(device)
    ids = torch.randint(0, 46, (4, 12), generator=torch.Generator().manual_seed(0))
    for each in (model, copied):
        where = next(each.parameters()).device
        each(input_ids=ids.to(where), labels=ids.to(where)).loss.backward()
    for (name, here), there in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert (here.grad is None) == (there.grad is None), name
        if here.grad is not None:
            # Rotations and norms of the model are in float32.
            assert torch.allclose(there.grad.cpu(), here.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_gives_the_same_bits_each_time_and_after_a_resume(case, bf16, device, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path / "cache"))
    write_texts(tmp_path)
    path = write_recipe(tmp_path, case, 1, "alone", steps=12, saved=4)
    recipe = load_recipe(path, [f"training.bf16={str(bf16).lower()}", f"training.use_cpu={device.type == 'cpu'}"])
    ends = []
    for run in ("one", "other"):
        pretrain(recipe, tmp_path / run)
        ends.append(weights_at(tmp_path / run))
    for step in (8, 12):
        shutil.rmtree(tmp_path / "other" / f"checkpoint-{step}")
    pretrain(recipe, tmp_path / "other")
    ends.append(weights_at(tmp_path / "other"))
    assert ends[0] == ends[1]
    assert ends[0] == ends[2]


def weights_at(run):
    return (run / "checkpoint-12" / "model.safetensors").read_bytes()


@pytest.fixture
def alone_among_processes(device):
    """A process group of one, over NCCL on a GPU."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SHARDED)
def test_shards_step_as_the_whole(name, device, alone_among_processes):
    whole, sharded = (stepped(name, device, torch.float64, steps=6, sharded=sharded) for sharded in (False, True))
    bound = 1e-9
    for key, value in whole.items():
        assert torch.allclose(sharded[key], value, rtol=bound, atol=bound), key


@pytest.mark.parametrize("case", [case for case in LAYERS if METHODS[case].kind != "restarts"])
def test_a_sharded_layer_is_that_of_the_whole(case, device, alone_among_processes):
    method, own = method_of(case)
    model = method.build_model(LlamaConfig(vocab_size=46, **SHAPE), method.settings(**own), 0).to(device)
    ids = torch.randint(0, 46, (4, 12), generator=torch.Generator().manual_seed(0)).to(device)
    before = model(input_ids=ids, labels=ids).loss
    fully_shard(model, mesh=init_device_mesh(device.type, (1,)))
    after = model(input_ids=ids, labels=ids).loss
    after.backward()
    assert float(after) == pytest.approx(float(before), rel=1e-5)
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)


def models(device):
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        method, own = method_of("full_rank")
        model = method.build_model(LlamaConfig(vocab_size=46, **SHAPE), method.settings(**own), seed)
        found.append(model.double().eval().to(device))
    return found


def geometry(device):
    """Numbers of every family of metrics that draws nothing on the device."""
    one, other = models(device)
    ids = torch.randint(0, 46, (6, 12), generator=torch.Generator().manual_seed(0))
    loss = g.TokenLoss(ids, batch_tokens=24)
    weights = [p.detach() for name, p in one.named_parameters() if name.endswith("proj.weight")]
    found = {
        "loss": [loss(one), loss(other)],
        "path": g.interpolation_curve(one, other, loss, positions=g.path_grid(3)).tolist(),
        "tail": [g.tail_exponent(sigma) for sigma in g.many_singular_values(weights)],
        "rank": [g.effective_rank(sigma) for sigma in g.many_singular_values(weights)],
        "top": [g.hessian_top_eigenvalue(one, loss.terms, iterations=300, tolerance=1e-9)[0]],
    }
    for number, layer in enumerate(g.activation_similarity(one, other, loss.batches(one))):
        found[f"layer {number}"] = [value for value in vars(layer).values() if isinstance(value, float)]
    return found


def test_metrics_are_those_of_the_cpu(device):
    here, there = geometry(torch.device("cpu")), geometry(device)
    assert here.keys() == there.keys()
    for key, values in here.items():
        assert there[key] == pytest.approx(values, rel=1e-5, abs=1e-8, nan_ok=True), key
