"""Sparse spectral training (SST, arXiv 2405.15481): W = U diag(S) Vᵀ of full rank in place of each weight.

All singular values train, and of the singular vectors only r pairs at a time: they are drawn anew every `redraw_every`
optimizer steps, pair i with probability ½ (1/k + S_i / ΣS), k = min(m, n). Their gradients are those of the dense
weight along the other vector, `G v_i` and `Gᵀ u_i`, without the factor S_i, so that pairs with small singular values
turn as fast as others. After each step vectors are normalised and singular values kept at or above zero.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainingArguments

from hf_lowrank.adapters.functional import (
    compute_dtype,
    fill,
    fill_from_first,
    first_derivatives_only,
    kaiming_uniform,
    keyed_generator,
    whole,
)
from hf_lowrank.adapters.layers import ReplacedLinear
from hf_lowrank.adapters.methods import SSTSettings
from hf_lowrank.adapters.restarts import PeriodicCallback, recovering_scheduler, reset_state
from hf_lowrank.compat import BufferDict, inner
from hf_lowrank.errors import UserError
from hf_lowrank.methods import check_options


@torch.library.custom_op("hf_lowrank::active_pairs", mutates_args=())
def _active_pairs(x: Tensor, A: Tensor, B: Tensor, S: Tensor) -> Tensor:
    return linear(linear(x, A) * S, B)


@torch.library.custom_op("hf_lowrank::active_pairs_grads", mutates_args=())
def _active_pairs_grads(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, S: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    along_B, along_A = grad @ B, linear(x, A)
    rows_x, rows_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_A = along_B.reshape(-1, B.shape[1]).T @ rows_x
    grad_B = rows_grad.T @ along_A.reshape(-1, B.shape[1])
    grad_S = (along_A * along_B).reshape(-1, B.shape[1]).sum(0)
    return (along_B * S) @ A, grad_A, grad_B, grad_S


@_active_pairs.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, S: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


@_active_pairs_grads.register_fake
def _(grad: Tensor, x: Tensor, A: Tensor, B: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(A), torch.empty_like(B), torch.empty_like(S)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return _active_pairs_grads(grad, *ctx.saved_tensors)


_active_pairs.register_autograd(_backward, setup_context=_save)
_active_pairs_grads.register_autograd(
    first_derivatives_only("SST", "those of its vectors leave out the singular values")
)


class SSTLinear(ReplacedLinear):
    """y = x (U diag(S) Vᵀ)ᵀ + bias (arXiv 2405.15481), which starts as the dense layer.

    The active pairs are parameters of their own, rows of A (r, in) and columns of B (out, r), with numbers `index`; in
    the frozen V (k, in) and U (out, k) their rows and columns are zero meanwhile.
    """

    title = "SST"
    adapter_layer_names = ("sst_A", "sst_B", "sst_S")
    frozen_names = ("sst_U", "sst_V")
    tensor_names = (*adapter_layer_names, *frozen_names, "sst_index")
    other_param_names = ("r", *frozen_names, "sst_index")
    sst_A: nn.ParameterDict
    sst_B: nn.ParameterDict
    sst_S: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        super().__init__(base_layer, layer_name)
        self.sst_U, self.sst_V = nn.ParameterDict(), nn.ParameterDict()
        self.sst_index = BufferDict(persistent=True)

    def update_layer(self, adapter_name: str, r: int, **options: Any) -> None:
        """As `ReplacedLinear.update_layer`, but starts from the dense weight wherever that still exists."""
        if options["weight"] is not None:
            options["init"] = "svd"
        super().update_layer(adapter_name, r, **options)

    def _set_options(self, adapter_name: str, options: dict[str, Any]) -> None:
        count, r = min(self.in_features, self.out_features), self.r[adapter_name]
        self.sst_S[adapter_name] = self._empty(count)
        self.sst_U[adapter_name] = self._empty(self.out_features, count).requires_grad_(False)
        self.sst_V[adapter_name] = self._empty(count, self.in_features).requires_grad_(False)
        device = self.sst_S[adapter_name].device
        self.sst_index[adapter_name] = torch.empty(r, dtype=torch.int32, device=device)

    def _initialise(self, adapter_name: str, seed: int, weight: Tensor | None) -> None:
        if weight is None:
            generator = keyed_generator(seed, self.layer_name)
            weight = kaiming_uniform(self.out_features, self.in_features, generator)
        U, S, V = signed_svd(weight.to(self._wide(adapter_name)))
        self._activate(adapter_name, U, S, V, keyed_generator(seed, 0, self.layer_name))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator, *, decompose: bool) -> None:
        """Draws new active pairs; with `decompose` from a new SVD of the weight. The function stays, to rounding."""
        if decompose:
            U, S, V = signed_svd(self.dense_weight().to(self._wide(self.adapter)))
        else:
            U, S, V = self._vectors()
        self._activate(self.adapter, U, S, V, generator)

    def _activate(self, name: str, U: Tensor, S: Tensor, V: Tensor, generator: torch.Generator) -> None:
        index = draw_pairs(S, self.r[name], generator).to(U.device)
        new = {"A": V[index], "B": U[:, index], "S": S, "U": U.index_fill(1, index, 0), "V": V.index_fill(0, index, 0)}
        for key, tensor in new.items():
            fill_from_first(getattr(self, f"sst_{key}")[name], tensor)
        fill(self.sst_index[name], index)

    def _wide(self, name: str) -> torch.dtype:
        return torch.promote_types(self.sst_S[name].dtype, torch.float32)

    def _vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, k), S and V (k, in) with the active pairs in their places, detached and whole."""
        name = self.adapter
        A, B, S, U, V = (whole(getattr(self, f"sst_{key}")[name].detach()) for key in "ABSUV")
        index = self.sst_index[name].long()
        return U.index_copy(1, index, B), S, V.index_copy(0, index, A)

    def _dense_weight(self) -> Tensor:
        U, S, V = (tensor.to(self._wide(self.adapter)) for tensor in self._vectors())
        return ((U * S) @ V).to(self.sst_S[self.adapter].dtype)

    @torch.no_grad()
    def normalise(self) -> None:
        """Makes the active vectors unit vectors again, and negative singular values zero."""
        A, B = self.factors()
        for vectors, dim in ((A, 1), (B, 0)):
            norm = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
            vectors.div_(norm.clamp_min(torch.finfo(norm.dtype).tiny))
        self.sst_S[self.adapter].clamp_(min=0)

    def _compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        name, dtype = self.adapter, compute_dtype(x, self.sst_S[self.adapter])
        A, B, S, U, V = (getattr(self, f"sst_{key}")[name].to(dtype) for key in "ABSUV")
        x = x.to(dtype)
        active = _active_pairs(x, A, B, S.index_select(0, self.sst_index[name]))
        return linear(linear(x, V) * S, U, bias if bias is None else bias.to(dtype)) + active


def signed_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S and Vᵀ (k, n); the largest entry of each left vector is positive, whatever the device."""
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    signs = torch.where(U.gather(0, U.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, S, V * signs.mT


def draw_pairs(S: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """r distinct numbers of singular values, ascending; number i with weight ½ (1/k + S_i / ΣS)."""
    S = S.detach().to("cpu", torch.float64)
    total = S.sum()
    share = S / total if total > 0 else torch.full_like(S, 1 / S.numel())
    return torch.multinomial((1 / S.numel() + share) / 2, r, generator=generator).sort().values


def sst_layers(model: nn.Module) -> list[SSTLinear]:
    """The SST layers of `model`, in module order.

    Raises:
        UserError: there are none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SSTLinear)]
    if not layers:
        raise UserError(f"SST needs a model with SST layers, got {type(model).__name__} without any")
    return layers


def redraw(model: nn.Module, *, seed: int, step: int, count: int, svd_every: int | None = None) -> None:
    """Draws new active pairs in all layers; the draws depend on the seed, the step and the layer's name alone.

    Processes of a launch must call this together.

    Args:
        count: the number of this draw, counted from 1.
        svd_every: draws between new SVDs; default: ⌈k / r⌉ of each layer, enough to draw every pair once.
    """
    for layer in sst_layers(model):
        every = svd_every or -(-layer.sst_S[layer.adapter].numel() // layer.r[layer.adapter])
        layer.redraw(keyed_generator(seed, step, layer.layer_name), decompose=count % every == 0)


class SSTCallback(PeriodicCallback):
    """Normalises after every optimizer step, and every `redraw_every` steps draws new active pairs.

    A draw starts the moments and the step count of Adam anew for everything that an SST layer trains. The arguments
    are settings of the method, see `SSTSettings`.

    Raises:
        UserError: a value is not allowed, or the model has no SST layers.
    """

    title, log_key = "draw of singular vectors", "sst_draws"

    def __init__(self, *, redraw_every: int, svd_every: int | None = None, seed: int = 0) -> None:
        check_options(SSTSettings, {"redraw_every": redraw_every, "svd_every": svd_every}, type(self).__name__)
        self.restart_every, self.svd_every, self.seed = redraw_every, svd_every, seed

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        sst_layers(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for layer in sst_layers(model):
            layer.normalise()
        super().on_step_end(args, state, control, model=model, **kwargs)

    def restart(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        redraw(model, seed=self.seed, step=step, count=step // self.restart_every, svd_every=self.svd_every)
        for layer in sst_layers(model):
            own = [getattr(layer, name)[layer.adapter] for name in layer.adapter_layer_names]
            reset_state(inner(optimizer), own)


def build_sst_scheduler(
    optimizer: Optimizer, settings: SSTSettings, args: TrainingArguments, num_training_steps: int
) -> LRScheduler:
    """Trainer's schedule with a warm-up from zero after each draw."""
    return recovering_scheduler(
        optimizer,
        args,
        num_training_steps,
        restart_every=settings.redraw_every,
        recovery_steps=settings.redraw_warmup_steps,
        floor=0.0,
    )


def sst_callbacks(settings: SSTSettings, args: TrainingArguments) -> Sequence[TrainerCallback]:
    """The callback.

    Raises:
        UserError: a warm-up would not end before the next draw.
    """
    every, warmup = settings.redraw_every, settings.redraw_warmup_steps
    if warmup > every:
        raise UserError(f"redraw_warmup_steps must be at most redraw_every = {every}, got {warmup}")
    return [SSTCallback(redraw_every=every, svd_every=settings.svd_every, seed=settings.seed_or(args.seed))]
