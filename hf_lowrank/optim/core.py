"""The projected-Adam core: everything that the low-rank optimizers share.

A step is: refresh the bases that are due; sort the targets into batches of equal shape and age; let the method
update each batch (project, Adam, lift, apply). A method's class says only how its batch is updated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_lowrank.errors import UserError
from hf_lowrank.optim.base import Bound, Entry, Params, TargetedAdamW, is_count
from hf_lowrank.optim.batch import Batch, project_matrix
from hf_lowrank.optim.groups import param_groups
from hf_lowrank.optim.matrices import Layout, make_layout
from hf_lowrank.optim.moments import init_moments, moment_dtype, read_moments, write_moments
from hf_lowrank.optim.subspaces import (
    SUBSPACES,
    UNSTORED,
    Request,
    captured_energy,
    exact_bases,
    gaussian_matrix,
    subspace_overlap,
)

# Subspaces that may be chosen for both sides of a matrix.
TWO_SIDED = ("svd", "randomized", "random")
MOMENTS = ("keep", "rotate", "reset")
# Gradient elements that one batch may hold: bounds the memory of the stacked projections.
BATCH_ELEMENTS = 2**23

Member = tuple[Entry, Layout]


class ProjectedAdamW(TargetedAdamW):
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
        self.diagnostics: dict[str, dict[str, float]] | None = {} if diagnostics else None
        if isinstance(params, nn.Module):
            if defaults["rank"] is None:
                raise UserError(f"{type(self).__name__} of a model needs rank, a number from 1")
            params = param_groups(
                params, rank=defaults["rank"], target_modules=target_modules, weight_decay=defaults["weight_decay"]
            )
        super().__init__(params, defaults, layerwise=layerwise)
        if not any(group["rank"] is not None for group in self.param_groups):
            raise UserError(
                f"{type(self).__name__} needs at least one group with a rank; pass the model itself with rank=, "
                "or groups made by hf_lowrank.param_groups (under Trainer as the key 'model' or 'params')"
            )

    # Groups

    def _is_target(self, group: dict[str, Any]) -> bool:
        return group["rank"] is not None

    def _forget(self) -> None:
        self._layouts: dict[Tensor, Layout] = {}
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
        for members in self._alike(entries):
            self._step_members(members)

    def _step_members(self, members: Sequence[Member]) -> None:
        entries = [entry for entry, _ in members]
        wide = [entry.param.float() if self._rounds(entry) else entry.param for entry in entries]
        moments = [read_moments(self.state[entry.param]) for entry in entries]
        self._update_batch(self._batch(members, wide, moments))
        for entry, weight, kinds in zip(entries, wide, moments, strict=True):
            write_moments(self.state[entry.param], *kinds)
            self._write_weight(entry, weight)

    def _target_state(self, entry: Entry, layout: Layout) -> dict[str, Any]:
        state = self.state[entry.param]
        if not state:
            state["step"] = 0
            state["refreshes"] = 0
            shape = layout.state_shape(*layout.low_shape)
            init_moments(state, shape, entry.group["state_dtype"], entry.param)
            if self.limits_norm:
                # Infinite: the first step only records.
                state["residual_norm"] = torch.full(layout.state_shape(), torch.inf, device=entry.param.device)
        return state

    def _alike(self, entries: Sequence[Entry]) -> Iterator[list[Member]]:
        """Members of equal layout, type, place and age; none above `BATCH_ELEMENTS` unless of one parameter."""
        alike: dict[tuple[Any, ...], list[Member]] = {}
        for entry in entries:
            layout = self._layouts[entry.param]
            self.state[entry.param]["step"] += 1
            shape = (layout.rows, layout.columns, layout.transposed, layout.both, layout.rank)
            key = (id(entry.group), self._age(entry), *shape, entry.param.dtype, entry.param.device)
            alike.setdefault(key, []).append((entry, layout))
        for members in alike.values():
            each = max(1, BATCH_ELEMENTS // members[0][1].param_elements)
            for start in range(0, len(members), each):
                yield members[start : start + each]

    def _age(self, entry: Entry) -> int:
        """Which step of its moments a parameter is at."""
        state = self.state[entry.param]
        return state["step"] - state.get("reset_at", 0)

    def _batch(
        self, members: Sequence[Member], weights: Sequence[Tensor], moments: Sequence[tuple[Tensor, Tensor]]
    ) -> Batch:
        def parts(key: str) -> list[Tensor]:
            return [part for entry, layout in members for part in layout.parts(self.state[entry.param][key])]

        layouts = [layout for _, layout in members]
        grads = [view for entry, layout in members for view in layout.matrices(entry.grad)]
        earlier = [part for entry, _ in members for part in self._parts.pop(entry.param, ())]
        return Batch(
            group=members[0][0].group,
            age=self._age(members[0][0]),
            weights=[
                view for weight, layout in zip(weights, layouts, strict=True) for view in layout.matrices(weight)
            ],
            grads=grads,
            bases=[basis for entry, layout in members for basis in self._bases(entry, layout)],
            left_bases=parts("left_basis") if layouts[0].both else None,
            exp_avgs=[p for (m, _), layout in zip(moments, layouts, strict=True) for p in layout.parts(m)],
            exp_avg_sqs=[p for (_, v), layout in zip(moments, layouts, strict=True) for p in layout.parts(v)],
            limits=parts("residual_norm") if self.limits_norm else [],
            earlier=torch.stack(earlier) if earlier else None,
        )

    # Subspaces

    def _bases(self, entry: Entry, layout: Layout) -> list[Tensor]:
        """The bases in use, one for each matrix."""
        state = self.state[entry.param]
        if "basis" in state:
            return layout.parts(state["basis"])
        grads = layout.matrices(entry.grad)
        return [
            gaussian_matrix(grad, layout.rank, (entry.group["seed"], layout.index + number, state["refreshes"] - 1))
            for number, grad in enumerate(grads)
        ]

    def _is_due(self, entry: Entry, layout: Layout, state: dict[str, Any]) -> bool:
        gap = entry.group["update_proj_gap"]
        offset = gap * layout.index // max(1, self._matrix_count) if entry.group["stagger"] else 0
        return state["refreshes"] == 0 or (state["step"] + offset) % gap == 0

    def _refresh(self, entries: Sequence[Entry]) -> None:
        fresh: list[tuple[Entry, Layout, dict[str, Tensor]]] = []
        for entry in entries:
            layout = self._layouts[entry.param]
            state = self._target_state(entry, layout)
            if self._is_due(entry, layout, state):
                fresh.append((entry, layout, self._choose(entry, layout, state)))
        if fresh and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for _, _, bases in fresh:
                for basis in bases.values():  # decompositions may differ in their last bits between machines
                    dist.broadcast(basis, src=0)
        for entry, layout, bases in fresh:
            state = self.state[entry.param]
            wanted = self.diagnostics is not None or entry.group["moments"] == "rotate"
            first = state["refreshes"] == 0
            before = self._bases(entry, layout) if wanted and not first else None
            left_before = state.get("left_basis")
            state.update(bases)
            state["refreshes"] += 1
            if self.diagnostics is not None:
                self._diagnose(entry, layout, before)
            if not first:
                self._carry_moments(entry, layout, before or (), left_before)

    def _choose(self, entry: Entry, layout: Layout, state: dict[str, Any]) -> dict[str, Tensor]:
        """The new basis, and the left one where both sides are projected, in the parameter's type."""
        if entry.group["subspace"] == UNSTORED:
            return {}
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
            if not layout.both:
                bases["basis"].append(SUBSPACES[entry.group["subspace"]](request))
                continue
            if entry.group["subspace"] == "svd":
                right, left = exact_bases(request)
            else:
                before = layout.parts(state["left_basis"])[number] if "left_basis" in state else None
                other = replace(
                    request,
                    grad=matrix.mT,
                    transposed=not layout.transposed,
                    previous=before,
                    key=(*request.key, 1),
                )
                right, left = (SUBSPACES[entry.group["subspace"]](side) for side in (request, other))
            bases["basis"].append(right)
            bases.setdefault("left_basis", []).append(left)
        result = {}
        for key, parts in bases.items():
            basis = torch.stack(parts) if layout.stacked else parts[0]
            dtype = entry.param.dtype if basis.is_floating_point() else basis.dtype
            result[key] = basis.to(dtype).clone(memory_format=torch.contiguous_format)
        return result

    def _carry_moments(
        self, entry: Entry, layout: Layout, before: Sequence[Tensor], left_before: Tensor | None
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
            for number, (old, new) in enumerate(zip(before, self._bases(entry, layout), strict=True)):
                turn = _dense(old, layout).mT @ _dense(new, layout)
                for moment, power in ((exp_avg, 1), (exp_avg_sq, 2)):
                    part = layout.parts(moment)[number]
                    turned = part.to(turn.dtype) @ turn.pow(power)
                    if left_before is not None:
                        new_left, old_left = (
                            layout.parts(side)[number] for side in (state["left_basis"], left_before)
                        )
                        turned = (new_left.mT @ old_left).to(turn.dtype).pow(power) @ turned
                    part.copy_(turned)
        write_moments(state, exp_avg, exp_avg_sq)

    def _diagnose(self, entry: Entry, layout: Layout, before: Sequence[Tensor] | None) -> None:
        assert self.diagnostics is not None
        bases = [_dense(basis, layout) for basis in self._bases(entry, layout)]
        energies = map(captured_energy, layout.matrices(entry.grad), bases)
        found = {"step": float(self.state[entry.param]["step"])}
        found["captured_energy"] = float(torch.stack(list(energies)).mean())
        if before is not None:
            olds = [_dense(basis, layout) for basis in before]
            found["subspace_overlap"] = float(torch.stack(list(map(subspace_overlap, olds, bases))).mean())
        self.diagnostics[self.name_of(entry.param)] = found

    # Inside the backward pass

    def _keep_part(self, group: dict[str, Any], param: Tensor) -> bool:
        """Adds a backward pass's projected gradient to those before; whether the gradient itself can go."""
        if not (self._is_target(group) and self.stays_low) or param.grad is None:
            return False
        entry, layout = Entry(group, param, param.grad), self._layouts[param]
        if param not in self._parts and self._finite([entry]):
            self._refresh([entry])
        state = self._target_state(entry, layout)
        if not state["refreshes"]:  # nothing finite to choose a basis from: this step will be skipped
            return False
        lefts = layout.parts(state["left_basis"]) if layout.both else [None] * layout.count
        dtype = moment_dtype(group["state_dtype"], param)
        lows = list(map(project_matrix, layout.matrices(entry.grad), self._bases(entry, layout), lefts))
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
        assert param.grad is not None
        self._update([Entry(group, param, param.grad)])
        self._parts.pop(param, None)

    def _kept_dtype(self, key: str, value: Tensor, group: dict[str, Any], param: Tensor) -> torch.dtype:
        if key in ("basis", "left_basis") and value.is_floating_point():
            return param.dtype
        return super()._kept_dtype(key, value, group, param)


def _dense(basis: Tensor, layout: Layout) -> Tensor:
    """A basis as a matrix (columns, rank) in at least float32."""
    if basis.is_floating_point():
        return basis.to(torch.promote_types(basis.dtype, torch.float32))
    return torch.eye(layout.columns, device=basis.device)[:, basis]
