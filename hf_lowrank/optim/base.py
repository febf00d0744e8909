"""What every optimizer here does beside its method: groups, finite gradients, the rest's AdamW, saving, loading.

Some groups are *targets* of a method; all other parameters get plain AdamW.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.optim.adam import ADAM_VARIANTS, adamw_
from hf_lowrank.optim.layerwise import Layerwise
from hf_lowrank.optim.moments import (
    STATE_DTYPES,
    check_8bit_available,
    init_moments,
    moment_dtype,
    read_moments,
    round_stochastically_,
    write_moments,
)
from hf_lowrank.optim.subspaces import draw_generator

# What torch, its schedulers and Trainer put into groups beside an optimizer's own options.
FOREIGN_KEYS = frozenset({"params", "param_names", "initial_lr", "swa_lr", "max_lr", "min_lr", "name"})

Params = nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Bound = tuple[Callable[[Any], bool], str]


class Entry(NamedTuple):
    """A parameter that is to be stepped."""

    group: dict[str, Any]
    param: Tensor
    grad: Tensor


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class TargetedAdamW(Optimizer):
    """AdamW for all but the target groups, whose update a subclass gives in `_update_targets`."""

    def __init__(self, params: Any, defaults: dict[str, Any], *, layerwise: bool = False) -> None:
        self._forget()
        self._names: dict[Tensor, str] = {}
        self._warned: set[Tensor] = set()
        self._layerwise = Layerwise(self) if layerwise else None
        self._check_options(defaults, type(self).__name__)
        super().__init__(params, defaults)

    # What a subclass says

    def _is_target(self, group: dict[str, Any]) -> bool:
        raise NotImplementedError

    def _update_targets(self, entries: Sequence[Entry]) -> None:
        raise NotImplementedError

    def _adopt(self, group: dict[str, Any], param: Tensor) -> None:
        """Checks a target and decides how it is handled."""

    def _forget(self) -> None:
        """Drops what `_adopt` decided."""

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return {"adam_variant": ADAM_VARIANTS, "state_dtype": STATE_DTYPES}

    def _bounds(self) -> dict[str, Bound]:
        return {
            "lr": (lambda x: float(x) >= 0, "at least 0"),
            "eps": (lambda x: x >= 0, "at least 0"),
            "weight_decay": (lambda x: x >= 0, "at least 0"),
            "betas": (lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x), "two numbers from 0 to below 1"),
        }

    # Groups

    def _check_options(self, options: dict[str, Any], where: str) -> None:
        for key, allowed in self._choices().items():
            if options[key] not in allowed:
                raise UserError(f"{key} of {where} must be one of {', '.join(allowed)}, got {options[key]!r}")
        for key, (good, allowed_text) in self._bounds().items():
            if not good(options[key]):
                raise UserError(f"{key} of {where} must be {allowed_text}, got {options[key]!r}")
        if options["state_dtype"] == "8bit":
            check_8bit_available()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its options and its targets are checked here, once.

        Raises:
            UserError: an unknown option, one out of range, or a target that the method cannot handle, by name.
        """
        unknown = set(param_group) - set(self.defaults) - FOREIGN_KEYS
        if unknown:
            key = sorted(unknown)[0]
            raise UserError(f"unknown option {key!r} of a parameter group; {nearest(key, self.defaults)}")
        super().add_param_group(param_group)
        number = len(self.param_groups) - 1
        group = self.param_groups[number]
        try:
            self._check_options(group, f"parameter group {number}")
            names = group.get("param_names") or [
                f"parameter {i} of group {number}" for i in range(len(group["params"]))
            ]
            for name, param in zip(names, group["params"], strict=True):
                self._names[param] = name
                if self._is_target(group):
                    self._adopt(group, param)
        except UserError:
            del self.param_groups[number]
            raise
        if self._layerwise is not None:
            self._layerwise.attach(number, group["params"])

    def name_of(self, param: Tensor) -> str:
        """The parameter's name, or its place where it was given without one."""
        return self._names.get(param, "a parameter")

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step. A parameter whose gradient is not finite is left alone, with a warning.

        With `layerwise` the backward pass has made the step already, and this is only where Trainer expects it.

        Raises:
            UserError: a sparse gradient, naming its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._layerwise is None:
            self._update(
                [
                    Entry(group, param, param.grad)
                    for group in self.param_groups
                    for param in group["params"]
                    if param.grad is not None
                ]
            )
        return loss

    def _update(self, entries: Sequence[Entry]) -> None:
        entries = self._finite(entries)
        self._update_targets([entry for entry in entries if self._is_target(entry.group)])
        self._update_rest([entry for entry in entries if not self._is_target(entry.group)])

    def _keep_part(self, group: dict[str, Any], param: Tensor) -> bool:
        """In a backward pass that does not end a step: whether the gradient was taken over and can go."""
        return False

    def _update_one(self, group: dict[str, Any], param: Tensor) -> None:
        """One parameter's step inside the backward pass."""
        assert param.grad is not None
        self._update([Entry(group, param, param.grad)])

    def accumulating(self) -> AbstractContextManager[None]:
        """With `layerwise` and without accelerate: backward passes in this context end no optimizer step."""
        return nullcontext() if self._layerwise is None else self._layerwise.accumulating()

    def _finite(self, entries: Sequence[Entry]) -> list[Entry]:
        by_kind: dict[tuple[torch.device, torch.dtype], list[Entry]] = {}
        for entry in entries:
            if entry.grad.layout != torch.strided:
                raise UserError(
                    f"the gradient of {self.name_of(entry.param)} must be dense, got a sparse one; "
                    "use nn.Embedding(sparse=False) or another optimizer for it"
                )
            by_kind.setdefault((entry.grad.device, entry.grad.dtype), []).append(entry)
        good: set[Tensor] = set()
        for group in by_kind.values():
            # A norm that overflows counts too: Adam's second moment would overflow with it.
            norms = torch._foreach_norm([entry.grad for entry in group], dtype=_accumulation_dtype(group[0].grad))
            flags = torch.isfinite(torch.stack(norms)).tolist()
            good.update(entry.param for entry, finite in zip(group, flags, strict=True) if finite)
        if len(good) < len(entries):
            self._warn_of_skipped([entry.param for entry in entries if entry.param not in good])
        return [entry for entry in entries if entry.param in good]

    def _warn_of_skipped(self, params: Sequence[Tensor]) -> None:
        new = [param for param in params if param not in self._warned]
        self._warned.update(new)
        if new:
            names = ", ".join(map(self.name_of, new[:3])) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
            warnings.warn(f"the gradient of {names} is not finite; such steps are skipped", stacklevel=5)

    # The rest

    def _update_rest(self, entries: Sequence[Entry]) -> None:
        alike: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in entries:
            state = self.state[entry.param]
            if not state:
                state["step"] = 0
                init_moments(state, tuple(entry.param.shape), entry.group["state_dtype"], entry.param)
            state["step"] += 1
            in_place = state["exp_avg"].dtype == entry.param.dtype and not self._rounds(entry)
            # What needs a wide copy goes one at a time.
            alone = None if in_place else entry.param
            key = (id(entry.group), state["step"], entry.param.device, entry.param.dtype, alone)
            alike.setdefault(key, []).append(entry)
        for (_, age, *_, alone), members in alike.items():
            group = members[0].group
            dtype = members[0].param.dtype if alone is None else self._wide_dtype(members[0])
            weights = [entry.param.to(dtype) for entry in members]
            moments = [read_moments(self.state[entry.param]) for entry in members]
            exp_avgs, exp_avg_sqs = ([moment.to(dtype) for moment in kind] for kind in zip(*moments, strict=True))
            adamw_(
                weights,
                [entry.grad.to(dtype) for entry in members],
                exp_avgs,
                exp_avg_sqs,
                age=age,
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                variant=group["adam_variant"],
            )
            if alone is not None:
                write_moments(self.state[alone], exp_avgs[0], exp_avg_sqs[0])
                self._write_weight(members[0], weights[0])

    # Weights in sixteen bits

    def _rounds(self, entry: Entry) -> bool:
        return bool(entry.group["stochastic_rounding"]) and entry.param.dtype == torch.bfloat16

    def _wide_dtype(self, entry: Entry) -> torch.dtype:
        return torch.promote_types(entry.param.dtype, torch.float32)

    def _write_weight(self, entry: Entry, wide: Tensor) -> None:
        """Brings an updated wide copy back into the parameter; to be called after its step is counted."""
        if wide is entry.param:
            return
        if not self._rounds(entry):
            entry.param.copy_(wide)
            return
        key = (entry.group["seed"], self._places()[entry.param], self.state[entry.param]["step"])
        round_stochastically_(entry.param, wide, draw_generator(wide.device, *key))

    def _places(self) -> dict[Tensor, int]:
        return {param: i for i, param in enumerate(p for group in self.param_groups for p in group["params"])}

    # Saving and loading

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads `state_dict()`'s result, from any device or weight type.

        torch casts every floating state to its parameter's type; here each tensor keeps the type in which this
        optimizer holds it, so that resuming is exact.
        """
        super().load_state_dict(state_dict)
        saved_ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        for number, (group, param) in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    dtype = self._kept_dtype(key, value, group, param)
                    loaded = value.to(device=param.device, dtype=dtype)
                    self.state[param][key] = loaded.clone() if loaded is value else loaded
        self._forget()
        for group, param in params:
            if self._is_target(group):
                self._adopt(group, param)

    def _kept_dtype(self, key: str, value: Tensor, group: dict[str, Any], param: Tensor) -> torch.dtype:
        if key in ("exp_avg", "exp_avg_sq") and value.is_floating_point():
            return moment_dtype(group["state_dtype"], param)
        return value.dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_names" not in self.__dict__:  # unpickled, not loaded
            self._forget()
            self._names, self._warned, self._layerwise = {}, set(), None
            for group in self.param_groups:
                for param in group["params"]:
                    if self._is_target(group):
                        self._adopt(group, param)


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
