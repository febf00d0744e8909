"""torch's Muon for the target matrices and AdamW for the rest, as one optimizer, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import muon

from hf_lowrank.errors import UserError
from hf_lowrank.optim.base import Bound, Entry, Params, TargetedAdamW, is_count
from hf_lowrank.optim.groups import param_groups

ADJUST_LR = ("original", "match_rms_adamw")


class MuonAdamW(TargetedAdamW):
    """`torch.optim.Muon`'s update of the groups that have `muon=True`, AdamW for the others.

    Args:
        params: a model (its target modules get Muon), groups, or parameters.
        lr: of both; `adjust_lr_fn="match_rms_adamw"` makes one rate fit both (arXiv 2502.16982).
        momentum, nesterov, ns_steps, adjust_lr_fn: as in `torch.optim.Muon`.

    The other arguments are `ProjectedAdamW`'s.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        target_modules: str | Sequence[str] = "auto",
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        state_dtype: str = "parameter",
        stochastic_rounding: bool = False,
        seed: int = 0,
        layerwise: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "muon": False,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "adam_variant": "torch",
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        if isinstance(params, nn.Module):
            params = muon_groups(params, target_modules=target_modules, weight_decay=weight_decay)
        super().__init__(params, defaults, layerwise=layerwise)
        if not any(group["muon"] for group in self.param_groups):
            raise UserError("MuonAdamW needs at least one group with muon=True; pass the model itself")

    def _is_target(self, group: dict[str, Any]) -> bool:
        return bool(group["muon"])

    def _adopt(self, group: dict[str, Any], param: Tensor) -> None:
        if param.ndim != 2:
            raise UserError(
                f"{self.name_of(param)} of shape {tuple(param.shape)} is no matrix; put it into a group without muon"
            )

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return super()._choices() | {"adjust_lr_fn": ADJUST_LR}

    def _bounds(self) -> dict[str, Bound]:
        return super()._bounds() | {
            "momentum": (lambda x: 0 <= x < 1, "from 0 to below 1"),
            "ns_steps": (is_count, "a whole number from 1"),
        }

    def _update_targets(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            state = self.state[entry.param]
            if not state:
                state["step"] = 0
                state["momentum_buffer"] = torch.zeros_like(entry.param, memory_format=torch.preserve_format)
            state["step"] += 1
            wide = entry.param.float() if self._rounds(entry) else entry.param
            muon(
                [wide],
                [entry.grad],
                [state["momentum_buffer"]],
                lr=float(entry.group["lr"]),
                weight_decay=entry.group["weight_decay"],
                momentum=entry.group["momentum"],
                nesterov=entry.group["nesterov"],
                ns_coefficients=(3.4445, -4.7750, 2.0315),
                eps=1e-7,
                ns_steps=entry.group["ns_steps"],
                adjust_lr_fn=entry.group["adjust_lr_fn"],
                has_complex=False,
            )
            self._write_weight(entry, wide)

    def _kept_dtype(self, key: str, value: Tensor, group: dict[str, Any], param: Tensor) -> torch.dtype:
        return param.dtype if key == "momentum_buffer" else super()._kept_dtype(key, value, group, param)


def muon_groups(
    model: nn.Module, *, target_modules: str | Sequence[str] = "auto", weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """`param_groups` with `muon=True` in the place of a rank."""
    groups = param_groups(model, rank=1, target_modules=target_modules, weight_decay=weight_decay)
    for group in groups:
        group["muon"] = group.pop("rank") is not None
    return groups
