"""What every optimizer here does beside its method: groups, finite gradients, the rest's AdamW, saving, loading.

Some groups are *targets* of a method; all other parameters get plain AdamW.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from hf_lowrank.errors import LowRankWarning, UserError, nearest
from hf_lowrank.optim.adam import ADAM_VARIANTS, adamw_
from hf_lowrank.optim.engines import flattened, flattened_by
from hf_lowrank.optim.layerwise import Layerwise
from hf_lowrank.optim.moments import (
    STATE_DTYPES,
    check_8bit_available,
    init_moments,
    moment_dtype,
    read_moments,
    round_stochastically_,
    write_moments,
    zero_moment,
)
from hf_lowrank.optim.plan import Entry, Part, Plan, with_gradient
from hf_lowrank.optim.sharding import agree_all, local_part, sharding_of
from hf_lowrank.optim.subspaces import draw_generator
from hf_lowrank.optim.table import parameter_table

logger = logging.getLogger(__name__)

# What torch, its schedulers and Trainer put into groups beside an optimizer's own options.
FOREIGN_KEYS = frozenset({"params", "param_names", "initial_lr", "swa_lr", "max_lr", "min_lr", "name"})

Params = nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Bound = tuple[Callable[[Any], bool], str]


def entry_of(group: dict[str, Any], param: Tensor) -> Entry:
    """The entry of a parameter that has a gradient."""
    grad = param.grad
    if isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    assert grad is not None
    return Entry(group, param, local_part(param), local_part(grad))


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class TargetedAdamW(Optimizer):
    """AdamW for all but the target groups, whose update a subclass gives in `_update_targets`."""

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, layerwise: bool = False, diagnostics: bool = False
    ) -> None:
        self._forget()
        self._names: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()
        self._warned: set[str] = set()
        self._settled = False
        self._plan: Plan | None = None
        self._stepped: list[Tensor] = []
        self._layerwise = Layerwise(self) if layerwise else None
        self.diagnostics: dict[str, dict[str, float]] | None = {} if diagnostics else None
        self._check_options(defaults, type(self).__name__)
        super().__init__(params, defaults)

    # What a subclass says

    def _is_target(self, group: dict[str, Any]) -> bool:
        raise NotImplementedError

    def _update_targets(self, entries: Sequence[Entry]) -> None:
        raise NotImplementedError

    def _plan_targets(self, entries: Sequence[Entry]) -> list[Part] | None:
        """How to step these targets again, with parameters in the place of gradients; None for no plan."""
        return None

    def _adopt(self, group: dict[str, Any], param: Tensor) -> None:
        """Checks a target and decides how it is handled."""

    def _how(self, group: dict[str, Any], param: Tensor) -> str:
        """What the table of parameters says of a target."""
        raise NotImplementedError

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
            self._take_in(number)
        except UserError:
            del self.param_groups[number]
            raise
        if self._layerwise is not None:
            self._layerwise.attach(number, group["params"])

    def _take_in(self, number: int) -> None:
        """Takes note of a group's parameters as they are now."""
        self._plan = None
        group = self.param_groups[number]
        params = group["params"]
        names = group.get("param_names") or [f"parameter {i} of group {number}" for i in range(len(params))]
        if len(names) != len(params):
            raise flattened(type(self).__name__, f"parameter group {number}", "an engine such as DeepSpeed ZeRO")
        for name, param in zip(names, params, strict=True):
            engine = flattened_by(param)
            if engine is not None:
                raise flattened(type(self).__name__, name, engine)
            if isinstance(param, DTensor) and group["state_dtype"] == "8bit":
                raise UserError(
                    f"state_dtype must be parameter or float32 for sharded parameters, got '8bit' for {name}; "
                    "the shards of a block of 256 values could lie on two processes"
                )
            if isinstance(param, DTensor) and self._layerwise is not None:
                raise UserError(f"layerwise must be off for sharded parameters such as {name}; leave it out")
            self._names[param] = name
            if self._is_target(group):
                self._adopt(group, param)

    def _take_in_all(self) -> None:
        self._forget()
        for number in range(len(self.param_groups)):
            self._take_in(number)

    def _settle(self) -> None:
        """Takes in the parameters that sharding has put in the place of those given, as accelerate's FSDP2 does."""
        params = [param for group in self.param_groups for param in group["params"]]
        if any(param not in self._names or flattened_by(param) for param in params):
            known = set(map(id, params))
            if any(id(param) not in known for param in self.state):
                raise UserError(
                    f"{type(self).__name__} made steps before its parameters were sharded, and their state is lost; "
                    "shard first, or load the state afterwards"
                )
            for number, group in enumerate(self.param_groups):
                if self._is_target(group) and any(param.ndim < 2 for param in group["params"]):
                    raise flattened(type(self).__name__, f"parameter group {number}", "FSDP1 or DeepSpeed ZeRO")
            self._take_in_all()
        if not self._settled:
            self._settled = True
            if not any(group["params"] for group in self.param_groups if self._is_target(group)):
                raise UserError(f"{type(self).__name__} has no target matrix among its parameters; name some")
            pretended = any(isinstance(param, FakeTensor) for param in params)
            if not pretended and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
                logger.info("%s", self.parameter_table())

    def parameter_table(self) -> str:
        """Which parameters the method acts on and which it leaves to AdamW, a line for all that are alike."""
        rows = [
            (self.name_of(param), param, self._how(group, param) if self._is_target(group) else "AdamW")
            for group in self.param_groups
            for param in group["params"]
        ]
        return parameter_table(type(self).__name__, rows)

    def name_of(self, param: Tensor) -> str:
        """The parameter's name, or its place where it was given without one."""
        return self._names.get(param, "a parameter")

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step. A parameter whose gradient is not finite is left alone, with a warning.

        A step without state, at a learning rate of zero and with gradients of zero, as torch.distributed.checkpoint
        makes it to have state to load into, is not counted.

        With `layerwise` the backward pass has made the step already, and this is only where Trainer expects it.

        Raises:
            UserError: a sparse gradient, naming its parameter, or parameters that an engine has flattened.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._plan is not None and self._step_as_planned(self._plan):
            return loss
        self._plan = None
        self._settle()
        if self._layerwise is None:
            entries = [
                entry_of(group, param)
                for group in self.param_groups
                for param in group["params"]
                if param.grad is not None
            ]
            is_trial = self._is_trial(entries)
            self._update(entries)
            if is_trial:
                self._begin_anew()
            self._plan = self._plan_of(entries)
        return loss

    def _step_as_planned(self, plan: Plan) -> bool:
        """Steps by the plan; False, and nothing is done, where it does not hold or a gradient is not finite."""
        taken = plan.take(self)
        if taken is None or not all(bool(_finite_norms(alike).all()) for alike in plan.alike(taken[0])):
            return False
        plan.step(self, *taken)
        return True

    def _plan_of(self, entries: Sequence[Entry]) -> Plan | None:
        """The plan for steps like that of `entries`, once the same parameters were stepped twice."""
        params = [entry.param for entry in entries]
        before, self._stepped = self._stepped, params
        again = len(before) == len(params) and all(map(is_, before, params))
        if not again or not all(type(param) in (Tensor, nn.Parameter) and self.state.get(param) for param in params):
            return None
        bare = [with_gradient(entry, entry.param) for entry in entries]  # a plan keeps no gradient alive
        targets = self._plan_targets([entry for entry in bare if self._is_target(entry.group)])
        if targets is None:
            return None
        rest = [entry for entry in bare if not self._is_target(entry.group)]
        return Plan(self, [*targets, Part(rest, lambda optimizer, entries, _: optimizer._update_rest(entries))])

    def _update(self, entries: Sequence[Entry]) -> None:
        entries = self._finite(entries)
        self._update_targets([entry for entry in entries if self._is_target(entry.group)])
        self._update_rest([entry for entry in entries if not self._is_target(entry.group)])

    def _keep_part(self, group: dict[str, Any], param: Tensor) -> bool:
        """In a backward pass that does not end a step: whether the gradient was taken over and can go."""
        return False

    def _update_one(self, group: dict[str, Any], param: Tensor) -> None:
        """One parameter's step inside the backward pass."""
        self._update([entry_of(group, param)])

    def accumulating(self) -> AbstractContextManager[None]:
        """With `layerwise` and without accelerate: backward passes in this context end no optimizer step."""
        return nullcontext() if self._layerwise is None else self._layerwise.accumulating()

    @property
    def skipped(self) -> frozenset[str]:
        """Names of this process's parameters that went without a step because their gradient was not finite."""
        return frozenset(self._warned)

    def _finite(self, entries: Sequence[Entry]) -> list[Entry]:
        for entry in entries:
            if entry.grad.layout != torch.strided:
                raise UserError(
                    f"the gradient of {self.name_of(entry.param)} must be dense, got a sparse one; "
                    "use nn.Embedding(sparse=False) or another optimizer for it"
                )
        good = those_whose_gradients(_finite_norms, entries)
        if len(good) < len(entries):
            self._warn_of_skipped([entry.param for entry in entries if entry.param not in good])
        return [entry for entry in entries if entry.param in good]

    def _is_trial(self, entries: Sequence[Entry]) -> bool:
        """Whether a step only makes state, as torch.distributed.checkpoint asks for it before the first one."""
        if self.state or any(float(group["lr"]) for group in self.param_groups):
            return False
        return all(entry.grad.layout == torch.strided for entry in entries) and not not_zero(entries)

    def _begin_anew(self) -> None:
        """Lets the next step be the first, of moments that are zero."""
        for state in self.state.values():
            state.update(dict.fromkeys(state.keys() & {"step", "refreshes", "reset_at"}, 0))

    def _warn_of_skipped(self, params: Sequence[Tensor]) -> None:
        new = [name for name in map(self.name_of, params) if name not in self._warned]
        self._warned.update(new)
        if new:
            names = ", ".join(new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
            line = f"the gradient of {names} is not finite; such steps are skipped"
            warnings.warn(line, LowRankWarning, stacklevel=5)

    # The rest

    def _update_rest(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            state = self.state[entry.param]
            if not state:
                state["step"] = 0
                init_moments(state, zero_moment(entry.group["state_dtype"], entry.param), entry.group["state_dtype"])
            state["step"] += 1
        for members in self._rest_alike(entries):
            self._step_rest(members)

    def _rest_alike(self, entries: Sequence[Entry]) -> Iterable[list[Entry]]:
        """What is stepped together; what needs a wide copy goes alone."""
        alike: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in entries:
            alone = None if self._in_place(entry) else entry.param
            key = (id(entry.group), self.state[entry.param]["step"], entry.param.device, entry.param.dtype, alone)
            alike.setdefault(key, []).append(entry)
        return alike.values()

    def _in_place(self, entry: Entry) -> bool:
        return self.state[entry.param]["exp_avg"].dtype == entry.param.dtype and not self._rounds(entry)

    def _step_rest(self, members: Sequence[Entry]) -> None:
        first, in_place = members[0], self._in_place(members[0])
        group = first.group
        weights, grads = [entry.weight for entry in members], [entry.grad for entry in members]
        exp_avgs, exp_avg_sqs = map(
            list, zip(*(read_moments(self.state[entry.param]) for entry in members), strict=True)
        )
        dtype = first.param.dtype if in_place else self._wide_dtype(first)
        if any(tensor.dtype != dtype for tensor in (first.weight, *grads, *exp_avgs)):
            weights, grads, exp_avgs, exp_avg_sqs = (
                [tensor.to(dtype) for tensor in kind] for kind in (weights, grads, exp_avgs, exp_avg_sqs)
            )
        adamw_(
            weights,
            grads,
            exp_avgs,
            exp_avg_sqs,
            age=self.state[first.param]["step"],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            variant=group["adam_variant"],
        )
        if not in_place:
            write_moments(self.state[first.param], exp_avgs[0], exp_avg_sqs[0])
            self._write_weight(first, weights[0])

    # Weights in sixteen bits

    def _rounds(self, entry: Entry) -> bool:
        return bool(entry.group["stochastic_rounding"]) and entry.param.dtype == torch.bfloat16

    def _wide_dtype(self, entry: Entry) -> torch.dtype:
        return torch.promote_types(entry.param.dtype, torch.float32)

    def _write_weight(self, entry: Entry, wide: Tensor) -> None:
        """Brings an updated wide copy back into the parameter; to be called after its step is counted."""
        if wide is entry.weight:
            return
        if not self._rounds(entry):
            entry.weight.copy_(wide)
            return
        key = (entry.group["seed"], self._places()[entry.param], self.state[entry.param]["step"])
        sharding = sharding_of(entry.param)
        rows = None if sharding is None else (sharding, entry.param.shape[0])
        round_stochastically_(entry.weight, wide, draw_generator(wide.device, *key), rows)

    def _places(self) -> dict[Tensor, int]:
        return {param: i for i, param in enumerate(p for group in self.param_groups for p in group["params"])}

    # Saving and loading

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads `state_dict()`'s result, from any device or weight type.

        torch casts every floating state to its parameter's type; here each tensor keeps the type in which this
        optimizer holds it, so that resuming is exact.

        Raises:
            UserError: moments of another shape than this optimizer's, by name. Whatever is raised, state and groups
                are as they were before.
        """
        before = {"state": self.state, "param_groups": self.param_groups}
        try:
            self._load(state_dict)
        except Exception:
            self.__dict__.update(before)
            self._take_in_all()
            raise

    def _load(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        saved_ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        for number, (group, param) in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    dtype = self._kept_dtype(key, value, group, param)
                    loaded = value.to(device=param.device, dtype=dtype)
                    self.state[param][key] = loaded.clone() if loaded is value else loaded
        self._take_in_all()
        for group, param in params:
            for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                kept, expected = self.state.get(param, {}).get(key), self._moment_shape(group, param)
                if kept is not None and kept.shape != expected:
                    raise UserError(
                        f"{key} of {self.name_of(param)} must have shape {tuple(expected)}, got {tuple(kept.shape)}; "
                        "the loaded state is that of other parameters, or of another rank"
                    )

    def _moment_shape(self, group: dict[str, Any], param: Tensor) -> torch.Size | tuple[int, ...]:
        return param.shape

    def _kept_dtype(self, key: str, value: Tensor, group: dict[str, Any], param: Tensor) -> torch.dtype:
        if key in ("exp_avg", "exp_avg_sq") and value.is_floating_point():
            return moment_dtype(group["state_dtype"], param)
        return value.dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_names" not in self.__dict__:  # unpickled, not loaded
            self._names, self._warned, self._settled, self._layerwise = WeakTensorKeyDictionary(), set(), False, None
            self._plan, self._stepped, self.diagnostics = None, [], None
            self._take_in_all()


def those_whose_gradients(
    are_so: Callable[[list[Tensor]], Tensor], entries: Sequence[Entry], *, anywhere: bool = False
) -> set[Tensor]:
    """The parameters whose gradients are so in all of their parts, on whatever process; `anywhere`: in one of them.

    Args:
        are_so: a flag for each of the gradients of one type and device.
    """
    by_kind: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        mesh = entry.param.device_mesh if isinstance(entry.param, DTensor) else None
        by_kind.setdefault((entry.grad.device, entry.grad.dtype, mesh), []).append(entry)
    found: set[Tensor] = set()
    for (*_, mesh), alike in by_kind.items():
        flags = are_so([entry.grad for entry in alike])
        if mesh is not None:
            flags = ~agree_all(~flags, mesh) if anywhere else agree_all(flags, mesh)
        found.update(entry.param for entry, flag in zip(alike, flags.tolist(), strict=True) if flag)
    return found


def not_zero(entries: Sequence[Entry]) -> set[Tensor]:
    """The parameters whose gradients have an entry that is not zero."""
    return those_whose_gradients(lambda grads: torch.stack([grad.any() for grad in grads]), entries, anywhere=True)


def _finite_norms(grads: list[Tensor]) -> Tensor:
    """For each gradient whether it is finite; a norm that overflows counts too: the second moment would with it."""
    dtype = _accumulation_dtype(grads[0])
    if grads[0].device.type == "cpu" and grads[0].dtype == dtype and all(grad.is_contiguous() for grad in grads):
        # A third faster than the CPU's norm, and overflows with it.
        return torch.isfinite(torch.stack([torch.dot(flat, flat) for flat in (grad.view(-1) for grad in grads)]))
    return torch.isfinite(torch.stack(torch._foreach_norm(grads, dtype=dtype)))


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
