"""The projected-Adam core: moments in subspaces of the gradients, and the refresh of those subspaces."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.compat import foreach_copy_
from hf_lowrank.errors import UserError
from hf_lowrank.methods import MethodSettings
from hf_lowrank.optim.adam import host_copy, host_reads, rotated_moments
from hf_lowrank.optim.base import Declared, Params
from hf_lowrank.optim.batch import ProjectedBatch, project_matrix
from hf_lowrank.optim.entries import Entry
from hf_lowrank.optim.layout import Layout, dense_basis
from hf_lowrank.optim.methods import SubspaceSettings
from hf_lowrank.optim.ranked import RankedAdamW
from hf_lowrank.optim.refresh import (
    basis_state,
    choose_bases,
    held_bases,
    without_directions,
    write_bases,
)
from hf_lowrank.optim.sharding import local_part
from hf_lowrank.optim.state import StateTensor, adam_moments
from hf_lowrank.optim.subspaces import (
    OF_GRADIENTS,
    OF_INDICES,
    captured_energy,
    cosines,
    gaussian_matrices,
    subspace_overlap,
)

DCT = "dct"
# The lazy interval (arXiv 2407.08296): a subspace has settled when its last cosines are at least this on average.
SETTLED = 0.4
AVERAGED = 5
COSINES = StateTensor(shape=(AVERAGED,), dtype=torch.float32, initial=-math.inf, sharded=False)
# Subspaces that can be chosen for both sides of a matrix, and those that store a basis of values.
TWO_SIDED = ("svd", "randomized", "random")
OF_VALUES = (*TWO_SIDED, "gaussian")


class ProjectedAdamW(RankedAdamW):
    """AdamW whose target matrices have moments in subspaces of their gradients; base of the methods' classes.

    A method defines `update`, and in `settings` its options with their defaults. It may add state (`declare_state`),
    decide when a subspace is due (`is_due`), choose it (`refresh`), and change what a refresh does to its state
    (`carry_moments`).

    Args:
        params: a model (split by `param_groups` with `rank` and `target_modules`), groups, or parameters. Groups
            with a `rank` are targets; those with `rank=None` get plain AdamW.
        lr, betas, eps, weight_decay: as in AdamW; weight decay is decoupled and acts on the whole weight.
        rank: of the subspaces, for groups without their own; None for plain AdamW.
        target_modules, target_parameters: which linear layers, and which further parameters, are targets when
            `params` is a model, see `param_groups`.
        update_proj_gap: optimizer steps between refreshes of the subspace.
        scale: multiplies the lifted update.
        proj_type: `std` (projects the shorter side), `reverse_std`, `right`, `left`, or `full` (both sides).
        subspace: `svd` (exact), `randomized` (subspace iteration from the last basis), `random` (orthonormal),
            `columns` (random ones), `dct` (those of the cosine transform in which the gradient is largest), `gaussian`
            (a random matrix), or `seeded` (the same, drawn from the seed at every step and never stored).
        lazy: doubles the interval between refreshes of a matrix whenever the absolute cosines of the first vectors of
            its successive bases, at its last five refreshes, average at least 0.4 (Q-GaLore). For subspaces that
            depend on the gradient. The host reads the cosines at a refresh.
        projection_bits: of each stored value of a basis: 4, in groups of 256 values (Q-GaLore), or None for the type
            of the parameter. For unsharded parameters and subspaces that store values.
        stagger: spreads the refreshes of the matrices over the steps, so that no single step stalls.
        adam_variant: `official` adds ε before the bias correction and decays the updated weight, as the methods'
            own packages do; `torch` is the rule of `torch.optim.AdamW`.
        moments: what a refresh does to the moments: `keep` (as published), `rotate` into the new basis, `reset`.
        state_dtype: of moments: that of the `parameter`, `float32`, or `8bit` (needs torchao).
        stochastic_rounding: of bfloat16 weights, without which small updates are lost.
        matrix: how parameters of other than two dimensions are seen, see `make_layout`.
        seed: of every random draw.
        layerwise: updates each weight inside the backward pass and frees its gradient at once. Clipping by global
            norm, fp16 scaling and several processes are then impossible. Gradients of several backward passes are
            summed in the subspace if the method needs nothing else; a refresh then sees only the first one.
        diagnostics: fills `diagnostics` at each refresh.

    Attributes:
        diagnostics: by parameter name, the captured energy and the subspace overlap of its last refresh, and the
            interval in steps if it is `lazy`.

    Raises:
        UserError: an option is out of range, a rank does not fit a matrix, or a target is a vector; names it.
    """

    settings: ClassVar[type[MethodSettings]] = SubspaceSettings
    # Whether `update` needs gradients only through their projections.
    needs_only_projections: ClassVar[bool] = False
    diagnostics: dict[str, dict[str, float]] | None = None

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
        matrix: str = "auto",
        seed: int = 0,
        layerwise: bool = False,
        diagnostics: bool = False,
        **options: Any,
    ) -> None:
        if diagnostics:
            self.diagnostics = {}
        super().__init__(
            params,
            options,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            target_modules=target_modules,
            target_parameters=target_parameters,
            matrix=matrix,
            seed=seed,
            layerwise=layerwise,
        )

    # Groups

    def side(self, group: Mapping[str, Any]) -> str:
        return str(group["proj_type"])

    def make_layout(self, group: dict[str, Any], param: Tensor, name: str) -> Layout:
        if group["projection_bits"] is not None and isinstance(param, DTensor):
            raise UserError(
                f"projection_bits must be None for sharded parameters, got {group['projection_bits']} for {name}; a "
                "group of 256 values could be split between two processes"
            )
        return super().make_layout(group, param, name)

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        counters = {"refreshes": 0, **({"reset_at": 0} if group["moments"] == "reset" else {})}
        settling: Declared = {"interval": 1, "undecided": 0, "cosines": COSINES} if group["lazy"] else {}
        bases = basis_state(group["subspace"], layout, group["projection_bits"])
        return {**counters, **settling, **adam_moments(*layout.low_shape), **bases}

    def describe(self, group: Mapping[str, Any], layout: Layout) -> str:
        side = "both sides" if layout.both else "left" if layout.transposed else "right"
        return f"rank {layout.rank}, {side}, {group['subspace']}"

    def _check_options(self, options: dict[str, Any], where: str) -> None:
        super()._check_options(options, where)
        if options["lazy"] and options["subspace"] not in OF_GRADIENTS:
            allowed = ", ".join(OF_GRADIENTS)
            raise UserError(
                f"subspace of {where} must be one of {allowed} with lazy=True, got {options['subspace']!r}"
            )
        if options["proj_type"] == "full" and options["subspace"] not in TWO_SIDED:
            allowed = ", ".join(TWO_SIDED)
            raise UserError(
                f"subspace of {where} must be one of {allowed} with proj_type='full', got {options['subspace']!r}"
            )
        if options["projection_bits"] is not None and options["subspace"] not in OF_VALUES:
            raise UserError(
                f"subspace of {where} must be one of {', '.join(OF_VALUES)} with projection_bits="
                f"{options['projection_bits']}, got {options['subspace']!r}"
            )

    def _forget(self) -> None:
        super()._forget()
        self._accumulated: dict[Tensor, list[Tensor]] = {}
        # Means of lazy targets' last cosines: what reads those of several, and a target's place among them.
        self._means: dict[Tensor, tuple[Callable[[], list[float]], int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "diagnostics": self.diagnostics, "_accumulated": self._accumulated}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_accumulated" in state:
            self._accumulated = state["_accumulated"]

    # Subspaces

    def make_batch(self, entries: Sequence[Entry]) -> ProjectedBatch:
        accumulated = [low for entry in entries for low in self._accumulated.pop(entry.param, ())]
        layout = entries[0].layout
        return ProjectedBatch(
            entries,
            self._bases(entries),
            layout.partition.left_bases(held_bases(entries, "left_basis")) if layout.both else None,
            torch.stack(accumulated) if accumulated else None,
        )

    def is_due(self, entry: Entry) -> bool:
        """Whether a target gets a new subspace before its next step."""
        gap, state = entry.group["update_proj_gap"], entry.state
        offset = 0
        if entry.group["stagger"]:
            offset = gap * entry.layout.first_index // max(1, self.matrix_count)
        return not state["refreshes"] or (state["step"] + offset) % (gap * state.get("interval", 1)) == 0

    def refresh(self, entries: Sequence[Entry]) -> None:
        """Chooses new bases for the targets that are due."""
        waiting = [entry for entry in entries if entry.param not in self._accumulated]
        self._decide(filter(self.is_due, waiting))
        due = list(filter(self.is_due, waiting))
        self._choose_missing([entry for entry in waiting if entry not in due])
        # The last basis stays, and a first one is chosen again at the next step.
        silent = without_directions(due)
        due = [entry for entry in due if entry not in silent or not entry.state["refreshes"]]
        chosen = choose_bases(due)
        again = [entry for entry in due if entry.state["refreshes"]]
        before = {entry: self._before(entry) for entry in again}
        first = self._first_vectors([entry for entry in again if entry.group["lazy"]])
        write_bases(due, chosen)
        for entry in due:
            if entry not in silent:
                entry.state["refreshes"] += 1
        self._note_cosines(first)
        # Where the host may look at them, at once.
        at_once = [one for one in again if self.diagnostics is not None or host_reads(one.weight.device)]
        self._decide(at_once)
        if self.diagnostics is not None:
            for entry in due:
                if entry not in silent:
                    self._diagnose(entry, before[entry][0] if entry in before else [])
        for entry in again:
            self.carry_moments(entry, *before[entry])

    def _choose_missing(self, entries: Sequence[Entry]) -> None:
        """Where the host does not know whether a first choice found directions: chooses again, at steps 1, 2, 4, …
        until the next refresh, for the matrices whose moments are still zero.
        """
        asked = [
            entry
            for entry in entries
            if entry.state["refreshes"] == 1
            and not (step := entry.state["step"]) & (step - 1)
            and entry.group["subspace"] in OF_GRADIENTS
            and not host_reads(entry.grad.device)
        ]
        for entry, bases in zip(asked, choose_bases(asked, afresh=True), strict=True):
            moved = entry.layout.partition.sum(entry.read("exp_avg_sq").float().sum((-2, -1))) > 0
            for side, basis in bases.items():
                held = local_part(entry.state[side])
                has_one = moved.view(*moved.shape, *[1] * (held.ndim - moved.ndim))
                foreach_copy_([held], [torch.where(has_one, held, local_part(basis))])

    # Lazy intervals

    def _decide(self, among: Iterable[Entry]) -> None:
        """Doubles the interval of targets whose last cosines of successive bases are large on average (Q-GaLore).

        The host has to know them before the next refresh. Their means were on their way to it since the last one,
        unless the state was loaded since.
        """
        for entry in among:
            if not entry.state.get("undecided"):
                continue
            entry.state["undecided"] = 0
            sent = self._means.pop(entry.param, None)
            read, number = sent or (_means_of(entry.state["cosines"].unsqueeze(0)), 0)
            if read()[number] >= SETTLED:
                entry.state["interval"] *= 2

    def _first_vectors(self, entries: Sequence[Entry]) -> list[tuple[list[Entry], Tensor]]:
        """Targets that are alike, and what tells how much their bases turn: the first vectors, this process's rows of
        them, (k, columns), or all indices, (k, rank), of their matrices.
        """
        alike: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in entries:
            layout = entry.layout
            key = (id(entry.group), layout.kind, layout.stacked, layout.count, entry.weight.dtype, entry.weight.device)
            alike.setdefault(key, []).append(entry)
        found = []
        for members in alike.values():
            held = held_bases(members, "basis")
            if held and held[0].is_floating_point():
                held = [torch.stack(members[0].layout.partition.basis_rows(held)).select(-1, 0).clone()]
            elif held:
                held = [torch.stack(members[0].layout.partition.whole_indices(held))]
            found.append((members, held[0] if held else members[0].weight.new_empty(0, 1)))
        return found

    def _note_cosines(self, before: Sequence[tuple[list[Entry], Tensor]]) -> None:
        """Appends the cosine of the last and the new first vector, absolute, to the last ones of each target.

        Of indices it is the share that stays.
        """
        for members, old in before:
            ((_, new),) = self._first_vectors(members)
            layout = members[0].layout
            if not new.is_floating_point():
                found = (old == new).float().mean(-1)
            else:
                first, second = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (old, new))
                products = torch.stack([first * second, first.square(), second.square()]).sum(-1)
                product, *squares = layout.partition.sum(products).unbind()
                found = (product / (squares[0] * squares[1]).sqrt()).abs().nan_to_num().float()
            found = found.view(len(members), len(layout.held_indices)).sum(-1)
            if layout.sharding is not None and layout.stacked:
                found = layout.sharding.sum(found)
            histories = [entry.state["cosines"] for entry in members]
            last = torch.stack(histories)
            newest = (found / layout.count).view(-1, *[1] * (last.ndim - 1)).expand_as(last.narrow(-1, 0, 1))
            last = torch.cat([last.narrow(-1, 1, last.shape[-1] - 1), newest], dim=-1)
            foreach_copy_(histories, last.unbind())
            read = _means_of(last)
            for number, entry in enumerate(members):
                entry.state["undecided"] = int(entry.state["refreshes"] > AVERAGED)
                self._means[entry.param] = read, number

    def _before(self, entry: Entry) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of the bases in use, if what follows a refresh needs them, as `carry_moments` gets them."""
        if self.diagnostics is None and entry.group["moments"] != "rotate":
            return [], []
        lefts = held_bases([entry], "left_basis") if entry.layout.both else []
        return [part.clone() for part in self._basis_rows(entry)], [part.clone() for part in lefts]

    def carry_moments(self, entry: Entry, before: Sequence[Tensor], left_before: Sequence[Tensor]) -> None:
        """What a refresh, after the first, does to the moments; the state holds the new bases already.

        Args:
            before: this process's rows of each matrix's last basis; empty unless `moments="rotate"`.
            left_before: the same of the bases that project the rows; empty unless `proj_type="full"`.
        """
        moments, layout = entry.group["moments"], entry.layout
        if moments == "keep" or not entry.age:
            return
        exp_avg, exp_avg_sq = entry.read("exp_avg"), entry.read("exp_avg_sq")
        if moments == "reset":
            exp_avg.zero_()
            exp_avg_sq.zero_()
            entry.state["reset_at"] = entry.state["step"]
        else:
            partition = layout.partition
            lefts = zip(held_bases([entry], "left_basis"), left_before, strict=True) if left_before else ()
            turns_of_rows = [partition.sum(new.mT @ old) for new, old in lefts]
            for number, (old, new) in enumerate(zip(before, self._basis_rows(entry), strict=True)):
                right = partition.sum(old.mT @ new)
                left = turns_of_rows[number].to(right.dtype) if turns_of_rows else None
                mean, square = layout.parts(exp_avg)[number], layout.parts(exp_avg_sq)[number]
                wholes = [
                    partition.for_lifting(part.unsqueeze(0)).squeeze(0).to(right.dtype) for part in (mean, square)
                ]
                if entry.group["subspace"] in OF_INDICES:  # columns that stay, exactly
                    rotated = wholes[0] @ right.round(), wholes[1] @ right.round()
                else:
                    rotated = rotated_moments(
                        wholes[0], wholes[1], right, left, age=entry.age, betas=entry.group["betas"]
                    )
                foreach_copy_([mean, square], list(map(partition.own_low_rows, rotated)))
        entry.write("exp_avg", exp_avg)
        entry.write("exp_avg_sq", exp_avg_sq)

    def _bases(self, entries: Sequence[Entry]) -> list[Tensor]:
        """The bases in use, one per matrix, as this process multiplies by them."""
        partition = entries[0].layout.partition
        if entries[0].group["subspace"] == DCT:
            return partition.bases_from_whole(_waves(entries))
        if "basis" in entries[0].state:
            return partition.bases(held_bases(entries, "basis"))
        return partition.bases_from_whole(_drawn(entries))

    def _basis_rows(self, entry: Entry) -> list[Tensor]:
        """This process's rows of the bases in use, as matrices in at least float32."""
        partition = entry.layout.partition
        if entry.group["subspace"] == DCT:
            rows = list(map(partition.own_rows, _waves([entry])))
        elif "basis" in entry.state:
            rows = partition.basis_rows(held_bases([entry], "basis"))
        else:
            rows = list(map(partition.own_rows, _drawn([entry])))
        return [dense_basis(part, entry.layout.columns) for part in rows]

    def _diagnose(self, entry: Entry, before: Sequence[Tensor]) -> None:
        assert self.diagnostics is not None
        partition = entry.layout.partition
        bases = [dense_basis(basis, entry.layout.columns) for basis in self._bases([entry])]
        if entry.group["projection_bits"] is not None:  # rounded columns are no longer orthonormal
            bases, before = ([torch.linalg.qr(basis)[0] for basis in each] for each in (bases, before))
        grads = entry.layout.matrices(entry.grad)
        energies = [captured_energy(*pair, partition) for pair in zip(grads, bases, strict=True)]
        found = {"step": float(entry.state["step"])}
        if entry.group["lazy"]:
            found["interval"] = float(entry.group["update_proj_gap"] * entry.state["interval"])
        found["captured_energy"] = float(torch.stack(energies).mean())
        if before:
            now = bases if entry.group["projection_bits"] is not None else self._basis_rows(entry)
            overlaps = [subspace_overlap(*pair, partition) for pair in zip(before, now, strict=True)]
            found["subspace_overlap"] = float(torch.stack(overlaps).mean())
        self.diagnostics[entry.info.name] = found

    # Inside the backward pass

    def keeps_gradient(self, entry: Entry) -> bool:
        """Adds the projected gradient to those of the step's earlier backward passes."""
        if entry.info.layout is None or not self.needs_only_projections:
            return False
        self._load_state(entry)
        if entry.param not in self._accumulated and self._finite([entry]):
            self.refresh([entry])
        if not entry.state["refreshes"]:  # no finite gradient to choose a basis from: this step will be skipped
            return False
        layout = entry.layout
        dtype = entry.declared("exp_avg").dtype_for(entry.param, entry.group["state_dtype"])
        lefts = held_bases([entry], "left_basis") if layout.both else [None] * layout.count
        products = map(project_matrix, layout.matrices(entry.grad), self._bases([entry]), lefts)
        lows, earlier = [low.to(dtype) for low in products], self._accumulated.get(entry.param)
        self._accumulated[entry.param] = lows if earlier is None else list(map(torch.add, lows, earlier))
        return True

    def _finite(self, entries: Sequence[Entry]) -> list[Entry]:
        if not self._accumulated:
            return super()._finite(entries)
        overflown = []
        for entry in entries:
            parts = self._accumulated.get(entry.param)
            if parts is None:
                continue
            are_finite = torch.stack([part.isfinite().all() for part in parts]).all()
            if self.heeds_flags and not host_reads(entry.grad.device):
                entry.finite = are_finite
            elif not are_finite:
                overflown.append(entry)
        self._warn_skipped([entry.info.name for entry in overflown])
        good = super()._finite([entry for entry in entries if entry not in overflown])
        for entry in set(entries).difference(good):
            self._accumulated.pop(entry.param, None)
        return good


def _means_of(cosines: Tensor) -> Callable[[], list[float]]:
    """Sends the mean of each target's last cosines, (k, …, 5), to the host.

    They are added one by one, so that a target's mean has the same bits alone and with others.
    """
    parts = cosines.flatten(1).unbind(-1)
    return host_copy(reduce(torch.add, parts) / len(parts))


def _waves(entries: Sequence[Entry]) -> list[Tensor]:
    """The whole bases that are columns of the cosine transform."""
    layout, weight = entries[0].layout, entries[0].weight
    chosen = layout.partition.whole_indices(held_bases(entries, "basis"))
    rows = cosines(layout.columns, weight.dtype, weight.device).index_select(0, torch.cat(chosen))
    return list(rows.view(len(chosen), layout.rank, layout.columns).mT.unbind())


def _drawn(entries: Sequence[Entry]) -> list[Tensor]:
    """The whole bases of a subspace that is never stored."""
    keys = [
        (entry.group["seed"], index, entry.state["refreshes"] - 1)
        for entry in entries
        for index in entry.layout.held_indices
    ]
    layout = entries[0].layout
    return list(gaussian_matrices(entries[0].grad, layout.columns, layout.rank, keys).unbind())
