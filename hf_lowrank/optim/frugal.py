"""FRUGAL (arXiv 2411.07837): Adam inside a subspace, a rule without state outside it."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.optim.adam import decay_factors, rate
from hf_lowrank.optim.base import Declared
from hf_lowrank.optim.batch import ProjectedBatch
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.entries import Entry
from hf_lowrank.optim.layout import Layout
from hf_lowrank.optim.methods import FrugalSettings
from hf_lowrank.optim.state import adam_moments
from hf_lowrank.optim.subspaces import draw_seed

# The subspace consists of whole parameters: some get Adam, the others only the rule.
BLOCKS = "blocks"
# Moments of a block, created when it is chosen.
BLOCK_MOMENTS = {key: replace(moment, initial=None) for key, moment in adam_moments(whole=True).items()}


class FrugalAdamW(ProjectedAdamW):
    """FRUGAL: `W ← W − η_t · scale · lift(N) − η · state_free_lr_ratio · rule(G − lift(project(G)))`.

    With `subspace="blocks"` the subspace consists of whole parameters instead: at each refresh a random share of them,
    rank over the projected dimension, gets Adam with moments that start at zero, the others only the rule.

    Args:
        state_free_rule: `sign` (signSGD) or `sgd`, for the part of the gradient outside the subspace.
        state_free_lr_ratio: its learning rate relative to Adam's.

    The other arguments are those of `ProjectedAdamW`; by default the subspace consists of random columns, and the
    moments restart at each refresh.
    """

    settings = FrugalSettings
    heeds_flags = True

    def update(self, batch: ProjectedBatch) -> None:
        group = batch.group
        low = batch.project(keep_stack=True)
        direction = batch.adam(low)
        batch.lift_and_add_(direction, -batch.lr * group["scale"])
        batch.add_residuals_(
            lambda residual: _state_free(group, residual, out=residual), -batch.lr * group["state_free_lr_ratio"]
        )

    # Blocks

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        if group["subspace"] == BLOCKS:
            return {"refreshes": 0, "reset_at": 0, **BLOCK_MOMENTS}
        return super().declare_state(group, layout)

    def refresh(self, entries: Sequence[Entry]) -> None:
        blocks, others = _split(entries)
        super().refresh(others)
        for entry in filter(self.is_due, blocks):
            _drop_moments(entry.state)
            if self._is_chosen(entry.layout, entry.group["seed"], entry.state["refreshes"]):
                _create_moments(entry.state, entry.param, entry.group)
            entry.state["reset_at"] = entry.state["step"]
            entry.state["refreshes"] += 1

    def step_targets(self, entries: Sequence[Entry]) -> None:
        blocks, others = _split(entries)
        super().step_targets(others)
        self.step_adamw([entry for entry in blocks if "exp_avg" in entry.state])
        for entry in blocks:
            if "exp_avg" not in entry.state:
                group, weight, lr = entry.group, entry.wide_weight(), rate(entry.group)
                keep, gain = decay_factors(lr, group["weight_decay"], group["adam_variant"])
                move = lr * gain * group["state_free_lr_ratio"] * _state_free(group, entry.grad)
                updated = keep * weight - move
                if entry.finite is not None:
                    updated = torch.where(entry.finite, updated, weight)
                entry.write_weight(weight.copy_(updated))

    def _is_chosen(self, layout: Layout, seed: int, refresh: int) -> bool:
        """Whether a parameter is among those with moments; the same in every process and after a resume."""
        count = max(1, round(self.matrix_count * layout.rank / layout.columns))
        chosen = random.Random(draw_seed(seed, refresh)).sample(range(self.matrix_count), count)
        return layout.first_index in chosen

    def state_dict(self) -> dict[str, Any]:
        """That of every optimizer, with moments of zeros for sharded blocks that have none.

        torch.distributed.checkpoint loads into existing tensors, and which blocks have moments changes.
        """
        hook = self.register_state_dict_post_hook(lambda _, saved: self._add_sharded_moments(saved), prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _add_sharded_moments(self, saved: dict[str, Any]) -> None:
        for number, (_, group, param) in enumerate(self._registered()):
            state = saved["state"].get(number, {})
            if isinstance(param, DTensor) and "reset_at" in state and "exp_avg" not in state:
                saved["state"][number] = dict(state)
                _create_moments(saved["state"][number], param, group)

    def _finish_loading(self, loaded: Mapping[str, Any]) -> None:
        super()._finish_loading(loaded)
        for info, group, param in self._registered():
            state = self.state.get(param)
            if not state or info.layout is None or group["subspace"] != BLOCKS:
                continue
            if not self._is_chosen(info.layout, group["seed"], state["refreshes"] - 1):
                _drop_moments(state)


def _split(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The blocks, and the other targets."""
    blocks = [entry for entry in entries if entry.group["subspace"] == BLOCKS]
    return blocks, [entry for entry in entries if entry.group["subspace"] != BLOCKS] if blocks else list(entries)


def _state_free(group: dict[str, Any], grad: Tensor, out: Tensor | None = None) -> Tensor:
    """The direction of the rule without state."""
    return torch.sign(grad, out=out) if group["state_free_rule"] == "sign" else grad


def _create_moments(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    for key, moment in adam_moments(whole=True).items():
        moment.create(state, key, param, None, group["state_dtype"])


def _drop_moments(state: dict[str, Any]) -> None:
    for key in BLOCK_MOMENTS:
        state.pop(key, None)
        state.pop(f"{key}_scale", None)
