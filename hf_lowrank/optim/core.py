"""The projected-Adam core: everything that the low-rank optimizers share.

A step is: refresh the bases that are due; sort the targets into batches of equal shape and age; let the method
update each batch (project, Adam, lift, apply). A method's class says only how its batch is updated.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hf_lowrank.errors import UserError
from hf_lowrank.optim.base import Bound, Entry, Params, TargetedAdamW, entry_of, is_count, not_zero
from hf_lowrank.optim.batch import Batch, batch_limits, project_matrix
from hf_lowrank.optim.groups import param_groups
from hf_lowrank.optim.matrices import Layout, make_layout
from hf_lowrank.optim.moments import init_moments, moment_dtype, read_moments, write_moments
from hf_lowrank.optim.plan import Part, State
from hf_lowrank.optim.refresh import Due, choose_bases
from hf_lowrank.optim.sharding import local_part
from hf_lowrank.optim.subspaces import (
    OF_GRADIENTS,
    SUBSPACES,
    UNSTORED,
    captured_energy,
    gaussian_matrices,
    subspace_overlap,
)

# Subspaces that may be chosen for both sides of a matrix.
TWO_SIDED = ("svd", "randomized", "random")
MOMENTS = ("keep", "rotate", "reset")

Member = tuple[Entry, Layout]


class ProjectedAdamW(TargetedAdamW):
    """AdamW whose target matrices live in subspaces of their gradients; the base of the methods' classes.

    Args:
        params: a model (split by `param_groups` with `rank` and `target_modules`), groups, or parameters. Groups
            with a `rank` are targets; those with `rank=None` get plain AdamW.
        lr, betas, eps, weight_decay: as in AdamW; weight decay is decoupled and acts on the whole weight.
        rank: of the subspaces, for every group that does not say its own; None for none.
        target_modules, target_parameters: which linear layers, and which parameters beside, are targets when `params`
            is a model, see `param_groups`.
        update_proj_gap: optimizer steps between two choices of the subspace.
        scale: multiplies the lifted update.
        proj_type: `std` (the longer side stays), `reverse_std`, `right`, `left`, or `full` (both sides).
        subspace: `svd` (exact), `randomized` (subspace iteration from the last basis), `random` (orthonormal),
            `columns` (random ones), or `gaussian` (drawn from the seed at every step, never stored).
        stagger: spreads the refreshes of the matrices over the steps, so that no single step stalls.
        adam_variant: `official` adds ε before the bias correction and decays the updated weights, as the methods'
            own packages do; `torch` is `torch.optim.AdamW`'s rule.
        moments: what a refresh does to the moments: `keep` (as published), `rotate` into the new basis, `reset`.
        state_dtype: of moments: the `parameter`'s, `float32`, or `8bit` (needs torchao).
        stochastic_rounding: of bfloat16 weights, without which small updates are lost.
        matrix: how parameters of other than two dimensions are seen, see `make_layout`.
        seed: keys every random draw.
        layerwise: updates each weight inside the backward pass and frees its gradient at once. Clipping by global
            norm, fp16 scaling and several processes are then impossible. Gradients of several backward passes are
            summed in the subspace where the method lives in it alone; a refresh then sees the first one.
        diagnostics: fills `diagnostics` at each refresh.
        own: options of a method's own class, which groups may set as well.

    Raises:
        UserError: an option is out of range, a rank does not fit a matrix, a target is a vector; it is named.
    """

    subspaces: ClassVar[tuple[str, ...]] = (*SUBSPACES, UNSTORED)
    limits_norm: ClassVar[bool] = False
    # Whether the update needs the gradient only through its projection.
    stays_low: ClassVar[bool] = False
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
        target_parameters: Sequence[str] = (),
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        subspace: str = "randomized",
        adam_variant: str = "official",
        moments: str = "keep",
        state_dtype: str = "parameter",
        stochastic_rounding: bool = False,
        stagger: bool = False,
        matrix: str = "auto",
        seed: int = 0,
        layerwise: bool = False,
        diagnostics: bool = False,
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
            "stochastic_rounding": stochastic_rounding,
            "stagger": stagger,
            "matrix": matrix,
            "seed": seed,
            **(own or {}),
        }
        if isinstance(params, nn.Module):
            if defaults["rank"] is None:
                raise UserError(f"{type(self).__name__} of a model needs rank, a number from 1")
            params = param_groups(
                params,
                rank=defaults["rank"],
                target_modules=target_modules,
                target_parameters=target_parameters,
                weight_decay=defaults["weight_decay"],
            )
        super().__init__(params, defaults, layerwise=layerwise, diagnostics=diagnostics)
        if not any(group["rank"] is not None for group in self.param_groups):
            raise UserError(
                f"{type(self).__name__} needs at least one group with a rank; pass the model itself with rank=, "
                "or groups made by hf_lowrank.param_groups (under Trainer as the key 'model' or 'params')"
            )

    # Groups

    def _is_target(self, group: dict[str, Any]) -> bool:
        return group["rank"] is not None

    def _forget(self) -> None:
        # Weak: a parameter that sharding puts another in the place of is not kept alive.
        self._layouts: MutableMapping[Tensor, Layout] = WeakTensorKeyDictionary()
        self._matrix_count = 0
        self._parts: dict[Tensor, list[Tensor]] = {}

    def _adopt(self, group: dict[str, Any], param: Tensor) -> None:
        self._layouts[param] = make_layout(
            param,
            self.name_of(param),
            rank=group["rank"],
            proj_type=group["proj_type"],
            matrix=group["matrix"],
            index=self._matrix_count,
        )
        self._matrix_count += self._layouts[param].count

    def _how(self, group: dict[str, Any], param: Tensor) -> str:
        layout = self._layouts[param]
        side = "both sides" if layout.both else "left" if layout.transposed else "right"
        return f"rank {layout.rank}, {side}, {group['subspace']}"

    def _choices(self) -> dict[str, tuple[str, ...]]:
        own = {"moments": MOMENTS, "subspace": self.subspaces, "proj_type": self.proj_types}
        return super()._choices() | own

    def _bounds(self) -> dict[str, Bound]:
        return super()._bounds() | {
            "scale": (lambda x: x > 0, "above 0"),
            "update_proj_gap": (is_count, "a whole number from 1"),
        }

    def _check_options(self, options: dict[str, Any], where: str) -> None:
        super()._check_options(options, where)
        if options["proj_type"] == "full" and options["subspace"] not in TWO_SIDED:
            allowed = ", ".join(TWO_SIDED)
            raise UserError(
                f"subspace of {where} must be one of {allowed} with proj_type='full', got {options['subspace']!r}"
            )

    # The step

    def _update_batch(self, batch: Batch) -> None:
        raise NotImplementedError

    def _update_targets(self, entries: Sequence[Entry]) -> None:
        self._refresh([entry for entry in entries if entry.param not in self._parts])
        for entry in entries:
            self.state[entry.param]["step"] += 1
        for members in self._alike(entries):
            self._step_members(members)

    def _step_members(self, members: Sequence[Member]) -> None:
        entries, states = [entry for entry, _ in members], [self.state[entry.param] for entry, _ in members]
        wide = [entry.weight.float() if self._rounds(entry) else entry.weight for entry in entries]
        moments = list(map(read_moments, states))
        self._update_batch(self._batch(members, wide, moments))
        for entry, state, weight, kinds in zip(entries, states, wide, moments, strict=True):
            write_moments(state, *kinds)
            self._write_weight(entry, weight)

    def _target_state(self, entry: Entry, layout: Layout) -> dict[str, Any]:
        state = self.state[entry.param]
        if not state:
            state["step"] = 0
            state["refreshes"] = 0
            if entry.group["moments"] == "reset":
                state["reset_at"] = 0
            kind = entry.group["state_dtype"]
            shape = layout.state_shape(*layout.low_shape)
            init_moments(state, layout.zeros(shape, entry.weight, moment_dtype(kind, entry.param)), kind)
            if self.limits_norm:
                state["residual_norm"] = layout.zeros(layout.state_shape(), entry.weight, torch.float32)
                # Infinite: the first step only records.
                local_part(state["residual_norm"]).fill_(torch.inf)
        return state

    def _begin_anew(self) -> None:
        super()._begin_anew()
        for state in self.state.values():
            if "residual_norm" in state:
                local_part(state["residual_norm"]).fill_(torch.inf)

    def _alike(self, entries: Sequence[Entry]) -> Iterator[list[Member]]:
        """Members of equal layout, type, place and age; not above the limit of a batch unless of one parameter."""
        alike: dict[tuple[Any, ...], list[Member]] = {}
        for entry in entries:
            layout = self._layouts[entry.param]
            if not layout.numbers:  # of a stack that has fewer matrices than there are processes
                continue
            shape = (layout.rows, layout.columns, layout.transposed, layout.both, layout.rank)
            where = (entry.param.dtype, entry.param.device, layout.sharding and layout.sharding.key)
            key = (id(entry.group), self._age(entry), *shape, *where)
            alike.setdefault(key, []).append((entry, layout))
        for members in alike.values():
            each = max(1, batch_limits(members[0][0].weight.device).batch // members[0][1].param_elements)
            for start in range(0, len(members), each):
                yield members[start : start + each]

    def _age(self, entry: Entry) -> int:
        """Which step of its moments a parameter is at."""
        state = self.state[entry.param]
        return state["step"] - state.get("reset_at", 0)

    def _batch(
        self, members: Sequence[Member], weights: Sequence[Tensor], moments: Sequence[tuple[Tensor, Tensor]]
    ) -> Batch:
        layouts = [layout for _, layout in members]
        place = layouts[0].place
        earlier = [part for entry, _ in members for part in self._parts.pop(entry.param, ())] if self._parts else []
        return Batch(
            group=members[0][0].group,
            age=self._age(members[0][0]),
            transposed=layouts[0].transposed,
            stored_weights=[
                view
                for (entry, layout), weight in zip(members, weights, strict=True)
                for view in layout.stored_in(weight, self.name_of(entry.param))
            ],
            stored_grads=[view for entry, layout in members for view in layout.stored(entry.grad)],
            bases=self._bases(members),
            left_bases=place.left_bases(self._parts_of(members, "left_basis")) if layouts[0].both else None,
            exp_avgs=[p for (m, _), layout in zip(moments, layouts, strict=True) for p in layout.parts(m)],
            exp_avg_sqs=[p for (_, v), layout in zip(moments, layouts, strict=True) for p in layout.parts(v)],
            limits=self._parts_of(members, "residual_norm") if self.limits_norm else [],
            earlier=torch.stack(earlier) if earlier else None,
            place=place,
        )

    def _plan_targets(self, entries: Sequence[Entry]) -> list[Part] | None:
        if any(entry.group["stagger"] for entry in entries):  # some subspace is due at nearly every step
            return None
        return list(map(_planned, self._alike(entries)))

    # Subspaces

    def _bases(self, members: Sequence[Member]) -> list[Tensor]:
        """The bases in use, one for each matrix, as this process multiplies by them."""
        place = members[0][1].place
        if "basis" in self.state[members[0][0].param]:
            return place.bases(self._parts_of(members, "basis"))
        return place.of_whole(self._drawn(members))

    def _basis_rows(self, entry: Entry, layout: Layout) -> list[Tensor]:
        """This process's rows of the bases in use, as matrices in at least float32."""
        if "basis" in self.state[entry.param]:
            parts = layout.place.basis_rows(layout.parts(self.state[entry.param]["basis"]), layout.columns)
        else:
            parts = list(map(layout.place.own_rows, self._drawn([(entry, layout)])))
        return [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]

    def _drawn(self, members: Sequence[Member]) -> list[Tensor]:
        """The whole bases of a subspace that is never stored."""
        keys = [
            (entry.group["seed"], number, self.state[entry.param]["refreshes"] - 1)
            for entry, layout in members
            for number in layout.numbers
        ]
        like, layout = members[0][0].grad, members[0][1]
        return list(gaussian_matrices(like, layout.columns, layout.rank, keys).unbind())

    def _parts_of(self, members: Sequence[Member], key: str) -> list[Tensor]:
        return [part for entry, layout in members for part in layout.parts(self.state[entry.param][key])]

    def _is_due(self, entry: Entry, layout: Layout, state: dict[str, Any]) -> bool:
        gap = entry.group["update_proj_gap"]
        offset = gap * layout.index // max(1, self._matrix_count) if entry.group["stagger"] else 0
        return state["refreshes"] == 0 or (state["step"] + offset) % gap == 0

    def _refresh(self, entries: Sequence[Entry]) -> None:
        due = []
        for entry in entries:
            layout = self._layouts[entry.param]
            state = self._target_state(entry, layout)
            if self._is_due(entry, layout, state):
                due.append(Due(entry, layout, state))
        # A gradient of zero says nothing of directions: the last basis stays, and the first is chosen again.
        asked = [one.entry for one in due if one.subspace in OF_GRADIENTS]
        silent = {entry.param for entry in asked} - not_zero(asked)
        due = [one for one in due if one.entry.param not in silent or not one.state["refreshes"]]
        for (entry, layout, state), bases in zip(due, choose_bases(due), strict=True):
            if entry.param in silent:
                state.update(bases)
                continue
            wanted = self.diagnostics is not None or entry.group["moments"] == "rotate"
            first = state["refreshes"] == 0
            before = self._basis_rows(entry, layout) if wanted and not first else None
            left_before = layout.parts(state["left_basis"]) if "left_basis" in state else None
            state.update(bases)
            state["refreshes"] += 1
            if self.diagnostics is not None:
                self._diagnose(entry, layout, before)
            if not first:
                self._carry_moments(entry, layout, before or (), left_before)

    def _carry_moments(
        self, entry: Entry, layout: Layout, before: Sequence[Tensor], left_before: Sequence[Tensor] | None
    ) -> None:
        state, moments = self.state[entry.param], entry.group["moments"]
        if moments == "keep":
            return
        exp_avg, exp_avg_sq = read_moments(state)
        if moments == "reset":
            exp_avg.zero_()
            exp_avg_sq.zero_()
            state["reset_at"] = state["step"]
        else:
            place = layout.place
            for number, (old, new) in enumerate(zip(before, self._basis_rows(entry, layout), strict=True)):
                turn = place.sum(old.mT @ new)
                for moment, power in ((exp_avg, 1), (exp_avg_sq, 2)):
                    part = layout.parts(moment)[number]
                    turned = place.for_lifting(part[None])[0].to(turn.dtype) @ turn.pow(power)
                    if left_before is not None:
                        new_left = layout.parts(state["left_basis"])[number]
                        left_turn = place.sum(new_left.mT @ left_before[number])
                        turned = left_turn.to(turn.dtype).pow(power) @ turned
                    part.copy_(place.kept(turned))
        write_moments(state, exp_avg, exp_avg_sq)

    def _diagnose(self, entry: Entry, layout: Layout, before: Sequence[Tensor] | None) -> None:
        assert self.diagnostics is not None
        bases = [_dense(basis, layout) for basis in self._bases([(entry, layout)])]
        grads = layout.matrices(entry.grad)
        energies = [captured_energy(*pair, layout.place) for pair in zip(grads, bases, strict=True)]
        found = {"step": float(self.state[entry.param]["step"])}
        found["captured_energy"] = float(torch.stack(energies).mean())
        if before is not None:
            now = self._basis_rows(entry, layout)
            overlaps = [subspace_overlap(*pair, layout.place) for pair in zip(before, now, strict=True)]
            found["subspace_overlap"] = float(torch.stack(overlaps).mean())
        self.diagnostics[self.name_of(entry.param)] = found

    # Inside the backward pass

    def _keep_part(self, group: dict[str, Any], param: Tensor) -> bool:
        """Adds a backward pass's projected gradient to those before; whether the gradient itself can go."""
        if not (self._is_target(group) and self.stays_low) or param.grad is None:
            return False
        entry, layout = entry_of(group, param), self._layouts[param]
        if param not in self._parts and self._finite([entry]):
            self._refresh([entry])
        state = self._target_state(entry, layout)
        if not state["refreshes"]:  # nothing finite to choose a basis from: this step will be skipped
            return False
        lefts = layout.parts(state["left_basis"]) if layout.both else [None] * layout.count
        dtype = moment_dtype(group["state_dtype"], param)
        lows = list(map(project_matrix, layout.matrices(entry.grad), self._bases([(entry, layout)]), lefts))
        for number, low in enumerate(lows):
            lows[number] = low.to(dtype) + (self._parts[param][number] if param in self._parts else 0)
        self._parts[param] = lows
        return True

    def _update_one(self, group: dict[str, Any], param: Tensor) -> None:
        """One parameter's step, its gradient's sum being what the backward passes before left, and `param.grad`."""
        parts = self._parts.get(param, ())
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            del self._parts[param]
            self._warn_of_skipped([param])
            return
        self._update([entry_of(group, param)])
        self._parts.pop(param, None)

    def _moment_shape(self, group: dict[str, Any], param: Tensor) -> torch.Size | tuple[int, ...]:
        layout = self._layouts.get(param)
        return param.shape if layout is None else layout.state_shape(*layout.low_shape)

    def _kept_dtype(self, key: str, value: Tensor, group: dict[str, Any], param: Tensor) -> torch.dtype:
        if key in ("basis", "left_basis") and value.is_floating_point():
            return param.dtype
        return super()._kept_dtype(key, value, group, param)


def _planned(members: Sequence[Member]) -> Part:
    entries, layouts = [entry for entry, _ in members], [layout for _, layout in members]

    def is_due(optimizer: ProjectedAdamW, states: list[State]) -> bool:
        return any(map(optimizer._is_due, entries, layouts, states))

    def update(optimizer: ProjectedAdamW, entries: list[Entry], states: list[State]) -> None:
        for state in states:
            state["step"] += 1
        optimizer._step_members(list(zip(entries, layouts, strict=True)))

    return Part(entries, update, is_due, of_one_age=True)


def _dense(basis: Tensor, layout: Layout) -> Tensor:
    """A basis as a matrix (columns, rank) in at least float32."""
    if basis.is_floating_point():
        return basis.to(torch.promote_types(basis.dtype, torch.float32))
    return torch.eye(layout.columns, device=basis.device)[:, basis]
