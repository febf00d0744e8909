"""The layers' numbers against plain autograd on the written-out formulas, and what they keep for backward."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters.functional import draw_support, keyed_generator, sltrain_linear
from hf_lowrank.adapters.layers import CoLALinear, SLTrainLinear
from hf_lowrank.errors import UserError

OUT, IN, RANK, TOKENS = 24, 20, 5, 11
COLA = {"bottleneck_act": "silu", "keep_bottleneck": False}
COLA_M = {"bottleneck_act": "silu", "keep_bottleneck": True}
SLTRAIN = {"scaling": 0.75, "sparsity": 0.1}


def layer_of(kind, options, dtype=torch.float64, bias=True, conv1d=False, init="random", out=OUT, fan_in=IN, r=RANK):
    torch.manual_seed(0)
    linear = (Conv1D(out, fan_in) if conv1d else nn.Linear(fan_in, out, bias=bias)).to(dtype)
    if bias:
        nn.init.normal_(linear.bias)
    weight = linear.weight.detach().T if conv1d else linear.weight.detach()
    layer = kind(linear, "block.0.up")
    layer.update_layer("default", r, init=init, seed=0, weight=weight, options=options)
    if kind is SLTrainLinear and init == "random":
        nn.init.normal_(layer.sltrain_B["default"])
    return layer, weight


def formula(layer, x):
    """The layer written out: values, and by plain autograd its gradients."""
    bias = layer.base_layer.bias
    if isinstance(layer, CoLALinear):
        low = x @ layer.cola_A["default"].T
        return (low * torch.sigmoid(low)) @ layer.cola_B["default"].T + bias
    sparse = torch.zeros(layer.out_features * layer.in_features, dtype=x.dtype)
    sparse = sparse.index_put((layer.sltrain_support["default"].long(),), layer.sltrain_values["default"])
    product = layer.sltrain_B["default"] @ layer.sltrain_A["default"]
    return x @ (layer.scaling["default"] * product + sparse.view(OUT, IN)).T + bias


def gradients(layer, function, x, upstream):
    leaves = [x, *layer.parameters()]
    return torch.autograd.grad(function(x), leaves, upstream)


def largest_error(got, wanted):
    return max(((g - w).norm() / w.norm()).item() for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("kind", "options"), [(CoLALinear, COLA), (CoLALinear, COLA_M), (SLTrainLinear, SLTRAIN)])
@pytest.mark.parametrize("conv1d", [False, True])
def test_values_and_gradients_follow_the_formula(kind, options, dtype, tolerance, conv1d):
    layer, _ = layer_of(kind, options, dtype, conv1d=conv1d)
    x = torch.randn(2, TOKENS, IN, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, TOKENS, OUT, dtype=dtype)
    assert largest_error([layer(x)], [formula(layer, x)]) < tolerance
    got = gradients(layer, layer, x, upstream)
    wanted = gradients(layer, lambda x: formula(layer, x), x, upstream)
    assert largest_error(got, wanted) < tolerance


def test_gradcheck_of_sltrain():
    layer, _ = layer_of(SLTrainLinear, SLTRAIN)
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    factors = [layer.sltrain_A["default"], layer.sltrain_B["default"], layer.sltrain_values["default"]]
    support = layer.sltrain_support["default"]
    assert torch.autograd.gradcheck(lambda *inputs: sltrain_linear(*inputs, support, 0.75), (x, *factors))


def test_frozen_parts_of_sltrain_get_no_gradient():
    layer, _ = layer_of(SLTrainLinear, SLTRAIN)
    layer.requires_grad_(False)
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dense_weight().sum(0).expand_as(x))
    layer.sltrain_values.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.sltrain_A["default"].grad is None
    assert layer.sltrain_values["default"].grad is not None


def test_second_derivatives_of_sltrain_are_refused():
    layer, _ = layer_of(SLTrainLinear, SLTRAIN)
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(UserError, match=r"first derivatives only.*to_dense"):
        first.sum().backward()


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        function()
    return saved


@pytest.mark.parametrize("autocast", [False, True])
def test_sltrain_saves_no_dense_tensor(autocast):
    layer, _ = layer_of(SLTrainLinear, SLTRAIN, torch.float32)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        saved = saved_by(lambda: layer(x))
    assert saved
    assert not [tensor.shape for tensor in saved if tensor.is_floating_point() and tensor.numel() >= OUT * IN]
    assert {tuple(tensor.shape) for tensor in saved if tensor.ndim == 2} <= {(TOKENS, IN), (RANK, IN), (OUT, RANK)}


@pytest.mark.parametrize(
    ("kind", "options"), [(CoLALinear, COLA | {"bottleneck_act": "linear"}), (SLTrainLinear, SLTRAIN)]
)
def test_autocast_does_not_reach_dense_weights(kind, options):
    layer, _ = layer_of(kind, options, torch.float32)
    weight = layer.dense_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.dense_weight(), weight)
        layer.merge()
    assert torch.equal(layer.base_layer.weight, weight)


def test_naive_sltrain_would_save_a_dense_tensor():
    layer, _ = layer_of(SLTrainLinear, SLTRAIN)
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    assert [tensor for tensor in saved_by(lambda: formula(layer, x)) if tensor.numel() == OUT * IN]


def test_parameter_counts():
    layer, _ = layer_of(SLTrainLinear, SLTRAIN)
    values = int(0.1 * OUT * IN)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == RANK * (OUT + IN) + values + OUT
    layer, _ = layer_of(CoLALinear, COLA)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == RANK * (OUT + IN) + OUT


@pytest.mark.parametrize(("kind", "options"), [(CoLALinear, COLA), (CoLALinear, COLA_M), (SLTrainLinear, SLTRAIN)])
def test_half_precision_and_autocast(kind, options):
    layer, _ = layer_of(kind, options, torch.float32)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    half.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    assert torch.allclose(half.float(), exact, rtol=0.05, atol=0.05)
    pure = layer.to(torch.bfloat16)(x.bfloat16())
    assert pure.dtype == torch.bfloat16
    assert torch.allclose(pure.float(), exact, rtol=0.05, atol=0.08)
    mixed = layer.to(torch.float32)(x.bfloat16())
    assert mixed.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "options"), [(CoLALinear, COLA), (CoLALinear, COLA_M), (SLTrainLinear, SLTRAIN)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, options, reentrant):
    layer, _ = layer_of(kind, options)
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    layer(x).pow(2).sum().backward()
    wanted = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).pow(2).sum().backward()
    assert all(torch.equal(g, w) for g, w in zip([x.grad, *(p.grad for p in layer.parameters())], wanted, strict=True))


@pytest.mark.parametrize(("kind", "options"), [(CoLALinear, COLA), (CoLALinear, COLA_M), (SLTrainLinear, SLTRAIN)])
def test_compiles_without_graph_breaks(kind, options):
    layer, _ = layer_of(kind, options)
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got = gradients(layer, compiled, x, torch.ones(TOKENS, OUT, dtype=torch.float64))
    wanted = gradients(layer, layer, x, torch.ones(TOKENS, OUT, dtype=torch.float64))
    assert largest_error(got, wanted) < 1e-12


def test_compiled_sltrain_still_saves_no_dense_tensor():
    layer, _ = layer_of(SLTrainLinear, SLTRAIN)
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    saved = saved_by(lambda: compiled(x))
    assert not [tensor.shape for tensor in saved if tensor.is_floating_point() and tensor.numel() >= OUT * IN]


def test_starts_are_those_of_the_papers():
    wide = {"out": 300, "fan_in": 500, "r": 40}
    layer, _ = layer_of(CoLALinear, COLA, **wide)
    for factor in (layer.cola_A["default"], layer.cola_B["default"]):
        assert factor.std().item() == pytest.approx(40**-0.25 * 800**-0.25, rel=0.05)
    layer, _ = layer_of(SLTrainLinear, SLTRAIN, **wide)
    for drawn in (layer.sltrain_A["default"], layer.sltrain_values["default"]):
        assert drawn.abs().max().item() == pytest.approx(1 / math.sqrt(500), rel=0.01)
        assert drawn.std().item() == pytest.approx(1 / math.sqrt(3 * 500), rel=0.05)
    fresh = SLTrainLinear(nn.Linear(IN, OUT), "a")
    fresh.update_layer("default", 4, init="random", seed=0, weight=None, options=SLTRAIN)
    assert not fresh.sltrain_B["default"].any()


def test_draws_depend_on_seed_and_name_alone():
    def drawn(name, seed, dtype=torch.float32):
        torch.randn(7)  # the global generator has no say
        layer = SLTrainLinear(nn.Linear(IN, OUT).to(dtype), name)
        layer.update_layer("default", 4, init="random", seed=seed, weight=None, options=SLTRAIN)
        return layer.sltrain_A["default"], layer.sltrain_support["default"]

    assert all(map(torch.equal, drawn("a", 0), drawn("a", 0)))
    assert not torch.equal(drawn("a", 0)[1], drawn("b", 0)[1])
    assert not torch.equal(drawn("a", 0)[0], drawn("a", 1)[0])
    assert torch.equal(drawn("a", 0)[0].to(torch.bfloat16), drawn("a", 0, torch.bfloat16)[0])


@pytest.mark.parametrize(
    ("rows", "columns", "count"), [(8, 6, 3), (8, 6, 40), (8, 6, 47), (1, 7, 1), (300, 200, 1800)]
)
def test_support_is_distinct_sorted_and_compact(rows, columns, count):
    support = draw_support(rows, columns, count, keyed_generator(0, rows, count))
    assert support.dtype == torch.int32
    assert support.numel() == count
    assert (support.diff() > 0).all()
    assert support.min() >= 0
    assert support.max() < rows * columns


@pytest.mark.parametrize("count", [5, 14])
def test_support_is_uniform(count):
    total, draws = 20, 4000
    hits = torch.zeros(total)
    pairs = torch.zeros(total, total)
    for draw in range(draws):
        support = draw_support(4, 5, count, keyed_generator(draw)).long()
        hits[support] += 1
        pairs[support[:, None], support] += 1
    p = count / total
    assert ((hits / draws - p).abs() < 5 * math.sqrt(p * (1 - p) / draws)).all()
    both = p * (count - 1) / (total - 1)
    off = pairs[~torch.eye(total, dtype=torch.bool)] / draws
    assert ((off - both).abs() < 5.5 * math.sqrt(both * (1 - both) / draws)).all()


@pytest.mark.parametrize("conv1d", [False, True])
def test_svd_start_approximates_the_dense_weight(conv1d):
    layer, weight = layer_of(CoLALinear, COLA, init="svd", conv1d=conv1d)
    u, s, vt = torch.linalg.svd(weight)
    best = u[:, :RANK] @ torch.diag(s[:RANK]) @ vt[:RANK]
    assert torch.allclose(layer.dense_weight(), best, atol=1e-5)
    layer, weight = layer_of(SLTrainLinear, SLTRAIN, init="svd", conv1d=conv1d)
    rest = (weight - layer.dense_weight()).reshape(-1)
    assert rest[layer.sltrain_support["default"].long()].abs().max() < 1e-5
    outside = torch.ones(OUT * IN, dtype=torch.bool)
    outside[layer.sltrain_support["default"].long()] = False
    assert torch.allclose(rest[outside], (weight - best).reshape(-1)[outside], atol=1e-5)


def test_dense_weight_and_factors_agree():
    layer, _ = layer_of(SLTrainLinear, SLTRAIN, bias=False)
    x = torch.randn(TOKENS, IN, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ layer.dense_weight().T)
    B, A, scaling = layer.low_rank_factors()
    assert (B.shape, A.shape, scaling) == ((OUT, RANK), (RANK, IN), 0.75)
    assert layer.dense_weight_kind == "exact"
    cola, _ = layer_of(CoLALinear, COLA)
    B, A, scaling = cola.low_rank_factors()
    assert torch.equal(cola.dense_weight(), B @ A)
    assert cola.dense_weight_kind == "surrogate"
