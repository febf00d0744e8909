"""FRUGAL (arXiv 2411.07837): Adam inside the subspace, a rule without state outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.optim.adam import adamw_, decay_factors
from hf_lowrank.optim.base import Bound, Entry, Params
from hf_lowrank.optim.batch import Batch
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.matrices import Layout
from hf_lowrank.optim.moments import init_moments, read_moments, write_moments, zero_moment
from hf_lowrank.optim.plan import Part
from hf_lowrank.optim.subspaces import draw_generator

STATE_FREE_RULES = ("sign", "sgd")
# The subspace is made of whole parameters: some get all of Adam, the others none.
BLOCKS = "blocks"
_MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")


class FrugalAdamW(ProjectedAdamW):
    """FRUGAL: `W ← W − η_t · scale · lift(N) − η · state_free_lr_ratio · rule(G − lift(project(G)))`.

    With `subspace="blocks"` the subspace is made of whole parameters instead: at each refresh a random share of them,
    rank over the projected dimension, gets Adam with moments that start from zero, the others only the rule.

    Args:
        state_free_rule: `sign` (signSGD) or `sgd`, for the part of the gradient outside the subspace.
        state_free_lr_ratio: its learning rate over Adam's.

    The other arguments are `ProjectedAdamW`'s; the subspace is made of random columns and the moments start anew
    at each refresh unless said otherwise.
    """

    # What is left out is computed as for an orthonormal basis.
    subspaces = ("svd", "randomized", "random", "columns", BLOCKS)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        subspace: str = "columns",
        moments: str = "reset",
        state_free_rule: str = "sign",
        state_free_lr_ratio: float = 1.0,
        **options: Any,
    ) -> None:
        own = {"state_free_rule": state_free_rule, "state_free_lr_ratio": state_free_lr_ratio}
        super().__init__(params, lr, subspace=subspace, moments=moments, own=own, **options)

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return super()._choices() | {"state_free_rule": STATE_FREE_RULES}

    def _bounds(self) -> dict[str, Bound]:
        return super()._bounds() | {"state_free_lr_ratio": (lambda x: x >= 0, "at least 0")}

    def _update_batch(self, batch: Batch) -> None:
        group = batch.group
        keep, step = batch.factors
        batch.apply_lifted_(batch.moves(), keep=keep, alpha=step * group["scale"])
        for weight, residual in zip(batch.weights, batch.residuals(), strict=True):
            if group["state_free_rule"] == "sign":
                residual.sign_()
            weight.add_(residual, alpha=-step * group["state_free_lr_ratio"])

    def _update_targets(self, entries: Sequence[Entry]) -> None:
        super()._update_targets([entry for entry in entries if entry.group["subspace"] != BLOCKS])
        for entry in entries:
            if entry.group["subspace"] == BLOCKS:
                self._update_block(entry, self._layouts[entry.param])

    def _plan_targets(self, entries: Sequence[Entry]) -> list[Part] | None:
        if any(entry.group["subspace"] == BLOCKS for entry in entries):
            return None
        return super()._plan_targets(entries)

    def _update_block(self, entry: Entry, layout: Layout) -> None:
        group, state = entry.group, self.state[entry.param]
        if not state:
            state.update(step=0, refreshes=0)
        if self._is_due(entry, layout, state):
            for key in _MOMENTS:
                state.pop(key, None)
            if self._is_chosen(layout, group["seed"], state["refreshes"]):
                init_moments(state, zero_moment(group["state_dtype"], entry.param), group["state_dtype"])
            state["reset_at"] = state["step"]
            state["refreshes"] += 1
        state["step"] += 1

        lr = float(group["lr"])
        if "exp_avg" in state:
            exp_avg, exp_avg_sq = read_moments(state)
            dtype = torch.float32 if self._rounds(entry) else exp_avg.dtype
            exp_avg, exp_avg_sq = exp_avg.to(dtype), exp_avg_sq.to(dtype)
            wide = entry.weight.to(dtype)
            adamw_(
                [wide],
                [entry.grad.to(dtype)],
                [exp_avg],
                [exp_avg_sq],
                age=self._age(entry),
                lr=lr,
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                variant=group["adam_variant"],
            )
            write_moments(state, exp_avg, exp_avg_sq)
        else:
            wide = entry.weight.float() if self._rounds(entry) else entry.weight
            keep, gain = decay_factors(lr, group["weight_decay"], group["adam_variant"])
            move = entry.grad.sign() if group["state_free_rule"] == "sign" else entry.grad
            wide.mul_(keep).add_(move, alpha=-lr * gain * group["state_free_lr_ratio"])
        self._write_weight(entry, wide)

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's. Of sharded blocks, those without moments have some of zeros in it.

        torch.distributed.checkpoint loads into the tensors that are there, and which blocks have moments changes.
        """
        saved = super().state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        for number, state in saved["state"].items():
            if isinstance(params[number], DTensor) and "reset_at" in state and "exp_avg" not in state:
                kind = saved["param_groups"][self._group_of(number)]["state_dtype"]
                saved["state"][number] = dict(state)
                init_moments(saved["state"][number], zero_moment(kind, params[number]), kind)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for param in group["params"] if group["subspace"] == BLOCKS and self._is_target(group) else ():
                state = self.state.get(param, {})
                if state and not self._is_chosen(self._layouts[param], group["seed"], state["refreshes"] - 1):
                    for key in _MOMENTS:
                        state.pop(key, None)

    def _moment_shape(self, group: dict[str, Any], param: Tensor) -> torch.Size | tuple[int, ...]:
        return param.shape if group["subspace"] == BLOCKS else super()._moment_shape(group, param)

    def _group_of(self, number: int) -> int:
        """The group of parameter `number` of a state dict."""
        for place, group in enumerate(self.param_groups):
            number -= len(group["params"])
            if number < 0:
                return place
        raise IndexError(number)

    def _is_chosen(self, layout: Layout, seed: int, refresh: int) -> bool:
        """Whether a parameter is among those with moments: the same for all in every process and after a resume."""
        count = max(1, round(self._matrix_count * layout.rank / layout.columns))
        order = torch.randperm(self._matrix_count, generator=draw_generator(torch.device("cpu"), seed, refresh))
        return layout.index in order[:count].tolist()
