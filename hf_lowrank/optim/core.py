"""The projected-Adam core: everything that the low-rank optimizers share.

A step is: sort the parameters that have a finite gradient into batches of equal shape and age; refresh the bases
that are due; let the method update each batch (project, Adam, lift, apply); give the rest plain AdamW. A method's
class says only how its batch is updated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.optim.adam import ADAM_VARIANTS, adamw_
from hf_lowrank.optim.batch import Batch
from hf_lowrank.optim.groups import param_groups
from hf_lowrank.optim.matrices import Layout, make_layout
from hf_lowrank.optim.subspaces import SUBSPACES, Request, exact_bases

MOMENTS = ("keep", "rotate", "reset")
STATE_DTYPES = ("parameter", "float32")
# What torch, its schedulers and Trainer put into groups beside an optimizer's own options.
FOREIGN_KEYS = frozenset({"params", "param_names", "initial_lr", "swa_lr", "max_lr", "min_lr", "name"})
# Gradient elements that one batch may hold: bounds the memory of the stacked projections.
BATCH_ELEMENTS = 2**23

Params = nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Entry(NamedTuple):
    """A parameter that is to be stepped."""

    group: dict[str, Any]
    param: Tensor
    grad: Tensor


class ProjectedAdamW(Optimizer):
    """AdamW whose target matrices live in subspaces of their gradients; the base of the methods' classes.

    Args:
        params: a model (split by `param_groups` with `rank` and `target_modules`), groups, or parameters. Groups
            with a `rank` are targets; those with `rank=None` get plain AdamW.
        lr, betas, eps, weight_decay: as in AdamW; weight decay is decoupled and acts on the whole weight.
        rank: of the subspaces, for every group that does not say its own; None for none.
        target_modules: which linear layers are targets when `params` is a model.
        update_proj_gap: optimizer steps between two choices of the subspace.
        scale: multiplies the lifted update.
        proj_type: `std` (the longer side stays), `reverse_std`, `right`, `left`, or `full` (both sides).
        subspace: how the basis is chosen.
        adam_variant: `official` adds ε before the bias correction and decays the updated weights, as the methods'
            own packages do; `torch` is `torch.optim.AdamW`'s rule.
        moments: what a refresh does to the moments: `keep` (as published), `rotate` into the new basis, `reset`.
        state_dtype: of moments: the `parameter`'s, or `float32`.
        matrix: how parameters of other than two dimensions are seen, see `make_layout`.
        seed: keys every random draw.
        own: options of a method's own class, which groups may set as well.

    Raises:
        UserError: an option is out of range, a rank does not fit a matrix, a target is a vector; it is named.
    """

    subspaces: ClassVar[tuple[str, ...]] = tuple(SUBSPACES)
    limits_norm: ClassVar[bool] = False
    proj_types: ClassVar[tuple[str, ...]] = ("std", "reverse_std", "right", "left", "full")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        target_modules: str | Sequence[str] = "auto",
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        subspace: str = "svd",
        adam_variant: str = "official",
        moments: str = "keep",
        state_dtype: str = "parameter",
        matrix: str = "auto",
        seed: int = 0,
        own: dict[str, Any] | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "subspace": subspace,
            "adam_variant": adam_variant,
            "moments": moments,
            "state_dtype": state_dtype,
            "matrix": matrix,
            "seed": seed,
            **(own or {}),
        }
        self._layouts: dict[Tensor, Layout] = {}
        self._names: dict[Tensor, str] = {}
        self._matrix_count = 0
        self._warned: set[Tensor] = set()
        self._check_options(defaults, f"{type(self).__name__}")
        if isinstance(params, nn.Module):
            if defaults["rank"] is None:
                raise UserError(f"{type(self).__name__} of a model needs rank, a number from 1")
            params = param_groups(
                params, rank=defaults["rank"], target_modules=target_modules, weight_decay=defaults["weight_decay"]
            )
        super().__init__(params, defaults)
        if not any(group["rank"] is not None for group in self.param_groups):
            raise UserError(
                f"{type(self).__name__} needs at least one group with a rank; pass the model itself with rank=, "
                "or groups made by hf_lowrank.param_groups (under Trainer as the key 'model' or 'params')"
            )

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its options are checked and its matrices' layouts decided here, once."""
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
                if group["rank"] is not None:
                    self._add_layout(group, param)
        except UserError:
            del self.param_groups[number]
            raise

    def _add_layout(self, group: dict[str, Any], param: Tensor) -> Layout:
        layout = make_layout(
            param,
            self._names.get(param, "a parameter"),
            rank=group["rank"],
            proj_type=group["proj_type"],
            matrix=group["matrix"],
            index=self._matrix_count,
        )
        self._layouts[param] = layout
        self._matrix_count += layout.count
        return layout

    def _check_options(self, options: dict[str, Any], where: str) -> None:
        choices = {
            "adam_variant": ADAM_VARIANTS,
            "moments": MOMENTS,
            "subspace": self.subspaces,
            "state_dtype": STATE_DTYPES,
            "proj_type": self.proj_types,
        }
        for key, allowed in choices.items():
            if options[key] not in allowed:
                raise UserError(f"{key} of {where} must be one of {', '.join(allowed)}, got {options[key]!r}")
        bounds: dict[str, tuple[Callable[[Any], bool], str]] = {
            "lr": (lambda x: float(x) >= 0, "at least 0"),
            "eps": (lambda x: x >= 0, "at least 0"),
            "weight_decay": (lambda x: x >= 0, "at least 0"),
            "scale": (lambda x: x > 0, "above 0"),
            "betas": (lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x), "two numbers from 0 to below 1"),
            "update_proj_gap": (lambda x: isinstance(x, int) and x >= 1, "a whole number from 1"),
        }
        for key, (good, allowed_text) in bounds.items():
            if not good(options[key]):
                raise UserError(f"{key} of {where} must be {allowed_text}, got {options[key]!r}")

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step. A parameter whose gradient is not finite is left alone, with a warning.

        Raises:
            UserError: a sparse gradient, naming its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
        targets = [entry for entry in entries if entry.group["rank"] is not None]
        self._refresh(targets)
        for batch in self._batches(targets):
            self._update_batch(batch)
        self._update_rest([entry for entry in entries if entry.group["rank"] is None])

    def _update_batch(self, batch: Batch) -> None:
        raise NotImplementedError

    def _finite(self, entries: Sequence[Entry]) -> list[Entry]:
        by_device: dict[tuple[torch.device, torch.dtype], list[Entry]] = {}
        for entry in entries:
            if entry.grad.layout != torch.strided:
                raise UserError(
                    f"the gradient of {self._names.get(entry.param)} is sparse; {type(self).__name__} needs dense "
                    "gradients (nn.Embedding(sparse=False))"
                )
            by_device.setdefault((entry.grad.device, entry.grad.dtype), []).append(entry)
        good: set[Tensor] = set()
        for group in by_device.values():
            peaks = torch._foreach_norm([entry.grad for entry in group], ord=float("inf"))
            flags = torch.isfinite(torch.stack(peaks)).tolist()
            good.update(entry.param for entry, finite in zip(group, flags, strict=True) if finite)
        bad = [entry.param for entry in entries if entry.param not in good and entry.param not in self._warned]
        if bad:
            self._warned.update(bad)
            names = ", ".join(self._names.get(param, "a parameter") for param in bad[:3])
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            warnings.warn(f"the gradient of {names}{more} is not finite; their step is skipped", stacklevel=4)
        return [entry for entry in entries if entry.param in good]

    # Targets

    def _layout(self, entry: Entry) -> Layout:
        layout = self._layouts.get(entry.param)
        return self._add_layout(entry.group, entry.param) if layout is None else layout

    def _state_dtype(self, group: dict[str, Any], param: Tensor) -> torch.dtype:
        if group["state_dtype"] == "float32" and param.dtype != torch.float64:
            return torch.float32
        return param.dtype

    def _target_state(self, entry: Entry, layout: Layout) -> dict[str, Any]:
        state = self.state[entry.param]
        if not state:
            dtype = self._state_dtype(entry.group, entry.param)
            device = entry.param.device
            state["step"] = 0
            state["refreshes"] = 0
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros(layout.state_shape(*layout.low_shape), dtype=dtype, device=device)
            if self.limits_norm:
                # Infinite: the first step only records.
                state["residual_norm"] = torch.full(layout.state_shape(), torch.inf, device=device)
        return state

    def _refresh(self, targets: Sequence[Entry]) -> None:
        fresh: list[Tensor] = []
        for entry in targets:
            layout = self._layout(entry)
            state = self._target_state(entry, layout)
            if state["step"] % entry.group["update_proj_gap"]:
                continue
            bases = self._choose(entry, layout, state)
            self._carry_moments(entry.group["moments"], layout, state, bases)
            state.update(bases)
            state["refreshes"] += 1
            fresh.extend(bases.values())
        if fresh and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for basis in fresh:  # decompositions may differ in their last bits between machines
                dist.broadcast(basis, src=0)

    def _choose(self, entry: Entry, layout: Layout, state: dict[str, Any]) -> dict[str, Tensor]:
        """The new basis, and the left one where both sides are projected, in the parameter's type."""
        bases: dict[str, list[Tensor]] = {"basis": []}
        previous = layout.parts(state["basis"]) if "basis" in state else [None] * layout.count
        for number, matrix in enumerate(layout.matrices(entry.grad)):
            request = Request(
                grad=matrix,
                rank=layout.rank,
                transposed=layout.transposed,
                previous=previous[number],
                key=(entry.group["seed"], layout.index + number, state["refreshes"]),
            )
            if layout.both:
                right, left = exact_bases(request)
                bases.setdefault("left_basis", []).append(left)
            else:
                right = SUBSPACES[entry.group["subspace"]](request)
            bases["basis"].append(right)
        result = {}
        for key, parts in bases.items():
            basis = torch.stack(parts) if layout.stacked else parts[0]
            dtype = entry.param.dtype if basis.is_floating_point() else basis.dtype
            result[key] = basis.to(dtype).clone(memory_format=torch.contiguous_format)
        return result

    def _carry_moments(self, moments: str, layout: Layout, state: dict[str, Any], bases: dict[str, Tensor]) -> None:
        if moments == "keep" or "basis" not in state:
            return
        if moments == "reset":
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
            state["reset_at"] = state["step"]
            return
        turn = state["basis"].mT.float() @ bases["basis"].float()
        side = bases["left_basis"].mT.float() @ state["left_basis"].float() if layout.both else None
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            turned = state[key].float() @ turn.pow(power)
            state[key].copy_(turned if side is None else side.pow(power) @ turned)

    def _batches(self, targets: Sequence[Entry]) -> Iterable[Batch]:
        """Batches of equal layout, type, place and age, none above `BATCH_ELEMENTS` unless of one parameter."""
        alike: dict[tuple[Any, ...], list[tuple[Entry, Layout]]] = {}
        for entry in targets:
            layout = self._layouts[entry.param]
            state = self.state[entry.param]
            state["step"] += 1
            age = state["step"] - state.get("reset_at", 0)
            key = (
                id(entry.group), age, layout.rows, layout.columns, layout.transposed, layout.both, layout.rank,
                entry.param.dtype, entry.param.device,
            )  # fmt: skip
            alike.setdefault(key, []).append((entry, layout))
        for key, members in alike.items():
            size = 0
            chunk: list[tuple[Entry, Layout]] = []
            for member in members:
                if chunk and size + member[1].param_elements > BATCH_ELEMENTS:
                    yield self._batch(chunk, age=key[1])
                    size, chunk = 0, []
                size += member[1].param_elements
                chunk.append(member)
            yield self._batch(chunk, age=key[1])

    def _batch(self, members: Sequence[tuple[Entry, Layout]], age: int) -> Batch:
        def parts(key: str) -> list[Tensor]:
            return [part for entry, layout in members for part in layout.parts(self.state[entry.param][key])]

        both = members[0][1].both
        return Batch(
            group=members[0][0].group,
            age=age,
            weights=[view for entry, layout in members for view in layout.matrices(entry.param)],
            grads=[view for entry, layout in members for view in layout.matrices(entry.grad)],
            bases=parts("basis"),
            left_bases=parts("left_basis") if both else None,
            exp_avgs=parts("exp_avg"),
            exp_avg_sqs=parts("exp_avg_sq"),
            limits=parts("residual_norm") if self.limits_norm else [],
        )

    # The rest

    def _update_rest(self, entries: Sequence[Entry]) -> None:
        alike: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in entries:
            state = self.state[entry.param]
            if not state:
                dtype = self._state_dtype(entry.group, entry.param)
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(entry.param, dtype=dtype, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(entry.param, dtype=dtype, memory_format=torch.preserve_format)
            state["step"] += 1
            key = (id(entry.group), state["step"], entry.param.device, entry.param.dtype, state["exp_avg"].dtype)
            alike.setdefault(key, []).append(entry)
        for (_, age, _, weight_dtype, state_dtype), members in alike.items():
            group = members[0].group
            options = {key: group[key] for key in ("betas", "eps", "weight_decay")}
            # One at a time where each needs a wide copy.
            batches = [members] if weight_dtype == state_dtype else [[member] for member in members]
            for batch in batches:
                weights = [entry.param.to(state_dtype) for entry in batch]
                adamw_(
                    weights,
                    [entry.grad.to(state_dtype) for entry in batch],
                    [self.state[entry.param]["exp_avg"] for entry in batch],
                    [self.state[entry.param]["exp_avg_sq"] for entry in batch],
                    age=age,
                    lr=float(group["lr"]),
                    variant=group["adam_variant"],
                    **options,
                )
                if weight_dtype != state_dtype:
                    for entry, weight in zip(batch, weights, strict=True):
                        entry.param.copy_(weight)

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
        self._layouts.clear()
        self._matrix_count = 0
        for group, param in params:
            if group["rank"] is not None:
                self._add_layout(group, param)

    def _kept_dtype(self, key: str, value: Tensor, group: dict[str, Any], param: Tensor) -> torch.dtype:
        if not value.is_floating_point() or key == "residual_norm":
            return value.dtype
        return self._state_dtype(group, param) if key in ("exp_avg", "exp_avg_sq") else param.dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, empty in (("_layouts", {}), ("_names", {}), ("_warned", set()), ("_matrix_count", 0)):
            self.__dict__.setdefault(name, empty)
