"""Moving a model's weights along directions, and restoring them bit for bit.

Two ways give the same numbers: `memory="copy"` keeps a second set of weights and writes every point into the model;
`memory="low"` never writes the stored weights and computes a layer's perturbed weights, block by block, only while
that layer runs.

Of a model sharded by FSDP2 each process moves its shard of every parameter, with `memory="copy"`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from .directions import Direction, row_blocks
from .losses import Loss
from .sharding import LocalShard, as_rows, full_norms, local_shard, local_tensor

Memory = Literal["copy", "low"]
Point = Sequence[tuple[Direction, float]]


@contextmanager
def movable(model: nn.Module, *, memory: Memory = "copy") -> Iterator[Callable[[Point], None]]:
    """Yields `move(point)`, which moves the model to `θ + Σ t·d` over the pairs (d, t) of `point`; `move(())` is θ.

    In the block the model is in eval mode and no gradients are recorded. After it, also after an exception or Ctrl-C,
    every weight has its original bits and the model its original mode.

    Raises:
        ValueError: a parameter is neither float32 nor float64 (lower precision swallows the perturbation), or
            `memory` is unknown, or "low" for a sharded model.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"parameters must be float32, {name} is {parameter.dtype}; convert with model.float()")
        if not parameter.is_contiguous():
            raise ValueError(f"parameters must be contiguous to be perturbed, {name} is not")
    if memory not in ("copy", "low"):
        raise ValueError(f"memory must be 'copy' or 'low', got {memory!r}")
    if memory == "low" and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("memory must be 'copy' for a sharded model: the copy is sharded as well")
    with eval_mode(model):
        mover = _Copy(model) if memory == "copy" else _Virtual(model)
        try:
            with torch.no_grad():
                yield mover.move
            mover.check()
        finally:
            _uninterrupted(mover.close)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode and restores its mode after the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def sweep(
    model: nn.Module, loss: Loss, *, memory: Memory = "copy", progress: Callable[[], None] | None = None
) -> Iterator[Callable[[Point], float]]:
    """Yields `loss_at(point)`, the loss of the model moved as by `movable`; calls `progress` after each evaluation."""
    with movable(model, memory=memory) as move:

        def loss_at(point: Point) -> float:
            move(point)
            value = float(loss(model))
            if progress:
                progress()
            return value

        yield loss_at


def _uninterrupted(close: Callable[[], None]) -> None:
    """Runs `close` to its end even if Ctrl-C is pressed meanwhile."""
    try:
        close()
    except KeyboardInterrupt:
        _uninterrupted(close)
        raise


class _Copy:
    """Keeps the original weights; every point is computed from them, so no error accumulates."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        norms = full_norms({name: p.detach() for name, p in self.parameters.items() if isinstance(p, DTensor)})
        self.originals = {
            name: local_shard(p.detach().clone(), norms.get(name)) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def move(self, point: Point) -> None:
        for name, parameter in self.parameters.items():
            original, target_RC = self.originals[name], as_rows(local_tensor(parameter))
            target_RC.copy_(original.entries_RC)
            add_point(name, target_RC, original, point)

    def check(self) -> None:
        """Every parameter is written at every point, so there is nothing to check."""

    def close(self) -> None:
        self.move(())


def add_point(name: str, target_RC: Tensor, original: LocalShard, point: Point) -> None:
    """`target += Σ t·d` in place, on the entries of the parameter that this process holds."""
    for start, stop in row_blocks(*original.shape) if point else ():
        target = target_RC[original.local_rows(start, stop)]
        if target.numel():
            _add_block(name, target, original, (start, stop), point)


def _add_block(name: str, target: Tensor, original: LocalShard, rows: tuple[int, int], point: Point) -> None:
    for direction, t in point:
        block = direction.block(name, original, *rows) if t else None
        if block is not None:
            target.add_(block, alpha=t)


def _own_parameters(module: nn.Module) -> Iterator[Tensor]:
    """A module's own parameters, with those in its parameter lists and dicts, which have no forward pass."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, nn.ParameterDict | nn.ParameterList):
            yield from child.parameters()


class _Virtual:
    """Replaces layers' forward functions by ones that perturb the weights on the fly.

    Linear and embedding layers compute from perturbed row blocks and never write their weights. The parameters of any
    other module are perturbed in place before its forward pass and restored after it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.point: Point = ()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.handles: list[Any] = []
        self.replaced: dict[nn.Module, Callable | None] = {}  # instance attributes, None where there was none
        self.held: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self.owners: dict[nn.Module, str] = {}
        self.ran: set[nn.Module] = set()
        for name, module in model.named_modules():
            if isinstance(module, nn.ParameterDict | nn.ParameterList) or next(_own_parameters(module), None) is None:
                continue
            self.owners[module] = name
            if type(module) is nn.Linear and module.weight is not None:
                self._replace(module, self._linear)
                module.__dict__["row_block"] = partial(self._row_block, module)
            elif type(module) is nn.Embedding and module.max_norm is None:
                self._replace(module, self._embedding)
            else:
                self.handles.append(module.register_forward_pre_hook(self._hold))
                self.handles.append(module.register_forward_hook(self._release, always_call=True))

    def move(self, point: Point) -> None:
        self.check()
        self.point = point

    def check(self) -> None:
        """Raises ValueError if the last evaluation did not run every module with parameters: those were not moved."""
        missed = [name for module, name in self.owners.items() if module not in self.ran]
        ran, self.ran = self.ran, set()
        if ran and missed:
            raise ValueError(
                f"memory='low' moves parameters of modules that run; {missed[0]} did not run, or other modules use "
                "its parameters; use memory='copy'"
            )

    def close(self) -> None:
        self.point = ()
        while self.held:
            self._release(next(iter(self.held)))
        for handle in self.handles:
            handle.remove()
        for module, forward in self.replaced.items():
            module.__dict__.pop("forward", None)
            module.__dict__.pop("row_block", None)
            if forward is not None:
                module.__dict__["forward"] = forward

    def _replace(self, module: nn.Module, forward: Callable) -> None:
        self.replaced[module] = module.__dict__.get("forward")
        module.__dict__["forward"] = partial(forward, module)

    def _linear(self, module: nn.Linear, x: Tensor) -> Tensor:
        x = x.to(module.weight.device)  # accelerate's hooks for several devices are in the replaced forward
        if not self.point:
            return functional.linear(x, module.weight, module.bias)
        self.ran.add(module)
        y = x.new_empty(*x.shape[:-1], module.out_features)
        for start, stop in row_blocks(*module.weight.shape):
            y[..., start:stop] = functional.linear(x, self._rows(module.weight, start, stop))
        if module.bias is not None:
            y += self._whole(module.bias)
        return y

    def _row_block(self, module: nn.Linear, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        bias = None if module.bias is None else self._whole(module.bias)[start:stop]
        weight = module.weight.detach()[start:stop]
        if self.point:
            self.ran.add(module)
            weight = weight.clone()
            for first, last in row_blocks(*module.weight.shape):
                low, high = max(first, start), min(last, stop)
                if low < high:
                    rows = self._rows(module.weight, first, last)
                    weight[low - start : high - start] = rows[low - first : high - first]
        return weight, bias

    def _embedding(self, module: nn.Embedding, ids: Tensor) -> Tensor:
        ids = ids.to(module.weight.device)
        out = functional.embedding(ids, module.weight)
        if not self.point:
            return out
        self.ran.add(module)
        flat_ids, out_rows = ids.flatten(), out.view(-1, out.shape[-1])
        for start, stop in row_blocks(*module.weight.shape):
            here = ((flat_ids >= start) & (flat_ids < stop)).nonzero().squeeze(1)
            if here.numel():
                out_rows[here] = self._rows(module.weight, start, stop)[flat_ids[here] - start]
        return out

    def _rows(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """A perturbed copy of one row block."""
        name, original = self.names[id(weight)], weight.detach()
        rows = original[start:stop].clone()
        _add_block(name, rows, local_shard(original), (start, stop), self.point)
        return rows

    def _whole(self, parameter: Tensor) -> Tensor:
        copy = parameter.detach().clone()
        add_point(self.names[id(parameter)], as_rows(copy), local_shard(parameter.detach()), self.point)
        return copy

    @torch.no_grad()
    def _hold(self, module: nn.Module, inputs: Any) -> None:
        if not self.point or module in self.held:
            return
        self.ran.add(module)
        kept = [(parameter, parameter.detach().clone()) for parameter in _own_parameters(module)]
        self.held[module] = kept
        for parameter, original in kept:
            add_point(self.names[id(parameter)], as_rows(parameter), local_shard(original), self.point)

    @torch.no_grad()
    def _release(self, module: nn.Module, *_: Any) -> None:
        for parameter, original in self.held.get(module, ()):
            parameter.copy_(original)
        self.held.pop(module, None)
