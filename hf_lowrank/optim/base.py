"""What all optimizers here share: groups, the order of a step, AdamW for the rest, saving and loading.

Some groups are *targets* of a method; all other parameters get plain AdamW. A method is a subclass that declares the
state of a matrix (`declare_state`), steps a batch of them (`update`), and may do something before each step
(`refresh`).
"""

import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import Parameter, Signature, signature
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hf_lowrank.compat import FakeTensor
from hf_lowrank.errors import LowRankWarning, UserError, nearest
from hf_lowrank.methods import MethodSettings, check_options
from hf_lowrank.optim.adam import adamw_, host_reads, rate
from hf_lowrank.optim.batch import Batch, batch_limits
from hf_lowrank.optim.entries import (
    Entry,
    ParameterInfo,
    entry_of,
    finite,
    flag_finite,
    nonzero,
)
from hf_lowrank.optim.groups import flattened, flattened_by, parameter_table
from hf_lowrank.optim.layerwise import Layerwise
from hf_lowrank.optim.layout import Layout
from hf_lowrank.optim.loading import fill_options, restore
from hf_lowrank.optim.sharding import local_part
from hf_lowrank.optim.state import StateTensor, adam_moments, check_8bit_available

logger = logging.getLogger(__name__)

# Keys that torch, its schedulers and Trainer add to groups.
FOREIGN_KEYS = frozenset(
    {
        "params",
        "param_names",
        "initial_lr",
        "swa_lr",
        "max_lr",
        "min_lr",
        "max_momentum",
        "base_momentum",
        "name",
    }
)

Params = nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
FULL_MOMENTS = adam_moments(whole=True)
Declared = dict[str, StateTensor | int]


class TargetedAdamW(Optimizer):
    """AdamW for all parameters but the targets, whose update a subclass defines."""

    # Defaults, choices and bounds of the method's options.
    settings: ClassVar[type[MethodSettings]]
    # Settings that are not a group's, or whose default differs for a group.
    settings_of_model: ClassVar[frozenset[str]] = frozenset(
        {"target_modules", "target_parameters", "layerwise", "diagnostics", "rank", "seed"}
    )
    # Whether `update` leaves matrices without `Batch.finite`, and their states, as they are. Otherwise the host waits
    # at each step to know them.
    heeds_flags: ClassVar[bool] = False
    # Of all targets together.
    matrix_count: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Lists the settings in the signature that `help` and notebooks show."""
        super().__init_subclass__(**kwargs)
        given = signature(cls.__init__).parameters.items()
        named = {key: one for key, one in given if one.kind is not Parameter.VAR_KEYWORD}
        shown = {key: one for key, one in named.items() if key not in ("self", "options")}
        for key, field in cls.settings.model_fields.items():
            if key not in cls.settings_of_model:
                option = Parameter(key, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation)
                shown.setdefault(key, option)
        cls.__signature__ = Signature([*shown.values()])  # type: ignore[attr-defined]

    def __init__(
        self,
        params: Any,
        options: Mapping[str, Any],
        *,
        betas: tuple[float, float],
        layerwise: bool,
        **defaults: Any,
    ) -> None:
        """Takes the values that groups have by default: `options` are settings of the method, `defaults` the others.

        Raises:
            TypeError: an option that is not a setting of the method, naming the nearest one.
        """
        self._forget()
        self._skipped: set[str] = set()
        self._checked = False
        self._layerwise = Layerwise(self) if layerwise else None
        settings = self._default_options()
        for key in options:
            if key not in settings:
                raise TypeError(f"{type(self).__name__} has no option {key!r}; {nearest(key, settings)}")
        defaults = {**defaults, "betas": betas, **settings, **options}
        self._check_options(defaults, type(self).__name__)
        super().__init__(params, {**defaults, "betas": tuple(betas)})

    @classmethod
    def _default_options(cls) -> dict[str, Any]:
        """The settings that groups have, with their defaults."""
        fields = cls.settings.model_fields.items()
        return {key: field.default for key, field in fields if key not in cls.settings_of_model}

    # What a method defines

    def is_target(self, group: Mapping[str, Any]) -> bool:
        """Whether a group's parameters are targets."""
        raise NotImplementedError

    def make_layout(self, group: dict[str, Any], param: Tensor, name: str) -> Layout:
        """How a target is seen as matrices; raises UserError, with its name, for one that the method cannot handle."""
        raise NotImplementedError

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        """The state of a target: the tensors of each of its matrices, and integers with their initial values."""
        raise NotImplementedError

    def refresh(self, entries: Sequence[Entry]) -> None:
        """Called before each step of `entries`, whose gradients are finite and whose step is not yet counted.

        With `heeds_flags` they may not be finite where `Entry.finite` says so.
        """

    def batch_size(self, entry: Entry) -> int:
        """The largest number of parameters like that of `entry` in one batch."""
        return max(1, batch_limits(entry.weight.device).batch // entry.layout.elements)

    def make_batch(self, entries: Sequence[Entry]) -> Any:
        """The batch of `entries` that `update` gets."""
        return Batch(entries)

    def update(self, batch: Any) -> None:
        """The method's step of a batch: updates its weights and states in place."""
        raise NotImplementedError

    def describe(self, group: Mapping[str, Any], layout: Layout) -> str:
        """What the table of parameters says about a target."""
        raise NotImplementedError

    def keeps_gradient(self, entry: Entry) -> bool:
        """Takes over the gradient of a backward pass that does not end a step; whether it did and can be freed."""
        return False

    # Groups

    def _check_options(self, options: dict[str, Any], where: str) -> None:
        checks: dict[str, tuple[Callable[[Any], bool], str]] = {
            "lr": (lambda x: float(x) >= 0, "one number of at least 0"),
            "eps": (lambda x: float(x) >= 0, "one number of at least 0"),
            "weight_decay": (lambda x: float(x) >= 0, "one number of at least 0"),
            "betas": (lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x), "two numbers from 0 to below 1"),
        }
        for key, (is_allowed, allowed) in checks.items():
            try:
                passes = not isinstance(options[key], str) and is_allowed(options[key])
            except (TypeError, ValueError, RuntimeError):  # not a number, or a tensor of several
                passes = False
            if not passes:
                raise UserError(f"{key} of {where} must be {allowed}, got {options[key]!r}")
        # The rank is checked against each matrix; it is None for the parameters that get AdamW.
        check_options(self.settings, {key: value for key, value in options.items() if key != "rank"}, where)
        if options["state_dtype"] == "8bit":
            check_8bit_available()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its options and targets are checked here, once.

        Raises:
            UserError: an unknown option, one out of range, or a target that the method cannot handle, by name.
            TypeError: not a dict.
        """
        if isinstance(param_group, dict):
            unknown = set(param_group) - set(self.defaults) - FOREIGN_KEYS
            if unknown:
                key = min(unknown, key=str)
                raise UserError(f"unknown option {key!r} of a parameter group; {nearest(str(key), self.defaults)}")
            if "params" not in param_group:
                raise UserError("a parameter group must have the key 'params', a list of its parameters")
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        known, matrices = len(self._infos), self.matrix_count
        try:
            self._check_options(group, f"parameter group {index}")
            self._register(index)
        except Exception:
            del self.param_groups[index], self._infos[known:]
            self.matrix_count = matrices
            raise
        if self._layerwise is not None:
            self._layerwise.attach(index, known, group["params"])

    def _forget(self) -> None:
        self._infos: list[ParameterInfo] = []
        self._kinds: dict[tuple[object, ...], int] = {}
        self._skips: dict[torch.device, Tensor] = {}
        self.matrix_count = 0

    def _register(self, index: int) -> None:
        """Decides, once, how each parameter of a group is handled."""
        group = self.param_groups[index]
        params, optimizer = group["params"], type(self).__name__
        names = group.get("param_names") or [f"parameter {i} of group {index}" for i in range(len(params))]
        if len(names) != len(params):
            raise flattened(optimizer, f"parameter group {index}", "an engine such as DeepSpeed ZeRO")
        for name, param in zip(names, params, strict=True):
            engine = flattened_by(param)
            if engine is not None:
                raise flattened(optimizer, name, engine)
            if isinstance(param, DTensor) and group["state_dtype"] == "8bit":
                raise UserError(
                    f"state_dtype must be parameter or float32 for sharded parameters, got '8bit' for {name}; "
                    "a block of 256 values could be split between two processes"
                )
            if isinstance(param, DTensor) and self._layerwise is not None:
                raise UserError(f"layerwise must be off for sharded parameters such as {name}; leave it out")
            layout, declared = None, Declared(FULL_MOMENTS)
            if self.is_target(group):
                if param.is_complex():
                    raise UserError(
                        f"targets of {optimizer} must be real, {name} of shape {tuple(param.shape)} is complex; "
                        "put it into a group that gets plain AdamW"
                    )
                layout = self.make_layout(group, param, name)
                self.matrix_count += layout.count
                declared = self.declare_state(group, layout)
            kind = self._kinds.setdefault(() if layout is None else layout.kind, len(self._kinds))
            self._infos.append(ParameterInfo(name, weakref.ref(param), len(self._infos), layout, kind, declared))

    def _register_all(self) -> None:
        self._forget()
        for index in range(len(self.param_groups)):
            self._register(index)

    def _registered(self) -> Iterator[tuple[ParameterInfo, dict[str, Any], Tensor]]:
        infos = iter(self._infos)
        for group in self.param_groups:
            for param in group["params"]:
                yield next(infos), group, param

    def _check_parameters(self) -> None:
        """Registers the parameters with which sharding has replaced those given, as accelerate's FSDP2 does."""
        params = [param for group in self.param_groups for param in group["params"]]
        same = len(params) == len(self._infos) and all(
            info.ref() is param for info, param in zip(self._infos, params, strict=True)
        )
        if same and self._checked:
            return
        if not same or any(map(flattened_by, params)):
            known = set(map(id, params))
            if any(isinstance(param, Tensor) and id(param) not in known for param in self.state):
                raise UserError(
                    f"{type(self).__name__} made steps before its parameters were sharded, and their state is lost; "
                    "shard first, or load the state afterwards"
                )
            for index, group in enumerate(self.param_groups):
                if self.is_target(group) and any(param.ndim < 2 for param in group["params"]):
                    raise flattened(type(self).__name__, f"parameter group {index}", "FSDP1 or DeepSpeed ZeRO")
            self._register_all()
        if not self._checked:
            self._checked = True
            if not any(group["params"] for group in self.param_groups if self.is_target(group)):
                raise UserError(f"{type(self).__name__} has no target matrix among its parameters; name some")
            simulated = any(isinstance(param, FakeTensor) for param in params)
            if not simulated and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
                logger.info("%s", self.parameter_table())

    def parameter_table(self) -> str:
        """The parameters that the method acts on and those left to AdamW, with one line for all that are alike."""
        rows = [
            (info.name, param, "AdamW" if info.layout is None else self.describe(group, info.layout))
            for info, group, param in self._registered()
        ]
        return parameter_table(type(self).__name__, rows)

    # The step

    # A compiler would trace what a step decides on the host, such as when a subspace is due, again at each new value.
    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step, never compiled. A parameter with a non-finite gradient is skipped, with a warning.

        On an accelerator the host does not wait to learn of it: the parameter and its state stay as they are, though
        the step counts, and the warning comes when `skipped` is read or the state is saved.

        A step without state, at learning rate zero and with zero gradients, is not counted: it is made by
        torch.distributed.checkpoint, to have state to load into.

        With `layerwise` the backward pass has already made the step, and this does nothing.

        Raises:
            UserError: a sparse gradient, naming its parameter, or parameters that an engine has flattened.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_parameters()
        if self._layerwise is None:
            entries = [entry_of(*one) for one in self._registered() if one[2].grad is not None]
            is_trial = self._is_trial(entries)
            self._step(entries)
            if is_trial:
                self._restart()
        return loss

    def _step(self, entries: Sequence[Entry]) -> None:
        targets: list[Entry] = []
        rest: list[Entry] = []
        for entry in self._finite(entries):
            self._load_state(entry)
            (rest if entry.info.layout is None else targets).append(entry)
        self.refresh(targets)
        for entry in (*targets, *rest):
            entry.state["step"] += 1
        self.step_targets(targets)
        self.step_adamw(rest)

    def _load_state(self, entry: Entry) -> None:
        entry.state = self.state[entry.param]
        if not entry.state:
            entry.create_state()

    def step_targets(self, entries: Sequence[Entry]) -> None:
        """Steps targets in batches of equal layout, dtype, device and age."""
        alike: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in entries:
            if entry.layout.held_indices:  # not of a sharded stack with fewer matrices than processes
                key = (id(entry.group), entry.age, entry.info.kind, entry.param.dtype, entry.param.device)
                alike.setdefault(key, []).append(entry)
        for members in alike.values():
            size = self.batch_size(members[0])
            for start in range(0, len(members), size):
                batch = self.make_batch(members[start : start + size])
                self.update(batch)
                batch.finish()

    def step_adamw(self, entries: Sequence[Entry]) -> None:
        """AdamW of whole parameters; those that need a copy in another type are stepped one at a time."""
        alike: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in entries:
            in_place = entry.state["exp_avg"].dtype == entry.param.dtype and not entry.rounds
            alone = None if in_place else entry.param
            key = (id(entry.group), entry.age, entry.param.device, entry.param.dtype, alone)
            alike.setdefault(key, []).append(entry)
        for (*_, own, alone), members in alike.items():
            group = members[0].group
            dtype = own if alone is None else torch.promote_types(own, torch.float32)
            weights = [entry.wide_weight().to(dtype) for entry in members]
            moments = [
                [moment.read(entry.state, key).to(dtype) for entry in members] for key, moment in FULL_MOMENTS.items()
            ]
            adamw_(
                weights,
                [entry.grad.to(dtype) for entry in members],
                *moments,
                age=members[0].age,
                lr=rate(group),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                variant=group["adam_variant"],
                finite=None
                if members[0].finite is None
                else [one.finite for one in members if one.finite is not None],
            )
            if alone is not None:
                for name, (updated,) in zip(FULL_MOMENTS, moments, strict=True):
                    members[0].write(name, updated)
                members[0].write_weight(weights[0])

    @torch.compiler.disable
    def step_inside_backward(self, group: int, position: int, param: Tensor, *, ends_step: bool) -> None:
        """With `layerwise`: steps one parameter, or keeps what it needs of the gradient, and frees the gradient.

        Args:
            group, position: numbers of its group and, among all parameters, of itself.
            ends_step: whether the backward pass ends an optimizer step.
        """
        entry = entry_of(self._infos[position], self.param_groups[group], param)
        if ends_step:
            self._step([entry])
        if ends_step or self.keeps_gradient(entry):
            param.grad = None

    def accumulating(self) -> AbstractContextManager[None]:
        """With `layerwise` but without accelerate: backward passes in this context do not end an optimizer step."""
        return nullcontext() if self._layerwise is None else self._layerwise.accumulating()

    @property
    def skipped(self) -> frozenset[str]:
        """Names of this process's parameters that were skipped at least once because of a non-finite gradient.

        Waits for the steps that were launched.
        """
        self._warn_skipped([name for name, count in self.skipped_steps().items() if count])
        return frozenset(self._skipped)

    def skipped_steps(self) -> dict[str, int]:
        """On devices whose values the host does not read: how many steps of each parameter were skipped, by name."""
        names = [info.name for info in self._infos]
        counts = [self._skips[place].tolist() for place in self._skips]
        return {name: int(sum(each)) for name, *each in zip(names, *counts, strict=True)} if counts else {}

    def _finite(self, entries: Sequence[Entry]) -> list[Entry]:
        for entry in entries:
            if entry.grad.layout != torch.strided:
                raise UserError(
                    f"the gradient of {entry.info.name} must be dense, got a sparse one; "
                    "use nn.Embedding(sparse=False) or another optimizer for it"
                )
        known = [entry for entry in entries if not self.heeds_flags or host_reads(entry.grad.device)]
        good = finite(known)
        if len(good) < len(known):
            self._warn_skipped([entry.info.name for entry in known if entry not in good])
        if len(known) == len(entries):
            return good
        flagged = [entry for entry in entries if entry not in known]
        flag_finite(flagged)
        self._count_skipped(flagged)
        return good + flagged

    def _count_skipped(self, entries: Sequence[Entry]) -> None:
        """Counts on their devices the entries that will be skipped."""
        places: dict[torch.device, list[Entry]] = {}
        for entry in entries:
            places.setdefault(entry.grad.device, []).append(entry)
        for device, alike in places.items():
            counts = self._skips.get(device)
            if counts is None or len(counts) != len(self._infos):
                before, counts = counts, torch.zeros(len(self._infos), dtype=torch.int64, device=device)
                self._skips[device] = counts
                if before is not None:
                    counts[: len(before)] = before
            flags = torch.stack([entry.finite for entry in alike if entry.finite is not None])
            where = [entry.info.position for entry in alike]
            if where == [*range(len(counts))]:
                counts += flags.logical_not()
            else:
                counts.index_add_(0, torch.tensor(where, device=device), flags.logical_not().long())

    def _warn_skipped(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._skipped]
        self._skipped.update(new)
        if new:
            listed = ", ".join(new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
            line = f"the gradient of {listed} is not finite; such steps are skipped"
            warnings.warn(line, LowRankWarning, stacklevel=5)

    def _is_trial(self, entries: Sequence[Entry]) -> bool:
        """Whether a step only creates state, as torch.distributed.checkpoint asks for before the first step."""
        if self.state or any(isinstance(r, Tensor) or r for r in map(rate, self.param_groups)):
            return False
        return all(entry.grad.layout == torch.strided for entry in entries) and not nonzero(entries)

    def _restart(self) -> None:
        """Makes the next step the first, with every state at its initial value."""
        for info, _, param in self._registered():
            state = self.state.get(param, {})
            state.update(dict.fromkeys(state.keys() & {"step", "reset_at"}, 0))
            for key, declared in info.declared.items():
                if not isinstance(declared, StateTensor):
                    state[key] = declared
                elif declared.initial and key in state:
                    local_part(state[key]).fill_(declared.initial)

    # Saving and loading

    def state_dict(self) -> dict[str, Any]:
        """That of every optimizer; warns of steps that were skipped on a device."""
        if not any(isinstance(counts, FakeTensor) for counts in self._skips.values()):
            _ = self.skipped
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the result of `state_dict()`, from any device or weight type, as torch's hooks change it.

        torch casts every floating-point state to its parameter's type; here each tensor keeps the type in which this
        optimizer holds it, so that resuming is exact. Options that the saved groups lack, because they were saved
        before there was such an option, take their defaults.

        Raises:
            UserError: state of another shape than this optimizer's, state that lacks a tensor, or an option out of
                range, by name. After any error, state and groups are unchanged.
        """
        before = {"state": self.state, "param_groups": self.param_groups}
        adapted: dict[str, Any] = {}
        # After the hooks that change what is loaded, and before those that see the result.
        hooks = (
            self.register_load_state_dict_pre_hook(lambda _, final: adapted.update(final)),
            self.register_load_state_dict_post_hook(lambda _: self._finish_loading(adapted), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.__dict__.update(before)
            self._register_all()
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def _finish_loading(self, loaded: Mapping[str, Any]) -> None:
        """Called when torch has loaded `loaded`, before any post-hook."""
        for index, group in enumerate(self.param_groups):
            self._check_options(group, f"parameter group {index} of the loaded state")
        self._register_all()
        numbers = [number for group in loaded["param_groups"] for number in group["params"]]
        for number, one in zip(numbers, self._registered(), strict=True):
            restore(self.state, loaded["state"].get(number, {}), *one)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: all but hooks, as with every optimizer."""
        return {
            **super().__getstate__(),
            "_skipped": self._skipped,
            "_skips": self._skips,
            "_layerwise": self._layerwise is not None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", ())
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, and groups that have it would be refused
        options = self._default_options()
        options.pop("rank", None)  # of the matrices, which no default may fit
        self.defaults.update({key: value for key, value in options.items() if key not in self.defaults})
        fill_options(self.param_groups, before, self.defaults, options)
        if "_infos" not in self.__dict__:  # copied or unpickled, not loaded
            self._skipped, self._checked = set(state.get("_skipped", ())), False
            self._layerwise = Layerwise(self) if state.get("_layerwise") else None
            self._register_all()
            self._skips = dict(state.get("_skips", {}))
            first = 0
            for index, group in enumerate(self.param_groups):
                if self._layerwise is not None:
                    self._layerwise.attach(index, first, group["params"])
                first += len(group["params"])
