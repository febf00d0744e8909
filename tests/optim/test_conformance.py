"""Every optimizer through the same checks: a new method is a line in METHOD_CASES."""

import io
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from hf_lowrank.errors import UserError
from hf_lowrank.optim import (
    ApolloAdamW,
    CosmosAdamW,
    Dion2AdamW,
    DionAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LDAdamW,
    MuonAdamW,
    NorMuonAdamW,
    QGaLoreAdamW,
)
from hf_lowrank.optim.base import TargetedAdamW
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.muon import OrthogonalAdamW
from hf_lowrank.optim.ranked import RankedAdamW

METHOD_CASES = {
    "galore": partial(GaLoreAdamW, subspace="svd"),
    "galore-randomized": partial(GaLoreAdamW, subspace="randomized"),
    "galore-random": partial(GaLoreAdamW, subspace="random", moments="rotate"),
    "galore-columns": partial(GaLoreAdamW, subspace="columns", moments="rotate"),
    "galore-dct": partial(GaLoreAdamW, subspace="dct", moments="rotate"),
    "fira-dct": partial(FiraAdamW, subspace="dct"),
    "galore-gaussian": partial(GaLoreAdamW, subspace="gaussian", moments="rotate"),
    "galore-seeded": partial(GaLoreAdamW, subspace="seeded", moments="rotate"),
    "galore-full": partial(GaLoreAdamW, proj_type="full", subspace="svd", moments="rotate"),
    "galore-full-fast": partial(GaLoreAdamW, proj_type="full", subspace="randomized", moments="rotate"),
    "galore-stagger": partial(GaLoreAdamW, stagger=True, subspace="random", proj_type="reverse_std", moments="reset"),
    "galore-lazy": partial(GaLoreAdamW, subspace="randomized", lazy=True),
    "q-galore": partial(QGaLoreAdamW, state_dtype="parameter"),  # moments of so few values are never in eight bits
    "galore-full-4bit": partial(GaLoreAdamW, proj_type="full", subspace="svd", projection_bits=4),
    "fira": partial(FiraAdamW, subspace="svd"),
    "fira-4bit": partial(FiraAdamW, subspace="randomized", projection_bits=4),
    "fira-paper": partial(FiraAdamW, residual="paper", subspace="randomized", adam_variant="torch"),
    "apollo": ApolloAdamW,
    "apollo-seeded": partial(ApolloAdamW, subspace="seeded"),
    "apollo-mini": partial(ApolloAdamW, scale_type="tensor", scale=128.0),
    "frugal": FrugalAdamW,
    "frugal-svd": partial(FrugalAdamW, subspace="svd", state_free_rule="sgd", moments="keep"),
    "muon": MuonAdamW,
    "muon-polar": partial(MuonAdamW, orthogonaliser="polar_express", nesterov=False),
    "normuon": NorMuonAdamW,
    "dion": DionAdamW,
    "dion2": Dion2AdamW,
    "ldadam": LDAdamW,
    "ldadam-no-feedback": partial(LDAdamW, error_feedback=False, subspace="randomized"),
    "cosmos": CosmosAdamW,
}
ORTHOGONAL = ["muon", "muon-polar", "normuon", "dion", "dion2", "cosmos"]
IN_FOUR_BITS = ["q-galore", "galore-full-4bit", "fira-4bit"]
PROJECTED = [name for name in METHOD_CASES if name not in ORTHOGONAL]
# Projections that are refreshed in intervals, not at each step.
REFRESHED = [name for name in PROJECTED if not name.startswith("ldadam")]
every_method = pytest.mark.parametrize("name", METHOD_CASES)
every_projection = pytest.mark.parametrize("name", PROJECTED)


class Net(nn.Module):
    """Linear layers of three shapes, two of them equal, with biases and a norm."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 6)])
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.norm(x)


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)


def make(name, params, **options):
    return METHOD_CASES[name](params, **{"lr": 1e-2, "weight_decay": 0.05, **own_options(name, 3, 4), **options})


def own_options(name, rank, gap):
    """The options that a method needs: a rank, if it has one, and an interval of refreshes, if it has refreshes."""
    if name in ORTHOGONAL:
        return {"rank": rank} if name in ("dion", "cosmos") else {}
    interval = {"update_proj_gap": gap} if name in REFRESHED else {}
    return {"rank": 1 if name == "apollo-mini" else rank, **interval}


def of_targets(name, rank):
    """The keys of a group of targets."""
    muon = {"muon": True} if name in ORTHOGONAL else {}
    return muon | {key: value for key, value in own_options(name, rank, 0).items() if key == "rank"}


def in_full_precision(name):
    """In bfloat16 an orthogonalisation amplifies a last-digit difference in the momentum to 1e-2."""
    return {"ns_dtype": "float32"} if name in ORTHOGONAL and name != "dion" else {}


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step % 5)
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 12, generator=generator)
    return (model(x.to(dtype)) - x[:, :6].sin().to(dtype)).square().mean()


def train(model, optimizer, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_method
def test_it_learns(name):
    model = net()
    losses = train(model, make(name, model), 150)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@every_method
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_dtype": "float32"},
        {"stochastic_rounding": True},
        {"state_dtype": "float32", "stochastic_rounding": True, "layerwise": True},
    ],
    ids=["plain", "float32-state", "rounding", "all"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stop", [3, 6])
def test_resuming_is_exact(name, options, dtype, stop):
    whole = net(dtype)
    train(whole, make(name, whole, **options), 11)

    first = net(dtype)
    optimizer = make(name, first, **options)
    train(first, optimizer, stop)
    saved = through_a_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    for state in saved["optimizer"]["state"].values():
        assert all(isinstance(value, (torch.Tensor, int)) for value in state.values())

    second = net(dtype, seed=1)
    second.load_state_dict(saved["model"])
    optimizer = make(name, second, **options)
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, 11 - stop, start=stop)
    assert torch.equal(weights(second), weights(whole))


@every_method
def test_same_seed_same_bits_other_seed_other_bits(name):
    ends = []
    for seed in (5, 5, 6):
        model = net()
        train(model, make(name, model, seed=seed), 6)
        ends.append(weights(model))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2]) == (
        name
        in {
            "galore",
            "galore-full",
            "galore-full-4bit",
            "galore-dct",
            "fira-dct",
            "fira",
            "frugal-svd",
            "muon",
            "muon-polar",
            "normuon",
            "dion2",
            "ldadam",
            "cosmos",
        }
    )


@every_method
def test_layerwise_is_the_same_optimizer(name):
    plain, inside = net(), net()
    train(plain, make(name, plain), 7)
    optimizer = make(name, inside, layerwise=True)
    train(inside, optimizer, 6)
    loss_of(inside, 6).backward()
    assert all(param.grad is None for param in inside.parameters())
    assert torch.allclose(weights(plain), weights(inside), rtol=1e-4, atol=1e-6)  # one at a time instead of in batches


@every_method
def test_layerwise_accumulation_is_the_sum(name):
    """Apart from refreshes, which see only the first gradient; so bases are chosen when both see the same one."""
    plain, inside = net(), net()
    options = {"update_proj_gap": 100, "stagger": False} if name in REFRESHED else {}
    once, parts = make(name, plain, **options), make(name, inside, layerwise=True, **options)
    train(plain, once, 1)
    train(inside, parts, 1)
    for step in range(1, 6):
        once.zero_grad()
        for part in range(3):
            loss_of(plain, step + part).backward()
        once.step()
        with parts.accumulating():
            for part in range(2):
                loss_of(inside, step + part).backward()
        if getattr(parts, "needs_only_projections", False):
            assert inside.layers[0].weight.grad is None
        loss_of(inside, step + 2).backward()
        parts.step()
    assert torch.allclose(weights(plain), weights(inside), rtol=1e-4, atol=1e-5)


@every_method
def test_a_non_finite_gradient_changes_nothing(name):
    model, other = net(), net()
    optimizer, witness = make(name, model), make(name, other)
    hit = model.layers[1].weight
    for step in range(10):
        for current, chosen in ((model, optimizer), (other, witness)):
            chosen.zero_grad()
            loss_of(current, step).backward()
        if step in (0, 4):  # where bases are due
            before = hit.detach().clone()
            hit.grad[2, 3] = math.inf if step else math.nan
            other.layers[1].weight.grad = None
            if step == 0:
                with pytest.warns(UserWarning, match=r"layers\.1\.weight is not finite"):
                    optimizer.step()
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # warned already
                    optimizer.step()
            assert torch.equal(hit, before)
        else:
            optimizer.step()
        witness.step()
    assert torch.equal(weights(model), weights(other))
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("stored", ["in rows", "in columns", "in float64"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "its square overflows"])
def test_a_gradient_with_a_non_finite_norm_is_skipped(stored, value):
    model = net().double() if stored == "in float64" else net()
    optimizer = make("galore", model)
    weight = model.layers[1].weight
    largest = torch.finfo(weight.dtype).max
    for hits in (largest**0.5 / 100, value):
        for param in model.parameters():
            param.grad = torch.full_like(param, 1e-3)
        if stored == "in columns":
            weight.grad = weight.grad.mT.contiguous().mT
        before = weight.detach().clone()
        weight.grad[2, 3] = largest**0.5 * 2 if hits == "its square overflows" else hits
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
        assert bool(said) == torch.equal(weight, before) == (hits is value)


@every_method
def test_zero_gradients_are_not_an_error(name):
    model = net()
    optimizer = make(name, model, weight_decay=0.0)
    start = weights(model)
    for _ in range(6):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(weights(model), start)
    train(model, optimizer, 6)
    assert weights(model).isfinite().all()


@every_method
def test_state_created_before_the_first_step_changes_no_run(name):
    undisturbed, model = net(), net()
    optimizer = make(name, model)
    get_optimizer_state_dict(model, optimizer)  # makes a step at learning rate zero if there is no state
    assert optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-2
    expected = train(undisturbed, make(name, undisturbed), 10)
    assert train(model, optimizer, 10) == expected
    assert torch.equal(weights(model), weights(undisturbed))


@every_method
def test_a_real_first_step_at_a_rate_of_zero_is_counted(name):
    model = net()
    optimizer = make(name, model, lr=0.0)
    train(model, optimizer, 1)
    assert {state["step"] for state in optimizer.state.values()} == {1}


@every_method
def test_zero_gradients_in_the_first_steps_delay_nothing(name):
    model, other = net(), net()
    optimizer, fresh = make(name, model, weight_decay=0.0), make(name, other, weight_decay=0.0)
    start = weights(model)
    for _ in range(2):  # as before an output layer that starts from zero has moved
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(weights(model), start)
    for current, chosen in ((model, optimizer), (other, fresh)):
        train(current, chosen, 1)
        for param in current.parameters():
            assert torch.isfinite(param).all()
    moved, expected = (weights(current) - start for current in (model, other))
    assert moved.norm() > 0.3 * expected.norm()  # Adam's moments count the steps of zero too
    for param, witness in zip(model.parameters(), other.parameters(), strict=True):
        state = optimizer.state[param]
        if "basis" in state and optimizer.param_groups[0].get("subspace") in ("svd", "randomized"):
            assert torch.equal(state["basis"], fresh.state[witness]["basis"])


@pytest.mark.parametrize("name", ["galore", "galore-randomized", "galore-full", "galore-full-fast", "fira"])
def test_a_gradient_of_zero_keeps_the_basis(name):
    experts = nn.Parameter(torch.zeros(3, 8, 12))
    matrix = nn.Parameter(torch.zeros(8, 12))
    optimizer = make(name, [{"params": [("experts", experts), ("matrix", matrix)], "rank": 3}])
    generator = torch.Generator().manual_seed(0)
    before = {}
    for step in range(9):
        experts.grad = torch.randn(3, 8, 12, generator=generator)
        matrix.grad = torch.randn(8, 12, generator=generator)
        if step == 4:
            experts.grad[1] = 0
            matrix.grad.zero_()
        optimizer.step()
        bases = {
            (param, side): optimizer.state[param][side].clone()
            for param in (experts, matrix)
            for side in ("basis", "left_basis")
            if side in optimizer.state[param]
        }
        if step == 4:
            for (param, side), basis in bases.items():
                same = torch.equal if param is matrix else lambda now, last: torch.equal(now[1], last[1])
                assert same(basis, before[param, side])
                assert param is matrix or not torch.equal(basis[0], before[param, side][0])
        if step == 8:
            for key, basis in bases.items():
                assert not torch.equal(basis, before[key])
        before = bases


@every_method
def test_sparse_gradients_are_refused(name):
    model = net()
    optimizer = make(name, model)
    model.layers[0].weight.grad = torch.ones(8, 12).to_sparse()
    with pytest.raises(UserError, match=r"gradient of layers\.0\.weight must be dense"):
        optimizer.step()


@every_method
def test_missing_gradients_and_closures(name):
    model = net()
    optimizer = make(name, model)
    start = model.layers[0].weight.detach().clone()
    for param in model.layers[0].parameters():
        param.requires_grad_(False)
    optimizer.zero_grad()

    def closure():
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert torch.equal(model.layers[0].weight, start)
    assert model.layers[0].weight not in optimizer.state


@every_method
def test_state_moves_to_other_weight_types(name):
    model = net()
    optimizer = make(name, model)
    train(model, optimizer, 5)
    saved = through_a_file(optimizer.state_dict())
    half = net(torch.bfloat16)
    other = make(name, half)
    other.load_state_dict(saved)
    train(half, other, 5, start=5)
    assert weights(half).isfinite().all()
    kept = {"step", "refreshes", "reset_at", "interval", "undecided"}
    for state in other.state.values():
        for key, value in state.items():
            if key not in kept and value.is_floating_point() and key not in {"residual_norm", "cosines"}:
                is_of_codes = "basis_" in key
                assert value.dtype == (torch.float32 if is_of_codes else torch.bfloat16), key


@every_method
def test_groups_can_be_added(name):
    model = net()
    late = nn.Parameter(torch.randn(9, 5))
    optimizer = make(name, model)
    train(model, optimizer, 3)
    chosen = of_targets(name, 2)
    optimizer.add_param_group({"params": [("late", late)], **chosen})
    before = late.detach().clone()
    late.grad = torch.randn(9, 5)
    optimizer.step()
    assert not torch.equal(late, before)
    with pytest.raises(UserError, match=r"vector of shape \(4,\) is not a matrix"):
        optimizer.add_param_group({"params": [("vector", nn.Parameter(torch.zeros(4)))], **chosen})
    assert len(optimizer.param_groups) == 3


@every_projection
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_has_the_size_that_the_method_needs(name, dtype):
    rows, columns, rank = 20, 12, 1 if name == "apollo-mini" else 3
    weight = nn.Parameter(torch.zeros(rows, columns, dtype=dtype))
    optimizer = make(name, [{"params": [("weight", weight)]}])
    weight.grad = torch.randn(rows, columns).to(dtype)
    optimizer.step()
    bytes_of = {
        key: value.numel() * value.element_size()
        for key, value in optimizer.state[weight].items()
        if isinstance(value, torch.Tensor)
    }
    size = weight.element_size()
    reverse = name == "galore-stagger"
    kept, projected = (columns, rows) if reverse else (rows, columns)
    low = rank * rank if name.startswith("galore-full") else kept * rank
    asked = {"exp_avg": low * size, "exp_avg_sq": low * size}
    if name in {"galore-columns", "galore-dct", "fira-dct", "frugal"}:
        asked["basis"] = rank * 8
    elif name not in {"galore-seeded", "apollo-seeded"}:
        asked["basis"] = projected * rank * size
    if name.startswith("galore-full"):
        asked["left_basis"] = rows * rank * size
    if name in IN_FOUR_BITS:  # one group each
        for side, length in (("basis", projected), ("left_basis", rows)):
            if side in asked:
                asked[side] = length * rank // 2
                asked |= dict.fromkeys((f"{side}_scale", f"{side}_zero"), 8 if dtype == torch.float64 else 4)
    if name in {"galore-lazy", "q-galore"}:
        asked["cosines"] = 5 * 4
    if name.startswith(("fira", "apollo")):
        asked["residual_norm"] = 4
    if name == "ldadam":
        asked["error"] = rows * columns * size
    assert bytes_of == asked


@every_projection
def test_batching_changes_nothing(name):
    """Matrices of one shape in one batch, and each in its own group."""
    ends = []
    for apart in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(10, 6, dtype=torch.float64)) for _ in range(3)]
        named = [(f"w{i}", param) for i, param in enumerate(params)]
        optimizer = make(name, [{"params": [pair]} for pair in named] if apart else [{"params": named}])
        for _ in range(6):
            for param in params:
                param.grad = torch.randn(10, 6, dtype=torch.float64)
            optimizer.step()
        ends.append(torch.stack([param.detach() for param in params]))
    assert torch.allclose(ends[0], ends[1], rtol=1e-9, atol=1e-11)


@every_projection
@pytest.mark.parametrize("shape", [(3, 10, 6), (3, 6, 10)])
def test_stacked_experts_are_matrices(name, shape):
    torch.manual_seed(0)
    start, grads = torch.randn(shape), torch.randn(6, *shape)
    stack = nn.Parameter(start.clone())
    parts = [nn.Parameter(matrix.clone()) for matrix in start]
    options = {"stagger": False} if name in REFRESHED else {}
    together = make(name, [{"params": [("experts", stack)]}], **options)
    alone = make(name, [{"params": [(f"expert{i}", part) for i, part in enumerate(parts)]}], **options)
    for grad in grads:
        stack.grad = grad.clone()
        for part, own in zip(parts, grad, strict=True):
            part.grad = own.clone()
        together.step()
        alone.step()
    assert torch.allclose(stack, torch.stack(parts), rtol=1e-5, atol=1e-6)


@every_projection
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolution_kernels_are_matrices(name, memory_format):
    torch.manual_seed(0)
    start = torch.randn(8, 4, 3, 3)
    kernel = nn.Parameter(start.clone().to(memory_format=memory_format))
    order = (0, 2, 3, 1) if memory_format == torch.channels_last else (0, 1, 2, 3)
    matrix = nn.Parameter(start.permute(order).reshape(8, 36).clone())
    own, witness = make(name, [("kernel", kernel)]), make(name, [("matrix", matrix)])
    for _ in range(6):
        grad = torch.randn(8, 4, 3, 3)
        kernel.grad = grad.to(memory_format=memory_format)
        matrix.grad = grad.permute(order).reshape(8, 36).clone()
        own.step()
        witness.step()
    assert torch.allclose(kernel.permute(order).reshape(8, 36), matrix, rtol=1e-5, atol=1e-6)


@every_projection
def test_a_rank_too_large_is_refused_by_name(name):
    with pytest.raises(UserError, match=r"rank must be from 1 to 6 for layers\.3\.weight of shape \(6, 8\), got 7"):
        METHOD_CASES[name](net(), rank=7)


def test_every_public_method_is_in_the_matrix():
    def classes(base):
        return {base}.union(*(classes(sub) for sub in base.__subclasses__()))

    covered = {getattr(case, "func", case) for case in METHOD_CASES.values()}
    assert classes(TargetedAdamW) - {TargetedAdamW, RankedAdamW, ProjectedAdamW, OrthogonalAdamW} <= covered
