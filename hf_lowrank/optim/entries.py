"""The parameters of one optimizer step, and questions about the gradients of all of them at once."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.compat import foreach_norm
from hf_lowrank.optim.adam import host_reads
from hf_lowrank.optim.layout import Layout
from hf_lowrank.optim.sharding import agree_all, local_part, sharding_of
from hf_lowrank.optim.state import StateTensor, round_stochastically_
from hf_lowrank.optim.subspaces import draw_generator, largest
from hf_lowrank.storage.codes import coded_layer


@dataclass(frozen=True, eq=False)
class ParameterInfo:
    """What is decided once about a parameter, when it is added to the optimizer.

    Attributes:
        name: as in its group, or its position there.
        ref: the parameter; weak, so that one that sharding replaces can be freed.
        position: among all of the optimizer's parameters; seeds stochastic rounding.
        layout: of a target; None for a parameter that gets plain AdamW.
        kind: equal for parameters whose matrices can be stepped in one batch.
        declared: its state, see `TargetedAdamW.declare_state`.
    """

    name: str
    ref: weakref.ref[Tensor]
    position: int
    layout: Layout | None
    kind: int
    declared: dict[str, StateTensor | int]


@dataclass(eq=False, slots=True)
class Entry:
    """A parameter that is stepped.

    Attributes:
        weight, grad: this process's part of the parameter and of its gradient.
        layout: that of a target; only targets may be asked for it.
        state: the optimizer's state of the parameter, from when its step begins.
        finite: on a device whose values the host does not read, whether the gradient is finite, a number; None where
            the host knows that it is.
    """

    info: ParameterInfo
    group: dict[str, Any]
    param: Tensor
    weight: Tensor
    grad: Tensor
    layout: Layout
    state: dict[str, Any]
    finite: Tensor | None = None

    @property
    def age(self) -> int:
        """Number of Adam steps since the moments were zero."""
        age: int = self.state["step"] - self.state.get("reset_at", 0)
        return age

    @property
    def rounds(self) -> bool:
        """Whether the weight is rounded stochastically."""
        if coded_layer(self.param) is not None:
            return True
        return bool(self.group["stochastic_rounding"]) and self.param.dtype == torch.bfloat16

    def declared(self, key: str) -> StateTensor:
        """The declaration of one of its state tensors."""
        declared = self.info.declared[key]
        assert isinstance(declared, StateTensor)
        return declared

    def read(self, key: str) -> Tensor:
        """A state tensor to compute with, see `StateTensor.read`."""
        return self.declared(key).read(self.state, key)

    def write(self, key: str, value: Tensor) -> None:
        """Stores what was computed from `read`'s tensor."""
        self.declared(key).write(self.state, key, value)

    def create_state(self) -> None:
        """Gives the state everything that is declared with an initial value."""
        self.state["step"] = 0
        for key, declared in self.info.declared.items():
            if not isinstance(declared, StateTensor):
                self.state[key] = declared
            elif declared.initial is not None:
                declared.create(self.state, key, self.param, self.info.layout, self.group["state_dtype"])

    def wide_weight(self) -> Tensor:
        """The weight to update: itself, or a float32 copy if it is rounded stochastically."""
        layer = coded_layer(self.param)
        if layer is not None:
            return layer.read_weight()
        return self.weight.float() if self.rounds else self.weight

    def write_weight(self, updated: Tensor) -> None:
        """Writes an updated copy of the weight back, if it is one; to be called once the step is counted."""
        if updated is self.weight:
            return
        layer = coded_layer(self.param)
        if layer is not None:
            generator = draw_generator(updated.device, self.group["seed"], self.info.position, self.state["step"])
            noise = torch.rand(updated.shape, generator=generator, device=updated.device, dtype=torch.float32)
            layer.write_weight(updated, noise, self.finite)
            return
        if self.finite is not None:
            updated = torch.where(self.finite, updated, self.weight.to(updated.dtype))
        if not self.rounds:
            self.weight.copy_(updated)
            return
        generator = draw_generator(updated.device, self.group["seed"], self.info.position, self.state["step"])
        sharding = sharding_of(self.param)
        rows = None if sharding is None else (sharding, self.param.shape[0])
        round_stochastically_(self.weight, updated, generator, rows)


_UNKNOWN: dict[str, Any] = {}


def entry_of(info: ParameterInfo, group: dict[str, Any], param: Tensor) -> Entry:
    """The entry of a parameter that has a gradient."""
    grad = param.grad
    assert grad is not None
    layout = cast(Layout, info.layout)
    if not isinstance(param, DTensor):
        return Entry(info, group, param, param, grad, layout, _UNKNOWN)
    if isinstance(grad, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return Entry(info, group, param, local_part(param), local_part(grad), layout, _UNKNOWN)


def entries_with(
    test: Callable[[list[Tensor]], Tensor], entries: Sequence[Entry], *, anywhere: bool = False
) -> list[Entry]:
    """The entries whose gradients pass `test` on every process, or `anywhere`: on at least one.

    Args:
        test: gives a flag for each of several gradients that share type and device.
    """
    failed: set[Entry] = set()
    for alike, flags in _flags(test, entries, anywhere=anywhere):
        passed = flags.tolist()
        if not all(passed):
            failed.update(entry for entry, flag in zip(alike, passed, strict=True) if not flag)
    return [entry for entry in entries if entry not in failed] if failed else list(entries)


def _flags(
    test: Callable[[list[Tensor]], Tensor], entries: Sequence[Entry], *, anywhere: bool
) -> Iterator[tuple[list[Entry], Tensor]]:
    """Entries of a kind, and a flag for each."""
    by_kind: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        mesh = entry.param.device_mesh if isinstance(entry.param, DTensor) else None
        by_kind.setdefault((entry.grad.device, entry.grad.dtype, mesh), []).append(entry)
    for (*_, mesh), alike in by_kind.items():
        flags = test([entry.grad for entry in alike])
        if mesh is not None:
            flags = ~agree_all(~flags, mesh) if anywhere else agree_all(flags, mesh)
        yield alike, flags


def nonzero(entries: Sequence[Entry]) -> list[Entry]:
    """The entries whose gradients are not all zeros."""
    return entries_with(lambda grads: torch.stack([are_any(grad.flatten()) for grad in grads]), entries, anywhere=True)


def are_any(values: Tensor) -> Tensor:
    """Whether values along the last dimension are not all zeros; on a CPU several times faster than `any`."""
    if values.is_complex() or not values.shape[-1]:
        return values.any(-1)
    return largest(values, -1) != 0


def finite(entries: Sequence[Entry]) -> list[Entry]:
    """The entries whose gradients have a finite norm: if it overflows, so does the second moment."""
    return entries_with(_have_finite_norms, entries)


def flag_finite(entries: Sequence[Entry]) -> None:
    """Sets `Entry.finite` to what `finite` asks, on the gradients' devices, without reading it."""
    for alike, flags in _flags(_have_finite_norms, entries, anywhere=False):
        for entry, flag in zip(alike, flags.unbind(), strict=True):
            entry.finite = flag if entry.finite is None else entry.finite & flag


def _have_finite_norms(grads: list[Tensor]) -> Tensor:
    grads = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    if host_reads(grads[0].device) and grads[0].dtype == dtype and all(grad.is_contiguous() for grad in grads):
        # A third faster than the CPU's norm, and overflows with it.
        return torch.isfinite(torch.stack([torch.dot(flat, flat) for flat in (grad.view(-1) for grad in grads)]))
    return torch.isfinite(torch.stack(foreach_norm(grads, dtype=dtype)))
